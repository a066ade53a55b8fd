"""From recordings to the three parts of a fold: chain, windows, features, split, and all that is fitted.

Whatever is fitted (scaler, synthetic windows, class weights) sees training windows only. Recordings are divided first
and cut into windows afterwards, so no window of one part holds a sample of another, except with `split="random"`, which
divides windows as many papers do.

Legend: N windows, C electrodes, F features an electrode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attn_eeg.data.features import Band, baseline_features, parse_bands, window_features
from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.preprocess import Chain
from attn_eeg.data.recording import Corpus, Recording
from attn_eeg.data.splits import blocks, check, fold_count, leaks, split
from attn_eeg.data.windows import Cut, FeatureWindows, Meta, RawWindows, WindowSet, cut, gather
from attn_shared.errors import UserError

PARTS = ("train", "val", "test")
_CACHE_BYTES = 256 << 20
_TINY = 1e-12
_FEW = 8  # windows below which a subject's own mean and deviation say little


@dataclass(kw_only=True)
class Prepared:
    """The data of a fold.

    Attributes:
        train, val, test: windows; None where there are none.
        state: plain values: everything that `encode` and another `prepare` need beside the options.
        facts: what a report shows.
        protocol: one sentence: data, windows, split, fold, scaling; ends with the warning where there is one.
        warning: why the figures mislead; empty where they do not.
        fold: number of the test fold, of `folds`.
    """

    train: WindowSet | None
    val: WindowSet | None
    test: WindowSet | None
    state: dict[str, Any]
    facts: dict[str, Any]
    protocol: str
    warning: str
    fold: int
    folds: int

    def part(self, name: str) -> WindowSet | None:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


@dataclass(frozen=True, kw_only=True)
class Scaler:
    """Mean and deviation of features (C, F) over windows, or of samples (C, 1) over windows and time.

    Attributes:
        kind: "global", "subject" or "none".
        known: name of a subject, or "" for all -> (mean, deviation).
    """

    kind: str
    known: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "known": {name: [m.tolist(), s.tolist()] for name, (m, s) in self.known.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Scaler:
        known = {name: (np.asarray(m), np.asarray(s)) for name, (m, s) in state["known"].items()}
        return cls(kind=state["kind"], known=known)


@dataclass(kw_only=True)
class _Piece:
    """A recording, or a stretch of one: what windows are cut from."""

    recording: Recording
    number: int
    offset: float
    duration: float


@dataclass(kw_only=True)
class _Part:
    """Windows before scaling: `x` (N, C, F) features, or the signals with the places of their windows."""

    meta: Meta
    whole: np.ndarray
    x: np.ndarray | None
    signals: list[np.ndarray]
    starts: list[np.ndarray]
    mixed: int
    notes: list[str]

    @property
    def broken(self) -> int:
        return int((~self.whole).sum())

    def take(self, index: np.ndarray) -> _Part:
        """Only these windows, in this order for features, in the order of time for samples."""
        if self.x is not None:
            return dataclasses.replace(self, meta=self.meta.take(index), whole=self.whole[index], x=self.x[index])
        index = np.sort(index)
        bounds = np.cumsum([0, *(len(starts) for starts in self.starts)])
        chosen = [index[(index >= a) & (index < b)] - a for a, b in itertools.pairwise(bounds)]
        pairs = [(one, own[c]) for one, own, c in zip(self.signals, self.starts, chosen) if len(c)]
        signals, starts = [one for one, _ in pairs], [own for _, own in pairs]
        meta = self.meta.take(index)
        return dataclasses.replace(self, meta=meta, whole=self.whole[index], signals=signals, starts=starts)

    def usable(self, *, labelled: bool = True) -> _Part:
        """Without windows that hold samples which are no numbers, or whose class is unknown.

        Only now, after the split: were they left out before, a damaged test recording would move others to other folds.
        """
        good = self.whole & (self.meta.label >= 0) if labelled else self.whole
        return self if good.all() else self.take(np.flatnonzero(good))


# -- the public face --------------------------------------------------------------------------------------------------


def prepare(
    args: EegDataConfig,
    corpus: Corpus,
    fold: int | None = None,
    state: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Prepared:
    """The parts of a fold.

    Args:
        fold: which one is the test part; None = `args.fold`, or `seed` modulo the number of folds.
        state: of an earlier `prepare`: nothing is fitted then. Of another data set than that one was of, everything is
            test, since none of it was trained on.

    Raises:
        UserError: options or data that give no training or no test window.
    """
    check(args)
    _check_options(args)
    chain = Chain.plan(corpus.recordings, args) if state is None else Chain.from_state(state["chain"])
    length, stride, train_stride = _samples(args, chain.sfreq)
    pieces = [
        _Piece(recording=r, number=i, offset=0.0, duration=r.data.shape[-1] / r.sfreq)
        for i, r in enumerate(corpus.recordings)
    ]
    elsewhere = state is not None and _identity(corpus) != state["corpus"]
    scaler = None if state is None else Scaler.from_state(state["scaler"])
    if elsewhere:
        assert state is not None
        assert scaler is not None
        if state["classes"] != list(corpus.classes):
            raise UserError(
                f"{corpus.name} has the classes {', '.join(corpus.classes)} and the model was trained on "
                f"{', '.join(state['classes'])}"
            )
        scaler = dataclasses.replace(scaler, known={k: v for k, v in scaler.known.items() if not k})
        everything = {"test": _cut_all(pieces, chain, args, length, stride)}
        number, count = 0, 1
    else:
        everything, number, count = _divide(pieces, chain, args, fold, seed, length, stride, train_stride)
    parts = {name: part.usable() for name, part in everything.items()}
    for name, part in parts.items():
        if not len(part.meta) and (name != "val" or args.val):
            raise UserError(_no_window(corpus, args, name, everything))
    if args.keep < 1 and not elsewhere:
        parts["train"] = _keep(parts["train"], args, number)
    if scaler is None:
        scaler = _fit_scaler(parts["train"], args, length)
    constant = all(recording.labels is None for recording in corpus.recordings)
    warning = "" if elsewhere else leaks(args, constant=constant, one_label=_one_label(corpus) if constant else "")
    subjects = sorted({recording.subject for recording in corpus.recordings})
    sets = {
        name: _window_set(part, scaler, args, chain, length, subjects, corpus.classes)
        for name, part in parts.items()
        if len(part.meta)
    }
    counts = {name: np.bincount(one.y.numpy(), minlength=len(corpus.classes)).tolist() for name, one in sets.items()}
    if state is None and args.balance == "smote":
        _oversample(sets["train"], args)
    if state is None:
        state = {
            "corpus": _identity(corpus),
            "label": corpus.label,
            "classes": list(corpus.classes),
            "chain": chain.state(),
            "samples": length,
            "features": [band.name for band in parse_bands(args.bands)] if args.features == "bde" else [],
            "scaler": scaler.state(),
            "class_weights": _class_weights(counts["train"], args),
        }
    return Prepared(
        train=sets.get("train"),
        val=sets.get("val"),
        test=sets.get("test"),
        state=dict(state),
        facts=_facts(corpus, chain, everything, sets, counts, number, count, args),
        protocol=_protocol(corpus, args, sets, number, count, elsewhere, warning),
        warning=warning,
        fold=number,
        folds=count,
    )


def encode(
    recordings: Sequence[Recording],
    args: EegDataConfig,
    state: Mapping[str, Any],
    *,
    stride: float | None = None,
    interpolate: bool = False,
) -> tuple[WindowSet, list[str]]:
    """The windows of recordings of one's own, labelled or not, as the model of `state` takes them.

    With `scale="subject"` each subject is scaled by all of its windows given here.

    Args:
        stride: seconds between windows; None = `args.stride`.
        interpolate: compute missing electrodes from their neighbours, up to a third; False = refuse.

    Returns:
        The windows (their `meta` has the times), and sentences on what was left out or computed.

    Raises:
        UserError: no whole window, an electrode missing.
    """
    chain = Chain.from_state(state["chain"])
    args = dataclasses.replace(args, stride=args.stride if stride is None else stride)
    length, step, _ = _samples(args, chain.sfreq)
    pieces = [
        _Piece(recording=r, number=i, offset=0.0, duration=r.data.shape[-1] / r.sfreq) for i, r in enumerate(recordings)
    ]
    every = _cut_all(pieces, chain, args, length, step, interpolate=interpolate)
    part = every.usable(labelled=False)
    where = ", ".join(dict.fromkeys(r.source or r.subject for r in recordings))
    if not len(part.meta):
        longest = max((piece.duration for piece in pieces), default=0.0)
        why = (
            f"all {every.broken} windows hold samples that are no numbers"
            if every.broken
            else f"it lasts {longest:g} s and a window {args.window:g} s"
        )
        raise UserError(f"{where}: no window can be cut: {why}")
    scaler = Scaler.from_state(state["scaler"])
    scaler = dataclasses.replace(scaler, known={k: v for k, v in scaler.known.items() if not k})
    subjects = sorted({recording.subject for recording in recordings})
    notes = list(part.notes)
    if every.broken:
        notes.append(f"{every.broken} windows left out: they hold samples that are no numbers")
    if scaler.kind == "subject":
        for name, count in zip(*np.unique(part.meta.subject, return_counts=True)):
            if count < _FEW:
                notes.append(f"{name} is scaled by its own {count} windows, which are few: expect little of the result")
    return _window_set(part, scaler, args, chain, length, subjects, state["classes"]), notes


# -- cutting ----------------------------------------------------------------------------------------------------------


def _check_options(args: EegDataConfig) -> None:
    if args.window <= 0 or args.stride <= 0 or args.train_stride < 0:
        raise UserError("data_args.window and stride must be above 0 seconds, and train_stride not negative")
    if not 0 < args.keep <= 1:
        raise UserError(f"data_args.keep is {args.keep:g}; it must lie above 0 and at most at 1")
    if args.order < 1 or args.band_order < 1:
        raise UserError("data_args.order and band_order must be at least 1")
    if args.balance == "smote" and args.features == "raw":
        raise UserError(
            "data_args.balance smote mixes features and needs data_args.features bde; weights works for raw"
        )


def _samples(args: EegDataConfig, sfreq: float) -> tuple[int, int, int]:
    """Window, stride and training stride in samples."""
    _check_options(args)
    if args.features == "bde":
        parse_bands(args.bands, sfreq)
    length, stride = round(args.window * sfreq), round(args.stride * sfreq)
    train_stride = round(args.train_stride * sfreq) or stride
    if length < 2 or stride < 1:
        raise UserError(f"data_args.window and stride are shorter than the samples at {sfreq:g} Hz")
    return length, stride, train_stride


def _divide(
    pieces: list[_Piece],
    chain: Chain,
    args: EegDataConfig,
    fold: int | None,
    seed: int,
    length: int,
    stride: int,
    train_stride: int,
) -> tuple[dict[str, _Part], int, int]:
    """The windows of each part, number of the fold, number of folds."""

    def number_of(count: int) -> int:
        chosen = fold if fold is not None else args.fold
        return chosen if chosen is not None else seed % max(count, 1)

    if args.split == "blocked":
        number = number_of(args.folds)
        split(Meta.join([]), args, number)  # refuses a fold that there is not
        parts = {}
        for name in PARTS:
            step = train_stride if name == "train" else stride
            own = [p for piece in pieces for p in _stretches(piece, name, args, number)]
            parts[name] = _cut_all(own, chain, args, length, step)
        return parts, number, args.folds
    whole = _cut_all(pieces, chain, args, length, stride)
    if not len(whole.meta):
        return dict.fromkeys(PARTS, whole), 0, 1
    count = fold_count(whole.meta, args)
    number = number_of(count)
    index = dict(zip(PARTS, split(whole.meta, args, number)))
    parts = {name: whole.take(chosen) for name, chosen in index.items()}
    if train_stride != stride:
        ids = _ids(whole.meta)
        train = {ids[i] for i in index["train"]}
        own = [piece for piece in pieces if _id(piece.recording) in train]
        parts["train"] = _cut_all(own, chain, args, length, train_stride)
    return parts, number, count


def _id(recording: Recording) -> tuple[str, str, str]:
    return recording.subject, recording.session, recording.trial


def _ids(meta: Meta) -> list[tuple[str, str, str]]:
    return [(str(a), str(b), str(c)) for a, b, c in zip(meta.subject, meta.session, meta.trial)]


def _stretches(piece: _Piece, part: str, args: EegDataConfig, fold: int) -> list[_Piece]:
    """The stretches of a recording that belong to a part, as recordings of their own."""
    found = []
    recording, rate = piece.recording, piece.recording.sfreq
    for stretch in blocks(piece.duration, args, fold):
        if stretch.part != part:
            continue
        first, last = math.ceil(stretch.start * rate - 1e-6), math.floor(stretch.stop * rate + 1e-6)
        if last <= first:
            continue
        one = dataclasses.replace(
            recording,
            data=recording.data[:, first:last],
            labels=None if recording.labels is None else recording.labels[first:last],
        )
        found.append(
            _Piece(recording=one, number=piece.number, offset=piece.offset + first / rate, duration=piece.duration)
        )
    return found


def _cut_all(
    pieces: Sequence[_Piece],
    chain: Chain,
    args: EegDataConfig,
    length: int,
    stride: int,
    *,
    interpolate: bool = False,
) -> _Part:
    metas, whole, values, signals, starts = [], [], [], [], []
    notes: list[str] = []
    mixed = 0
    bands = parse_bands(args.bands, chain.sfreq) if args.features == "bde" else []
    for piece in pieces:
        recording = piece.recording
        if bands:
            found, x, said = _features(recording, chain, args, bands, length, stride, interpolate)
            values.append(x)
        else:
            done = chain.apply(recording, interpolate=interpolate)
            found, said = cut(done, length, stride), done.notes
            if len(found.starts):
                signals.append(done.data)
                starts.append(found.starts)
        name = recording.source or "/".join(_id(recording))
        notes += [note if name in note else f"{name}: {note}" for note in said]
        mixed += found.mixed
        whole.append(found.whole)
        count = len(found.starts)
        begin = piece.offset + found.starts / chain.sfreq
        metas.append(
            Meta(
                subject=np.full(count, recording.subject),
                session=np.full(count, recording.session),
                trial=np.full(count, recording.trial),
                recording=np.full(count, piece.number),
                start=begin,
                stop=begin + length / chain.sfreq,
                duration=np.full(count, piece.duration),
                label=found.labels,
            )
        )
    none = np.zeros((0, len(chain.channels), len(bands)), np.float32)
    joined = np.concatenate([none, *values]) if bands else None
    return _Part(
        meta=Meta.join(metas),
        whole=np.concatenate([np.zeros(0, bool), *whole]),
        x=joined,
        signals=signals,
        starts=starts,
        mixed=mixed,
        notes=list(dict.fromkeys(notes)),
    )


# The features of a recording do not depend on the fold, the model or the seed, and a comparison asks for them again
# and again. Keyed by content, so that another recording can never be taken for it.
_cache: OrderedDict[bytes, tuple[Cut, np.ndarray, list[str]]] = OrderedDict()


def _features(
    recording: Recording,
    chain: Chain,
    args: EegDataConfig,
    bands: Sequence[Band],
    length: int,
    stride: int,
    interpolate: bool,
) -> tuple[Cut, np.ndarray, list[str]]:
    """Where the windows are, their features (n, C, F) float32, notes."""
    plain = [
        chain.state(), args.bands, args.band_order, args.band_causal, args.normalize, args.baseline, length, stride,
        interpolate, recording.channels, recording.sfreq, recording.label, recording.notes, recording.source,
        recording.data.shape,
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(plain, default=str).encode())
    for array in (recording.data, recording.baseline, recording.labels):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    key = digest.digest()
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    done = chain.apply(recording, interpolate=interpolate)
    found, notes = cut(done, length, stride), list(done.notes)
    how: dict[str, Any] = {"normalize": args.normalize, "order": args.band_order, "causal": args.band_causal}
    x = np.zeros((len(found.starts), len(chain.channels), len(bands)), np.float32)
    if found.whole.any():
        # A few hundred windows at a time: overlapping ones take many times the recording's memory.
        starts = found.starts[found.whole]
        groups = np.array_split(starts, -(-len(starts) // 256))
        windows = [window_features(gather(done.data, some, length), chain.sfreq, bands, **how) for some in groups]
        features = np.concatenate(windows)
        if args.baseline and done.baseline is not None:
            rest = baseline_features(done.baseline, chain.sfreq, bands, **how)
            if rest is None:
                notes.append("its baseline holds no whole second of numbers and is not subtracted")
            else:
                features = features - rest
        x[found.whole] = features
    _cache[key] = found, x, notes
    while len(_cache) > 1 and sum(entry[1].nbytes for entry in _cache.values()) > _CACHE_BYTES:
        _cache.popitem(last=False)
    return _cache[key]


# -- fitting: training windows only -----------------------------------------------------------------------------------


def _keep(part: _Part, args: EegDataConfig, fold: int) -> _Part:
    count = max(1, round(args.keep * len(part.meta)))
    drawn = np.random.default_rng([args.shuffle, fold, 2]).permutation(len(part.meta))[:count]
    return part.take(np.sort(drawn))


def _fit_scaler(part: _Part, args: EegDataConfig, length: int) -> Scaler:
    if args.scale == "none":
        return Scaler(kind="none")
    if args.scale == "global":
        return Scaler(kind="global", known={"": _moments(part, np.arange(len(part.meta)), args, length)})
    if args.split == "subject":  # no subject is on both sides, so each is scaled by its own part
        return Scaler(kind="subject")
    own = {
        str(name): _moments(part, np.flatnonzero(part.meta.subject == name), args, length)
        for name in np.unique(part.meta.subject)
    }
    return Scaler(kind="subject", known=own)


def _moments(part: _Part, index: np.ndarray, args: EegDataConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population deviation, (C, F) of features or (C, 1) of samples; a constant one gets deviation 1."""
    if part.x is not None:
        x = part.x[index].astype(np.float64)
        mean, std = x.mean(axis=0), x.std(axis=0)
    else:
        count, total, square = 0, np.zeros(1), np.zeros(1)
        chosen = part.take(index)
        raw = _raw(chosen, args, length)
        for first in range(0, len(raw), 256):
            x = raw.values(raw.y.new_tensor(range(first, min(first + 256, len(raw))))).numpy().astype(np.float64)
            count, total, square = count + x.shape[0] * length, total + x.sum((0, 2)), square + (x * x).sum((0, 2))
        mean = (total / count)[:, None]
        std = np.sqrt(np.maximum((square / count)[:, None] - mean**2, 0.0))
    return mean, np.where(std > _TINY * np.maximum(np.abs(mean), 1.0), std, 1.0)


