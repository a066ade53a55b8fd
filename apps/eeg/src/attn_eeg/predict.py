"""Classes for users' recordings: EDF and others in; a CSV of windows with times and probabilities out."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_eeg.data.options import EegDataConfig
from attn_eeg.data.pipeline import encode
from attn_eeg.data.readers import SUFFIXES, read_file
from attn_eeg.data.windows import WindowSet
from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse
from attn_shared.runs import write_atomically

if TYPE_CHECKING:
    from attn_eeg.task import EegTask

_FEW = 10


def predict_files(task: EegTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Classify every window of each recording.

    Writes `<stem>_classes.csv` for each input: `start_s` and `end_s` in seconds from the start of the recording, a
    column `p_<class>` of each class, and the class `predicted`. A folder stands for the recordings in it. Windows over
    samples that are no numbers have no row.

    Raises:
        UserError: names every file that could not be read and why; the others have been written all the same.
    """
    from attn_eeg.task import data_args

    args = data_args(task.config)
    stride, interpolate = float(options.get("stride") or 0.0), bool(options.get("interpolate"))
    if stride < 0:
        raise UserError(f"--stride is {stride:g}; give seconds above 0, or 0 for the stride of evaluation")
    args = dataclasses.replace(args, rate=float(options.get("rate") or args.rate))
    paths = _files(inputs)
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same file; rename one")
    written, failed = one_by_one(
        paths, lambda path: [_predict(task, path, args, output, stride, interpolate)], lambda path: path.name
    )
    others = f"the other files were done ({output})" if written else ""
    refuse(failed, len(paths), what="files", done="classified", others=others)
    return written


def _predict(task: EegTask, path: Path, args: EegDataConfig, output: Path, stride: float, interpolate: bool) -> Path:
    """Write the CSV of one file and say on stderr what was found; the CSV."""
    recording = read_file(path, channels=args.channels, rate=args.rate)
    wanted = task.data_state["chain"]["channels"]
    try:
        windows, notes = encode([recording], args, task.data_state, stride=stride or None, interpolate=interpolate)
    except UserError as error:
        if interpolate or set(wanted) <= set(recording.channels):
            raise
        raise UserError(f"{error}; --interpolate true computes up to a third of all from their neighbours") from None
    probability = classify(task, windows)
    target = output / f"{path.stem}_classes.csv"
    write_atomically(target, table(windows, probability))
    if recording.sfreq != windows.sfreq:
        notes.append(f"resampled from {recording.sfreq:g} to {windows.sfreq:g} Hz")
    extra = [name for name in recording.channels if name not in wanted]
    if extra:
        notes.append(f"not used, as the model does not know them: {', '.join(extra)}")
    if args.scale == "subject" and len(windows) < _FEW:
        notes.append(f"a recording is scaled by its own windows, and {len(windows)} are few to know its level from")
    counts = np.bincount(probability.argmax(axis=1), minlength=len(windows.classes))
    said = ", ".join(f"{name} {count:,}" for name, count in zip(windows.classes, counts))
    print(f"{path.name}: {len(windows):,} windows ({said})", file=sys.stderr)
    for note in dict.fromkeys(notes):
        print(f"{path.name}: {note.removeprefix(f'{path}: ')}", file=sys.stderr)
    return target


def _files(inputs: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"{path} holds none of the files that can be read: {', '.join(SUFFIXES)}")
        found += inside
    return found


@torch.no_grad()
def classify(task: EegTask, windows: WindowSet) -> np.ndarray:
    """(N, K) probabilities of the windows."""
    from attn_eeg.task import batches

    task.eval()
    parts = [task.forward_batch(task.here(batch)).double().softmax(dim=-1).cpu() for batch in batches(windows)]
    return np.asarray(torch.cat(parts).numpy())


def table(windows: WindowSet, probability: np.ndarray) -> str:
    """The CSV of a recording: a row a window."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["start_s", "end_s", *(f"p_{name}" for name in windows.classes), "predicted"])
    rows = zip(windows.meta.start, windows.meta.stop, probability)
    for start, stop, shares in rows:
        chosen = windows.classes[int(shares.argmax())]
        writer.writerow([f"{start:.10g}", f"{stop:.10g}", *(f"{p:.6f}" for p in shares), chosen])
    return out.getvalue()
