"""From stays to batches: splits by patient, statistics of the training stays, the regular grid, hashed notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Dataset

from attn_shared.errors import UserError
from attn_timeseries.records.cards import DATASETS, RecordsDataConfig
from attn_timeseries.records.corpus import Corpus, Stay


@dataclass(kw_only=True)
class Prepared:
    """The data of a run."""

    train: RecordSet | None
    val: RecordSet | None
    test: RecordSet | None
    state: dict[str, Any]
    facts: dict[str, Any]
    protocol: str


class RecordSet(Dataset[dict[str, Tensor]]):
    """Stays of one split as batches, each as long as its longest stay.

    Keys: `x` (B, N, V) float32, 0 where not observed; `observed` (B, N, V) bool; `time` (B, N) shares of the period;
    `regular` (B, T, 2 V), see `regular_grid`; `notes` (B, M, E), `note_time` (B, M), `note_mask` (B, M) bool, where the
    data has notes; `y` (B, K), NaN where not known; `index` (B,); `patient` (B,).

    Args:
        stays: what is in the set.
        columns: (V,) column of each of the model's variables in the stays, -1 = the stays lack it.
        state: from `fit_state`.
    """

    def __init__(self, stays: Sequence[Stay], columns: np.ndarray, state: Mapping[str, Any]) -> None:
        mean, std = np.array(state["mean"]), np.array(state["std"])
        self.variables: list[str] = state["variables"]
        self.labels: list[str] = state["labels"]
        self.names = [stay.name for stay in stays]
        patients = {name: i for i, name in enumerate(dict.fromkeys(stay.patient for stay in stays))}
        self.patient = np.array([patients[stay.patient] for stay in stays], dtype=np.int64)
        self.text: int = state["text"]
        self.x: list[np.ndarray] = []
        self.time: list[np.ndarray] = []
        self.note_time: list[np.ndarray] = []
        hours = state["hours"]
        grids = np.zeros((len(stays), state["steps"], 2 * len(self.variables)), dtype=np.float32)
        texts: list[np.ndarray] = []
        for i, stay in enumerate(stays):
            inside = (stay.hours >= 0) & (stay.hours < hours)
            values = np.full((int(inside.sum()), len(columns)), np.nan, dtype=np.float32)
            known = columns >= 0
            values[:, known] = stay.values[inside][:, columns[known]]
            values = np.clip((values - mean) / std, -state["clip"], state["clip"]).astype(np.float32)
            time = (stay.hours[inside] / hours).astype(np.float32)
            some = ~np.isnan(values).all(axis=1)
            values, time = values[some], time[some]
            grids[i] = regular_grid(time, values, state["steps"])
            self.x.append(values[-state["max_points"] :])
            self.time.append(time[-state["max_points"] :])
            if self.text:
                inside = (stay.note_hours >= 0) & (stay.note_hours < hours)
                self.note_time.append((stay.note_hours[inside] / hours).astype(np.float32)[-state["max_notes"] :])
                texts.append(stay.notes[inside][-state["max_notes"] :])
        self.regular = grids
        unknown = np.full(len(self.labels), np.nan, dtype=np.float32)
        self.y = np.stack([stay.label if len(stay.label) else unknown for stay in stays])
        self.notes = embed_notes(texts, state) if self.text else None
        self.note_from = np.cumsum([0, *(len(one) for one in self.note_time)])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        longest = max(1, max(len(self.x[i]) for i in indices))
        x = np.full((len(indices), longest, len(self.variables)), np.nan, dtype=np.float32)
        time = np.zeros((len(indices), longest), dtype=np.float32)
        for row, i in enumerate(indices):
            x[row, : len(self.x[i])], time[row, : len(self.time[i])] = self.x[i], self.time[i]
        observed = ~np.isnan(x)
        chosen = np.asarray(indices, dtype=np.int64)
        batch = {
            "x": np.where(observed, x, 0.0).astype(np.float32),
            "observed": observed,
            "time": time,
            "regular": self.regular[chosen],
            "y": self.y[chosen],
            "index": chosen,
            "patient": self.patient[chosen],
        }
        if self.notes is not None:
            longest = max(1, max(len(self.note_time[i]) for i in indices))
            notes = np.zeros((len(indices), longest, self.text), dtype=np.float32)
            when = np.zeros((len(indices), longest), dtype=np.float32)
            mask = np.zeros((len(indices), longest), dtype=bool)
            for row, i in enumerate(indices):
                many = len(self.note_time[i])
                notes[row, :many] = self.notes[self.note_from[i] : self.note_from[i + 1]].toarray()
                when[row, :many], mask[row, :many] = self.note_time[i], True
            batch |= {"notes": notes, "note_time": when, "note_mask": mask}
        return {name: torch.from_numpy(value) for name, value in batch.items()}


def regular_grid(time: np.ndarray, values: np.ndarray, steps: int) -> np.ndarray:
    """(steps, 2 V) from (N,) shares of the period and (N, V) values with NaN: the discretised series of Section 3.1.

    A step holds the last value observed in it, else the last one before, else 0 (the training mean). The second half
    is 1 where a step holds an observation. (The official code leaves steps without any time point at 0, and lets a
    later time point of a step that lacks a variable put back the value of the step before.)
    """
    count = values.shape[1]
    step = np.minimum((time * steps).astype(np.int64), steps - 1)
    filled = np.full((steps, count), np.nan, dtype=np.float32)
    rows, columns = np.nonzero(~np.isnan(values))
    filled[step[rows], columns] = values[rows, columns]  # rows ascend in time, and the last assignment stays
    seen = ~np.isnan(filled)
    last = np.maximum.accumulate(np.where(seen, np.arange(steps)[:, None], -1), axis=0)
    carried = np.where(last >= 0, filled[np.maximum(last, 0), np.arange(count)], 0.0)
    return np.concatenate([carried, seen], axis=1).astype(np.float32)


def embed_notes(texts: Sequence[np.ndarray], state: Mapping[str, Any]) -> sparse.csr_matrix:
    """All notes of all stays, one row each: embeddings as they are, texts hashed (words and pairs of words, length 1).

    Hashing needs neither a vocabulary nor a language model, so it learns nothing from any split.
    """
    if state["embedding"]:
        rows = [np.asarray(one, np.float32).reshape(-1, state["text"]) for one in texts]
        return sparse.csr_matrix(np.concatenate(rows) if rows else np.zeros((0, state["text"]), np.float32))
    from sklearn.feature_extraction.text import HashingVectorizer

    flat = [text for one in texts for text in one]
    if not flat:
        return sparse.csr_matrix((0, state["text"]), dtype=np.float32)
    hashing = HashingVectorizer(n_features=state["text"], ngram_range=(1, 2), dtype=np.float32)
    return sparse.csr_matrix(hashing.transform(flat))


def fit_state(corpus: Corpus, train: Sequence[Stay], args: RecordsDataConfig) -> dict[str, Any]:
    """All that is learnt from data outside the weights; it sees training stays only."""
    count = len(corpus.variables)
    inside = [one.values[(one.hours >= 0) & (one.hours < args.hours)].astype(np.float64) for one in train]
    values = np.concatenate(inside) if inside else np.zeros((0, count))
    seen = (~np.isnan(values)).sum(axis=0)
    indicator = np.array([name.partition("=")[0] in corpus.categorical and "=" in name for name in corpus.variables])
    positive = np.nansum(values, axis=0) > 0 if len(values) else np.zeros(count, bool)
    used = np.flatnonzero((seen > 0) & (~indicator | positive))
    if not len(used):
        raise UserError(f"{corpus.source}: no training stay has an observation within its first {args.hours:g} hours")
    values = values[:, used]
    mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    std[~(std > 1e-8)] = 1.0
    notes = args.max_notes and any(len(one.notes) for one in train)
    return {
        "variables": [corpus.variables[i] for i in used],
        "categorical": list(corpus.categorical),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "labels": list(corpus.labels),
        "prevalence": [_share(corpus, train, k) for k in range(len(corpus.labels))],
        "hours": float(args.hours),
        "steps": args.steps,
        "clip": float(args.clip),
        "max_points": args.max_points,
        "max_notes": args.max_notes,
        "text": (corpus.embedding or args.text_features) if notes else 0,
        "embedding": bool(corpus.embedding),
    }


def _share(corpus: Corpus, train: Sequence[Stay], label: int) -> float:
    known = np.array([one.label[label] for one in train], dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) == 0 or known.min() == known.max():
        what = "is known for none of them" if len(known) == 0 else f"is {known[0]:g} in all of them"
        raise UserError(f"{corpus.source}: of the {len(train):,} training stays, label {corpus.labels[label]!r} {what}")
    return float(known.mean())


def split_stays(corpus: Corpus, args: RecordsDataConfig) -> tuple[dict[str, list[Stay]], str]:
    """The stays of train, val and test, no patient in two of them, and how they were parted.

    A split that the data has is kept; where it has no validation part, training patients are drawn for it.

    Raises:
        UserError: a patient in two parts of the data's own split, a split for some stays only, an empty part.
    """
    own = {stay.split for stay in corpus.stays}
    parts: dict[str, list[Stay]] = {"train": [], "val": [], "test": []}
    share = f"{args.val_fraction:.0%} of the training patients for validation"
    if own == {""}:
        rest = 1 - args.val_fraction - args.test_fraction
        bins = _deal(corpus.stays, [rest, args.val_fraction, args.test_fraction], args.split_seed)
        for stay in corpus.stays:
            parts[("train", "val", "test")[bins[stay.patient]]].append(stay)
        shares = " / ".join(f"{one:.0%}" for one in (rest, args.val_fraction, args.test_fraction))
        how = f"by patient {shares}, drawn with seed {args.split_seed}"
    else:
        if "" in own:
            one = next(stay for stay in corpus.stays if not stay.split)
            raise UserError(f"{corpus.source}: {one.name!r} is in no split, and others are")
        where: dict[str, str] = {}
        for stay in corpus.stays:
            if where.setdefault(stay.patient, stay.split) != stay.split and "test" in (where[stay.patient], stay.split):
                raise UserError(
                    f"{corpus.source}: patient {stay.patient!r} is in {where[stay.patient]} and in {stay.split}; each "
                    "patient belongs to one part"
                )
            parts[stay.split].append(stay)
        how = "the split of the data"
        if not parts["val"] and args.val_fraction and parts["train"]:
            bins = _deal(parts["train"], [1 - args.val_fraction, args.val_fraction], args.split_seed)
            drawn = parts["train"]
            parts["train"] = [stay for stay in drawn if bins[stay.patient] == 0]
            parts["val"] = [stay for stay in drawn if bins[stay.patient] == 1]
            how += f", {share}"
    both = {stay.patient for stay in parts["train"]} & {stay.patient for stay in parts["val"]}
    if both:
        raise UserError(
            f"{corpus.source}: patient {min(both)!r} is in train and in val; each patient belongs to one part"
        )
    if not parts["train"]:
        raise UserError(f"{corpus.source}: no stay is left for training")
    return parts, how


def _deal(stays: Sequence[Stay], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Patient -> part. Patients with any positive label and the others are dealt out apart, so each part has both."""
    positive: dict[str, bool] = {}
    for stay in stays:
        positive[stay.patient] = positive.get(stay.patient, False) or bool(np.nansum(stay.label) > 0)
    rng = np.random.default_rng([seed, 7])
    result: dict[str, int] = {}
    for kind in (False, True):
        group = sorted(name for name, value in positive.items() if value == kind)
        edges = np.cumsum(shares)[:-1] * len(group)
        part = np.searchsorted(edges, np.arange(len(group)) + 0.5)
        result |= {group[i]: int(p) for i, p in zip(rng.permutation(len(group)), part)}
    return result