def _raw(part: _Part, args: EegDataConfig, length: int) -> RawWindows:
    """The windows of samples before scaling."""
    names = sorted(set(map(str, part.meta.subject)))
    one = {"mean": np.zeros((1, 1, 1)), "std": np.ones((1, 1, 1))}
    return RawWindows(
        part.signals, part.starts, length, part.meta, normalize=args.normalize, scale=one, subjects=names, channels=[],
        features=[], classes=[], sfreq=0.0,
    )  # fmt: skip


def _window_set(
    part: _Part,
    scaler: Scaler,
    args: EegDataConfig,
    chain: Chain,
    length: int,
    subjects: Sequence[str],
    classes: Sequence[str],
) -> WindowSet:
    about: dict[str, Any] = {
        "subjects": subjects,
        "channels": chain.channels,
        "classes": classes,
        "features": [band.name for band in parse_bands(args.bands)] if args.features == "bde" else [],
        "sfreq": chain.sfreq,
    }
    count = len(part.meta)
    if scaler.kind == "none":
        mean, std = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    elif scaler.kind == "global":
        mean, std = (values[None] for values in scaler.known[""])
    else:
        width = (len(chain.channels), len(about["features"]) or 1)
        mean, std = np.zeros((count, *width)), np.ones((count, *width))
        for name in np.unique(part.meta.subject):
            own = np.flatnonzero(part.meta.subject == name)
            mean[own], std[own] = scaler.known.get(str(name)) or _moments(part, own, args, length)
    if part.x is not None:
        return FeatureWindows((part.x - mean) / std, part.meta, **about)
    scale = {"mean": mean, "std": std}
    return RawWindows(part.signals, part.starts, length, part.meta, normalize=args.normalize, scale=scale, **about)


