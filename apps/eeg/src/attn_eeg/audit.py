"""`eeg audit DATASET`: how much a split flatters, shown by classifiers that learn nothing of the matter.

The nearest neighbour and linear discriminant analysis run under the chosen split and under one by subject. What the
first scores above the second was earned by recognising people and recordings. The verdict does not rest on that gap:
it follows from what the two sides of the split share.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attn_eeg.data.options import EegDataConfig
from attn_shared import options
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from attn_eeg.data.pipeline import Prepared
    from attn_eeg.data.recording import Corpus
    from attn_eeg.data.windows import Meta

PAPER_STRIDE = 0.9140625  # seconds: 117 samples at 128 Hz, the overlap that emotion papers train and test with

_HELP = f"""usage: eeg audit DATASET [--output FILE.json] [--data_args.X VALUE]…

Run the nearest neighbour (1-NN) and linear discriminant analysis (LDA) on band features under a split and under one by
subject, show the gap, and say whether the split leaks. DATASET is a data set's name or a CSV that names recordings.

  --output FILE.json       also write all figures as JSON
  --data_args.split NAME   the split in question: subject, session, trial, blocked or random (default: random, with
                           windows every {PAPER_STRIDE} s unless --data_args.stride says otherwise)

and every other --data_args option of `train`, such as --data_args.label, --data_args.window or --data_args.folds.
Where there is one subject only, the comparison is with stretches of time, with a gap between them."""


@dataclass(frozen=True)
class Shared:
    """What test windows have in common with training, as shares of the test windows of all folds.

    Attributes:
        subject, session, recording: it is one of training, too.
        samples: some of their samples lie in a training window.
    """

    subject: float
    session: float
    recording: float
    samples: float


@dataclass(frozen=True)
class Side:
    """The classifiers under one split.

    Attributes:
        split: its name.
        accuracy: classifier -> the accuracy of each fold.
        shared: with training.
        warning: as tables of this split carry it.
    """

    split: str
    accuracy: dict[str, list[float]]
    shared: Shared
    warning: str

    def text(self, name: str) -> str:
        values = self.accuracy[name]
        sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{sd}"

    def record(self) -> dict[str, Any]:
        rows = {
            name: {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "folds": values,
            }
            for name, values in self.accuracy.items()
        }
        return {"split": self.split, "accuracy": rows, "shared": dataclasses.asdict(self.shared)}


def main(argv: Sequence[str]) -> int:
    """Run the audit; the exit status."""
    if any(token in ("-h", "--help") for token in argv):
        print(_HELP)
        return 0
    parsed = options.split(argv)
    known = list(options.dataclass_options("data_args", EegDataConfig))
    names = [option.name for option in known]
    options.check_options(parsed, [*names, "output"])
    if len(parsed.words) != 1:
        raise UserError(f"audit takes one data set, got {len(parsed.words)}; `eeg data list` shows them")
    output = parsed.take("output")
    values = options.typed(known, {}, [f"--{name}={text}" for name, text in parsed.options])
    args = EegDataConfig(**{name.removeprefix("data_args."): value for name, value in values.items()})
    given = {name for name, _ in parsed.options}
    if "data_args.split" not in given:
        args.split = "random"
    if args.split == "random" and "data_args.stride" not in given:
        args.stride = PAPER_STRIDE
    found = audit(parsed.words[0], args)
    print(text_of(found))
    if output is not None:
        from attn_shared.runs import write_atomically

        path = Path(output)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror or error}") from None
    return 0


def audit(data: str, args: EegDataConfig) -> dict[str, Any]:
    """All figures and the verdict, as plain values.

    Args:
        data: name of a data set, or path of a CSV that names recordings.
        args: the split in question; `val`, `keep` and `balance` do not matter and are left aside.

    Raises:
        UserError: no such data, or options under which nothing can be split.
    """
    from attn_eeg.data.corpus import load_corpus

    if args.features != "bde":
        raise UserError("audit compares band features; leave data_args.features at bde")
    args = dataclasses.replace(args, val=0.0, keep=1.0, balance="none")
    corpus = load_corpus(data, args)
    people = len({recording.subject for recording in corpus.recordings})
    split: Literal["subject", "blocked"] = "subject" if people > 1 else "blocked"
    usual = dataclasses.replace(
        args, split=split, folds=min(args.folds or people, people) if split == "subject" else args.folds or 6
    )
    chosen, meta = _side(corpus, args)
    reference = _side(corpus, usual)[0] if args.split != split else None
    reasons = _reasons(meta, chosen)
    verdict = _verdict(chosen, reference, reasons)
    recordings = len(set(zip(meta.subject.tolist(), meta.session.tolist(), meta.trial.tolist())))
    return {
        "data": corpus.name,
        "label": corpus.label,
        "classes": list(corpus.classes),
        "windows": len(meta),
        "subjects": people,
        "recordings": recordings,
        "window_s": args.window,
        "stride_s": args.stride,
        "chosen": chosen.record(),
        "reference": reference.record() if reference is not None else None,
        "leaks": bool(reasons),
        "reasons": reasons,
        "verdict": verdict,
        "data_args": dataclasses.asdict(args),
    }


def text_of(found: dict[str, Any]) -> str:
    """What the command prints."""
    sides = [side for side in (found["chosen"], found["reference"]) if side is not None]
    head = ["classifier", *(f"accuracy, {_title(side['split'])}" for side in sides)]
    head += ["gap"] if len(sides) == 2 else []
    rows = []
    for name in found["chosen"]["accuracy"]:
        means = [side["accuracy"][name]["mean"] for side in sides]
        cells = [
            f"{one['mean']:.3f}" + (f" ± {one['sd']:.3f}" if one["sd"] is not None else "")
            for one in (side["accuracy"][name] for side in sides)
        ]
        rows.append([name, *cells, *([f"{means[0] - means[1]:+.3f}"] if len(sides) == 2 else [])])
    common = {
        "subject": "test windows of training's subjects",
        "recording": "test windows of training's recordings",
        "samples": "test windows that overlap training",
    }
    for key, what in common.items():
        rows.append([what, *(f"{side['shared'][key]:.0%}" for side in sides), *([""] if len(sides) == 2 else [])])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()

    label = f" ({found['label']})" if found["label"] else ""
    title = (
        f"{found['data']}{label}: {found['windows']:,} windows of "
        f"{found['window_s']:g} s every {found['stride_s']:.4g} s, {_count(found['recordings'], 'recording')}, "
        f"{_count(found['subjects'], 'subject')}, {len(found['classes'])} classes; "
        "mean ± standard deviation over folds"
    )
    return "\n".join([title, "", line(head), *map(line, rows), "", found["verdict"]])


def _title(split: str) -> str:
    return {"random": "random split", "blocked": "split by time"}.get(split, f"split by {split}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _side(corpus: Corpus, args: EegDataConfig) -> tuple[Side, Meta]:
    """The classifiers in every fold of a split, and the windows of all test parts together."""
    from attn_eeg.baselines import BASELINES, predictions
    from attn_eeg.data.pipeline import prepare
    from attn_eeg.data.windows import Meta
    from attn_eeg.metrics import figures

    accuracy: dict[str, list[float]] = {one.name: [] for one in BASELINES}
    tested: list[Meta] = []
    shares: list[tuple[float, ...]] = []
    fold, folds = 0, 1
    while fold < folds:
        prepared = prepare(args, corpus, fold)
        train, test = prepared.train, prepared.test
        assert train is not None
        assert test is not None
        folds, warning = prepared.folds, prepared.warning
        for one in BASELINES:
            accuracy[one.name].append(figures(predictions(one, train, test))["accuracy"])
        tested.append(test.meta)
        shares.append(_shares(prepared))
        fold += 1
    weights = [len(meta) for meta in tested]
    shared = [sum(w * s[i] for w, s in zip(weights, shares)) / sum(weights) for i in range(4)]
    return Side(args.split, accuracy, Shared(*shared), warning), Meta.join(tested)


def _shares(prepared: Prepared) -> tuple[float, ...]:
    """Shares of the test windows whose subject, session, recording or samples are in training, too."""
    import numpy as np

    assert prepared.train is not None
    assert prepared.test is not None
    train, test = prepared.train.meta, prepared.test.meta
    found = []
    for level in ("subject", "session", "recording"):
        seen = set(_names(train, level))
        found.append(float(np.mean([name in seen for name in _names(test, level)])))
    starts: dict[Any, np.ndarray] = {}
    ids = np.array(["\0".join(name) for name in _names(train, "recording")])
    for name in np.unique(ids):
        starts[name] = np.sort(train.start[ids == name])
    length = float((train.stop - train.start).max())
    overlaps = []
    for name, start, stop in zip(_names(test, "recording"), test.start, test.stop):
        others = starts.get("\0".join(name), np.zeros(0))
        # Windows are of one length, so the nearest start from below `stop` reaches furthest.
        place = int(np.searchsorted(others, stop - 1e-6)) - 1
        overlaps.append(place >= 0 and others[place] + length > start + 1e-6)
    return *found, float(np.mean(overlaps))


def _names(meta: Meta, level: str) -> list[tuple[str, ...]]:
    columns = {"subject": 1, "session": 2, "recording": 3}[level]
    return list(zip(*(map(str, column) for column in (meta.subject, meta.session, meta.trial)[:columns])))


def _reasons(meta: Meta, side: Side) -> list[str]:
    """Why a split leaks, a clause each; empty where it lets nothing through."""
    reasons = []
    if side.shared.samples:
        reasons.append(f"{side.shared.samples:.0%} of the test windows share samples with training windows")
    for level in ("recording", "session", "subject"):
        share = getattr(side.shared, level)
        labels: dict[tuple[str, ...], set[int]] = {}
        for name, label in zip(_names(meta, level), meta.label.tolist()):
            labels.setdefault(name, set()).add(label)
        if share and all(len(own) == 1 for own in labels.values()):
            reasons.append(
                f"every {level} has one label and {share:.0%} of the test windows are of {level}s that training has "
                f"seen, so recognising the {level} is knowing the label"
            )
    if not reasons and side.warning:
        reasons.append(side.warning)
    return reasons


def _verdict(chosen: Side, reference: Side | None, reasons: Sequence[str]) -> str:
    gap = ""
    if reference is not None:
        unseen = "on subjects it has not seen" if reference.split == "subject" else "across a gap in time"
        gap = (
            f" The nearest neighbour, which only recognises, scores {chosen.text('1-nn')} here and "
            f"{reference.text('1-nn')} {unseen}; guessing scores {reference.text('majority')}."
        )
    name = f"The {_title(chosen.split)}"
    if reasons:
        return f"{name} LEAKS: {'; '.join(reasons)}.{gap}"
    if chosen.shared.subject:
        return (
            f"{name} does not leak, but its subjects are on both sides: figures hold for people that training has "
            f"seen.{gap}"
        )
    return f"{name} does not leak: no subject is on both sides."
