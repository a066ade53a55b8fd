"""The command `recsys export`. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_shared import options
from attn_shared.errors import UserError
from attn_shared.options import Parsed

_USAGE = """usage: recsys export RUN --output FILE.onnx [options]

Writes the trained click model as ONNX: numbers of names in, log odds and probability out, for any number of rows. The
file's metadata hold the vocabularies and scalers. The result is compared with PyTorch on 1, 2, 7 and 500 rows before it
is written, and both are timed.

  --output FILE        where to write it
  --tolerance X        largest difference of log odds from PyTorch, as a share of the largest (default: 1e-5)
  --calls N            calls timed of each (default: 200; 0 = none)
  --candidates N       rows a timed call (default: 500)"""


def main(argv: Sequence[str]) -> int:
    """`recsys export`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_USAGE)
        return 0 if argv else 2
    parsed = options.split(argv)
    options.check_options(parsed, ["output", "tolerance", "calls", "candidates"])
    if len(parsed.words) != 1:
        raise UserError("export takes one run: recsys export RUN --output FILE.onnx")
    output = parsed.last("output")
    if output is None:
        raise UserError("name the file to write: --output FILE.onnx")
    if not output.endswith(".onnx"):
        raise UserError(f"--output takes the name of a file that ends in .onnx, got {output}")
    tolerance = _number(parsed, "tolerance", 1e-5)
    calls, candidates = _whole(parsed, "calls", 200, 0), _whole(parsed, "candidates", 500, 1)

    from attn_recsys.clicks.export import export_run

    report = export_run(
        Path(parsed.words[0]), Path(output).expanduser(), tolerance=tolerance, calls=calls, candidates=candidates
    )
    print(report)
    return 0


def _whole(parsed: Parsed, name: str, default: int, least: int) -> int:
    text = parsed.last(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"--{name} takes a whole number, {least} or more, got {text}")
    return int(text)


def _number(parsed: Parsed, name: str, default: float) -> float:
    text = parsed.last(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"--{name} takes a number above 0, got {text}")
    return value
