"""The command `recsys recommend`. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from attn_recsys.items.options import ItemsPredictOptions
from attn_shared import options
from attn_shared.errors import UserError
from attn_shared.options import Option, Parsed

_USAGE = """usage: recsys recommend RUN --users NAMES [options]

The best items of each user, with scores and, from models that read a graph, the ways through it that lead there.
RUN is a run of a model that ranks items, or a checkpoint folder. A user whom the model was not trained with gets items
by his --history where the model allows it, else popular ones, and the output says so.

  --users NAMES        users, separated by commas; or a file with one a line or a column `user`; or all. Without it,
                       those of --history
  --k N                items a user (default: 10)
  --hide WHAT          what is not recommended: all = what the user had in the data, train = what the model was trained
                       with only, none (default: all)
  --paths N            ways through the graph shown for each item (default: 1)
  --history FILE       table of what users had, columns user and item
  --output FILE        write .csv or .json instead of printing"""


def main(argv: Sequence[str]) -> int:
    """`recsys recommend`; the exit status."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_USAGE)
        return 0 if argv else 2
    own = [
        Option(option.name.lstrip("."), option.type, option.default, option.help)
        for option in options.dataclass_options("", ItemsPredictOptions)
    ]
    parsed = options.split(argv)
    options.check_options(parsed, ["users", "output", *(option.name for option in own)])
    if len(parsed.words) != 1:
        raise UserError("recommend takes one run: recsys recommend RUN --users NAMES")
    users, output = parsed.take("users"), parsed.take("output")
    if options.MISSING in (users, output):
        raise UserError("--users and --output need a value")
    if output is not None and not output.endswith((".csv", ".json")):
        raise UserError(f"--output takes the name of a file that ends in .csv or .json, got {output}")
    chosen = options.typed(own, {}, _lines(parsed))
    if users is None and not chosen["history"]:
        raise UserError("name the users: --users a,b, or a file, or all")
    run = Path(parsed.words[0])

    from attn_recsys.cli import APP
    from attn_recsys.items import recommend
    from attn_shared import trainer
    from attn_shared.runs import write_atomically

    if trainer.saved_kind(APP, run).name != "items":
        raise UserError(f"{run} is a model that predicts clicks; recommend takes one that ranks items")
    task, _ = trainer.load_task(APP, run)
    recommender = recommend.Recommender(task)  # type: ignore[arg-type]
    history = recommend.read_history(chosen["history"]) if chosen["history"] else None
    if users is None:
        names = list(history or {})
    elif users == "all":
        names = list(recommender.known.users)
    elif Path(users).expanduser().is_file():
        names = recommend.read_users(Path(users).expanduser())
    else:
        names = [name.strip() for name in users.split(",") if name.strip()]
    if not names:
        raise UserError("name the users: --users a,b, or a file, or all")
    found = recommender.recommend(names, k=chosen["k"], hide=chosen["hide"], paths=chosen["paths"], history=history)
    if output is None:
        _print(found)
    else:
        Path(output).expanduser().parent.mkdir(parents=True, exist_ok=True)
        text = recommend.as_json(found) if output.endswith(".json") else recommend.as_csv(found)
        write_atomically(Path(output).expanduser(), text)
        print(output)
    for note in recommender.notes:
        print(note, file=sys.stderr)
    return 0


def _lines(parsed: Parsed) -> list[str]:
    return [f"--{name}={text}" for name, text in parsed.options]


def _print(found: Sequence[object]) -> None:
    from attn_shared.cli import table

    rows = []
    for one in found:
        reasons = "; ".join(f"{text} ({weight:.2g})" for text, weight in one.reasons)  # type: ignore[attr-defined]
        rows.append([one.user, str(one.rank), one.item, f"{one.score:.4g}", one.by, reasons])  # type: ignore[attr-defined]
    print(table(["user", "rank", "item", "score", "by", "why"], rows))