def _oversample(windows: WindowSet, args: EegDataConfig) -> None:
    """SMOTE: synthetic windows between neighbours of the smaller classes, behind the real ones."""
    from imblearn.over_sampling import SMOTE

    assert isinstance(windows, FeatureWindows)
    x, y = windows.arrays()
    counts = Counter(y.tolist())
    if len(set(counts.values())) < 2:
        return
    least, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < 2:
        raise UserError(
            f"class {windows.classes[least]!r} has a single training window, and SMOTE mixes at least two; use "
            "data_args.balance weights"
        )
    more, labels = SMOTE(random_state=args.shuffle, k_neighbors=min(5, fewest - 1)).fit_resample(x, y)
    windows.add(more[len(x) :].reshape(-1, *windows.shape), labels[len(x) :])


def _class_weights(counts: Sequence[int], args: EegDataConfig) -> list[float] | None:
    """Weights with which all classes count alike and whose mean over training windows is 1; None = no weights."""
    if args.balance != "weights":
        return None
    present = [n for n in counts if n]
    return [sum(present) / (len(present) * n) if n else 1.0 for n in counts]


# -- words ------------------------------------------------------------------------------------------------------------


def _identity(corpus: Corpus) -> str:
    """Tells one data set from another: its name, and whose recordings of what length it holds."""
    facts = [(*_id(r), r.data.shape[-1], r.sfreq) for r in corpus.recordings]
    return f"{corpus.name}:{hashlib.blake2b(json.dumps(facts, default=str).encode(), digest_size=8).hexdigest()}"


