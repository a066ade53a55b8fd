"""The commands `timeseries export` and `timeseries backtest`. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_shared import options
from attn_shared.errors import UserError

_EXPORT = """usage: timeseries export RUN --output FILE.onnx [options]

Writes the trained network as ONNX: scaled values in, the scaled forecast out, for any batch size and, where the model
allows it, any look-back. The file's metadata hold the columns, the scaler, the calendar features and the lengths. The
result is compared with PyTorch at several batch sizes and look-backs before it is written, and both are timed.

  --output FILE        where to write it
  --length KIND        look-back of the file: auto (any, where the model allows it), any, or fixed (default: auto)
  --longest N          longest look-back, in steps (default: four times the trained one)
  --tolerance X        largest difference from PyTorch, as a share of the largest value (default: 1e-5)
  --calls N            calls timed of each, one window a call (default: 200; 0 = none)"""

_KINDS = ("auto", "any", "fixed")


def export(argv: Sequence[str]) -> int:
    """`timeseries export`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_EXPORT)
        return 0 if argv else 2
    parsed = options.split(argv)
    options.check_options(parsed, ["output", "length", "longest", "tolerance", "calls"])
    if len(parsed.words) != 1:
        raise UserError("export takes one run: timeseries export RUN --output FILE.onnx")
    output = parsed.last("output")
    if output is None:
        raise UserError("name the file to write: --output FILE.onnx")
    if not output.endswith(".onnx"):
        raise UserError(f"--output takes the name of a file that ends in .onnx, got {output}")
    length = parsed.last("length") or "auto"
    if length not in _KINDS:
        raise UserError(f"--length takes {', '.join(_KINDS)}, got {length}")
    longest = _whole(parsed.last("longest"), "longest", least=1)
    calls = _whole(parsed.last("calls"), "calls", least=0)
    tolerance = _positive(parsed.last("tolerance") or "1e-5", "tolerance")
    from attn_timeseries.export import export_run

    report = export_run(
        Path(parsed.words[0]),
        Path(output),
        length=length,
        longest=longest,
        tolerance=tolerance,
        calls=200 if calls is None else calls,
    )
    print(report)
    return 0


def _whole(text: str | None, name: str, *, least: int) -> int | None:
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"--{name} takes a whole number from {least} on, got {text}")
    return value


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--{name} takes a positive number, got {text}")
    return value