def prepare(args: RecordsDataConfig, corpus: Corpus, *, state: Mapping[str, Any] | None = None) -> Prepared:
    """Split, fit (unless `state` is given) and make the sets."""
    parts, how = split_stays(corpus, args)
    if state is None:
        state = fit_state(corpus, parts["train"], args)
    else:
        check_fit(corpus, state)
    columns = corpus.aligned(state["variables"])
    sets = {name: RecordSet(stays, columns, state) if stays else None for name, stays in parts.items()}
    counts = ", ".join(f"{name} {len(stays):,}" for name, stays in parts.items())
    points = [len(one) for held in sets.values() if held is not None for one in held.x]
    observed = np.mean([(~np.isnan(one)).mean() for held in sets.values() if held for one in held.x if len(one)])
    facts: dict[str, Any] = {
        "data": corpus.source,
        "stays": counts,
        "patients": f"{len({stay.patient for stay in corpus.stays}):,}",
        "variables": ", ".join(state["variables"][:12])
        + (f", … ({len(state['variables'])})" if len(state["variables"]) > 12 else ""),
        "labels": ", ".join(f"{n} ({p:.1%} in training)" for n, p in zip(state["labels"], state["prevalence"])),
        "period": f"{state['hours']:g} hours from each stay's start, on {state['steps']} steps",
        "time points a stay": f"median {np.median(points):g}, of whose cells {observed:.0%} are observed",
        "notes": _note_facts(state, sets),
    }
    outside = sum(int(((one.hours < 0) | (one.hours >= state["hours"])).sum()) for one in corpus.stays)
    late = [f"{outside:,} time points lie outside the period and are not seen"] if outside else []
    if corpus.found or late:
        facts["found"] = "; ".join([*corpus.found, *late])
    name = DATASETS[corpus.source].name if corpus.source in DATASETS else corpus.source
    tested = sets["test"] or sets["val"]
    protocol = (
        f"{name}{' (synthetic)' if corpus.source in DATASETS else ''}, first {state['hours']:g} hours, {how}, "
        f"all {len(tested) if tested else 0:,} test stays"
    )
    return Prepared(
        train=sets["train"], val=sets["val"], test=sets["test"], state=dict(state), facts=facts, protocol=protocol
    )