def _one_label(corpus: Corpus) -> str:
    """ "subject" or "session" where each of several has one label in all of its several recordings, else ""."""
    for level, of in (("subject", lambda r: (r.subject,)), ("session", lambda r: (r.subject, r.session))):
        labels: dict[tuple[str, ...], list[int]] = {}
        for recording in corpus.recordings:
            labels.setdefault(of(recording), []).append(recording.label)
        if all(len(set(own)) == 1 for own in labels.values()) and any(len(own) > 1 for own in labels.values()):
            return level
    return ""


def _no_window(corpus: Corpus, args: EegDataConfig, part: str, parts: Mapping[str, _Part]) -> str:
    which = {"train": "training", "val": "validation", "test": "test"}[part]
    mixed, broken = (max(getattr(p, name) for p in parts.values()) for name in ("mixed", "broken"))
    longest = max((r.data.shape[-1] / r.sfreq for r in corpus.recordings), default=0.0)
    reasons = [f"the longest recording lasts {longest:g} s and a window {args.window:g} s"]
    if args.split == "blocked":
        reasons.append(
            f"{args.folds} folds with gaps of {args.gap:g} s leave stretches of {longest / args.folds:.3g} s"
        )
    if part == "val":
        reasons.append("raise data_args.val or set it to 0, which takes the last epoch")
    if mixed:
        reasons.append(f"{mixed} windows have several labels")
    if broken:
        reasons.append(f"{broken} hold samples that are no numbers")
    return f"{corpus.name}: no {which} window is left: {'; '.join(reasons)}"


