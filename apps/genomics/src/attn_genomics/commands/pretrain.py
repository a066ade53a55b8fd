"""The command `genomics pretrain`: `train` of the kind genome. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from attn_shared import options
from attn_shared.cli import run
from attn_shared.errors import UserError

_HELP = """usage: genomics pretrain [options]

Train a language model on a genome, evaluate the best epoch, write a report: `genomics train --kind genome`. A run of it
is what `generate`, `score-variants`, `mutagenesis` and `predict` take, and what `train --task_args.start RUN` starts
from."""


def main(argv: Sequence[str]) -> int:
    """`genomics pretrain`; the exit status."""
    from attn_genomics.cli import APP

    words = list(argv)
    if any(word in ("-h", "--help") for word in words):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            status = run(APP, ["train", *words, "--kind", "genome"])
        if not status:
            print(_HELP + "\n\noptions:" + shown.getvalue().partition("\n\noptions:")[2], end="")
        return status
    parsed = options.split(words, flags=["print_config"])
    kind, resumed = parsed.last("kind"), parsed.last("resume")
    if kind not in (None, "genome"):
        raise UserError(f"pretrain is of the kind genome, got --kind {kind}; use `genomics train`")
    if resumed is None:
        return run(APP, ["train", *words, *([] if kind else ["--kind", "genome"])])
    if Path(resumed).exists():
        from attn_shared import trainer

        if trainer.saved_kind(APP, Path(resumed)).name != "genome":
            raise UserError(f"{resumed} classifies sequences; go on with it by `genomics train --resume {resumed}`")
    return run(APP, ["train", *words])