def check_fit(corpus: Corpus, state: Mapping[str, Any]) -> None:
    """Refuse other data than the model can read."""
    if not set(corpus.variables) & set(state["variables"]):
        raise UserError(
            f"{corpus.source} has none of the variables that the model was trained on: "
            f"{', '.join(state['variables'][:8])}"
        )
    if corpus.labels and list(corpus.labels) != list(state["labels"]):
        raise UserError(
            f"{corpus.source} has the labels {', '.join(corpus.labels)}, and the model was trained on "
            f"{', '.join(state['labels'])}"
        )
    with_notes = any(len(stay.notes) for stay in corpus.stays)
    if state["text"] and with_notes and bool(corpus.embedding) != state["embedding"]:
        kinds = {True: "embeddings", False: "texts"}
        raise UserError(
            f"{corpus.source} has {kinds[bool(corpus.embedding)]} as notes, and the model was trained on "
            f"{kinds[state['embedding']]}"
        )
    if state["embedding"] and with_notes and corpus.embedding != state["text"]:
        raise UserError(
            f"{corpus.source} has embeddings of {corpus.embedding} numbers, and the model was trained on those of "
            f"{state['text']}"
        )


def _note_facts(state: Mapping[str, Any], sets: Mapping[str, RecordSet | None]) -> str:
    if not state["text"]:
        return "none"
    many = [len(one) for held in sets.values() if held is not None for one in held.note_time]
    what = "embeddings of" if state["embedding"] else "hashed into"
    return f"{sum(many):,}, {what} {state['text']} numbers; {np.mean(np.array(many) > 0):.0%} of the stays have some"