def _facts(
    corpus: Corpus,
    chain: Chain,
    parts: Mapping[str, _Part],
    sets: Mapping[str, WindowSet],
    counts: Mapping[str, list[int]],
    fold: int,
    folds: int,
    args: EegDataConfig,
) -> dict[str, Any]:
    names = {"train": "training", "val": "validation", "test": "test"}
    facts: dict[str, Any] = {
        "data": corpus.name + (f", label {corpus.label}" if corpus.label else ""),
        "recordings": f"{len(corpus.recordings):,} of {len({r.subject for r in corpus.recordings}):,} subjects",
        "electrodes": ", ".join(chain.channels),
        "sampling rate": f"{chain.sfreq:g} Hz",
        "preprocessing": _chain_text(chain),
        "split": f"{args.split}, fold {fold + 1} of {folds}",
    }
    for name in PARTS:
        if name in sets:
            one = sets[name]
            classes = ", ".join(f"{label} {n:,}" for label, n in zip(corpus.classes, counts[name]))
            people = len(np.unique(one.meta.subject))
            facts[names[name]] = f"{len(one.meta):,} windows ({classes}) of {people:,} subjects"
            if one.synthetic:
                facts[names[name]] += f", and {one.synthetic:,} synthetic ones by SMOTE"
    # Parts that were taken from one whole tell of the same windows left out.
    mixed = max(part.mixed for part in parts.values())
    broken = sum(part.broken for part in parts.values())
    if mixed:
        facts["several labels"] = f"{mixed:,} windows left out"
    if broken:
        facts["no numbers"] = f"{broken:,} windows left out"
    notes = list(dict.fromkeys([*corpus.notes, *(note for part in parts.values() for note in part.notes)]))
    if notes:
        more = f"; and {len(notes) - 8} more" if len(notes) > 8 else ""
        facts["found"] = "; ".join(notes[:8]) + more
    return facts


def _chain_text(chain: Chain) -> str:
    steps = []
    if chain.reference == "average":
        steps.append("average reference")
    if chain.low or chain.high:
        edges = f"{chain.low:g}-{chain.high:g} Hz" if chain.low and chain.high else (
            f"above {chain.low:g} Hz" if chain.low else f"below {chain.high:g} Hz")  # fmt: skip
        steps.append(f"band-pass {edges}, order {chain.order}, {'causal' if chain.causal else 'zero phase'}")
    return ", ".join(steps) or "none"


def _protocol(
    corpus: Corpus,
    args: EegDataConfig,
    sets: Mapping[str, WindowSet],
    fold: int,
    folds: int,
    elsewhere: bool,
    warning: str,
) -> str:
    tested = len(sets["test"].meta)
    people = len(np.unique(sets["test"].meta.subject))
    if elsewhere:
        how = "data that the model was not trained on"
    else:
        how = {
            "subject": "no subject on both sides",
            "session": "sessions apart, subjects on both sides",
            "trial": "trials apart, subjects on both sides",
            "blocked": f"stretches of time apart by {args.gap:g} s, recordings on both sides",
            "random": "random windows",
        }[args.split]
        how = f"split by {args.split} ({how}), fold {fold + 1} of {folds}"
    scale = {
        "global": "scaled by training windows",
        "subject": "each subject scaled by its own windows without labels, test subjects included",
        "none": "features not scaled",
    }[args.scale]
    text = (
        f"{corpus.name}{f' ({corpus.label})' if corpus.label else ''}, windows of {args.window:g} s, {how}, "
        f"{args.normalize} standardisation, {scale}, all {tested:,} test windows of {people:,} "
        f"subject{'s' if people != 1 else ''}"
    )
    return f"{text}. WARNING, this split leaks: {warning}" if warning else text
