"""The `core-attn` command. Torch is imported only once there is something to do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core_attn.naming import nearest
from core_attn.terminal import print_anything

if TYPE_CHECKING:
    from core_attn.contract import MechanismInfo

PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")
SUITES = ("exact", "local", "sparse", "linear")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        head, _, rest = message.partition("unrecognized arguments: ")
        if not head and rest:
            wrong = rest.split()[0].partition("=")[0]
            close = nearest(wrong, [o for action in self._actions for o in action.option_strings], n=1)
            message = f"unknown option {wrong}, did you mean {close[0]}" if close else f"unknown option {wrong}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 when a check failed, 2 for a mistake of the user's."""
    print_anything()
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else argv
    commands: dict[str, Any] = parser.get_default("commands")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        close = nearest(arguments[0], commands, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(commands)}"
        print(f"core-attn: unknown command {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    if arguments and arguments[0] in commands:
        # The subcommand's own parser, so that an error names its options.
        sub: argparse.ArgumentParser = commands[arguments[0]]
        args = sub.parse_args(arguments[1:])
        try:
            return int(args.run(args))
        except (ValueError, OSError) as error:
            print(f"core-attn: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            return 0
    parser.parse_args(arguments)
    parser.print_help()
    return 0 if arguments else 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="core-attn",
        description="Published attention mechanisms behind one contract: list, describe, check, explain, bench.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    p = command("list", "the registered mechanisms and what they can do", _list)
    p.add_argument("--pattern", action="append", choices=PATTERNS, help="only those with this pattern; may be repeated")
    p.add_argument("--grid-rank", type=int, help="only those that use grids of this rank (2: images)")
    for flag in ("decodes", "constant-state", "padding", "maps", "stochastic"):
        p.add_argument(
            f"--{flag}", action=argparse.BooleanOptionalAction, default=None, help="only those that do (not)"
        )
    p.add_argument("--format", choices=("table", "json"), default="table")

    text = "one mechanism: paper, patterns, options, operator, backends, einsums with FLOPs and bytes"
    p = command("describe", text, _describe)
    p.add_argument("name", help="registered name, or path/to/file.py:ClassName (runs that file)")
    p.add_argument("--format", choices=("text", "json"), default="text")

    p = command("check", "test a mechanism against the contract; exit status 1 if it fails", _check)
    p.add_argument("name", nargs="+", help="registered name, or path/to/file.py:ClassName (runs that file)")
    p.add_argument("--only", type=_names, help="names of checks, separated by commas")
    p.add_argument("--skip", type=_names, default=[], help="names of checks to leave out, separated by commas")
    p.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    p.add_argument("--option", type=_option, action="append", default=[], metavar="KEY=VALUE", help="of the mechanism")
    p.add_argument("--grid-rank", type=int, help="rank of the inputs' grids (default: all that it declares)")
    p.add_argument("--format", choices=("text", "json"), default="text")

    p = command("explain", "which backend would run for a call, and why each other would not", _explain)
    p.add_argument("name", help="registered name of a mechanism, or of an operator")
    p.add_argument("--length", type=int, required=True, help="queries L")
    p.add_argument("--context", type=int, help="keys M (default: L)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--key-heads", type=int, help="heads of keys and values, in grouped attention")
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--causal", action="store_true")
    p.add_argument("--training", action="store_true", help="gradients will be asked for")
    p.add_argument("--mask", action="store_true", help="a boolean mask is given")
    p.add_argument("--bias", action="store_true", help="an additive bias is given")
    p.add_argument("--key-padding", action="store_true", help="a key padding mask is given")
    p.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="sliding window")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--format", choices=("text", "json"), default="text")

    text = "speed and memory on this machine: mechanisms beside softmax attention, or a suite beside its alternatives"
    p = command("bench", text, _bench)
    p.add_argument(
        "name",
        nargs="*",
        help="registered names (default: all), or suites: exact (backends of softmax attention beside SDPA), local "
        "(windows and neighbourhoods beside masked SDPA, local-attention, natten), sparse (block-sparse and selected "
        "keys beside masked SDPA), linear (the linear and recurrent family beside SDPA); suites run on the CPU in one "
        "thread",
    )
    p.add_argument("--lengths", type=_lengths, help="separated by commas (default: 256,1024,4096, or the suite's own)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, help="default: 8, in the suite linear 4")
    p.add_argument("--head-dim", type=int, help="channels of a head (default: 32, in suites 64)")
    p.add_argument("--dtype", help="default: float32; the suite exact measures bfloat16 too")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--causal", action="store_true", help="only mechanisms with causal self attention")
    p.add_argument("--rounds", type=int, default=5, help="timings a row; the median counts, in suites the least")
    p.add_argument("--save", type=Path, metavar="DIR", help="also write mechanisms.md (or SUITE.md) and .json there")

    parser.set_defaults(commands=dict(subparsers.choices))
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from core_attn import __version__

        parser.exit(0, f"core-attn {__version__}\n")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str) -> list[int]:
    lengths = [int(n) for n in _names(text)]
    if not lengths or min(lengths) < 1:
        raise ValueError(text)
    return lengths


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"an option is KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:  # a bare word
        return key, value


def _list(args: argparse.Namespace) -> int:
    from core_attn import api

    infos = api.list(
        pattern=args.pattern,
        grid_rank=args.grid_rank,
        decodes=args.decodes,
        constant_state=args.constant_state,
        padding=args.padding,
        maps=args.maps,
        stochastic=args.stochastic,
    )
    if args.format == "json":
        print(json.dumps([api.facts(info) for info in infos], indent=2))
    else:
        print(_table(infos))
    return 0


def _table(infos: list[MechanismInfo]) -> str:
    head = ["name", "source", "year", *[p.replace("_", " ") for p in PATTERNS]]
    head += ["time", "memory", "decodes", "padding", "maps", "paper"]
    rows = [
        [
            info.name,
            info.source or "-",
            str(info.year),
            *["yes" if p in info.patterns else "-" for p in PATTERNS],
            str(info.time),
            str(info.memory),
            "O(1) state" if info.constant_state else "yes" if info.decodes else "-",
            "yes" if info.padding else "-",
            "yes" if info.maps else "-",
            info.title,
        ]
        for info in infos
    ]
    return columns(head, rows) + f"\n\n{len(rows)} mechanism{'' if len(rows) == 1 else 's'}"


def columns(head: list[str], rows: list[list[str]]) -> str:
    """Plain text columns under a head."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _describe(args: argparse.Namespace) -> int:
    from core_attn import api

    description = api.describe(args.name)
    print(json.dumps(description.to_dict(), indent=2) if args.format == "json" else description)
    return 0


def _check(args: argparse.Namespace) -> int:
    from core_attn.testing import check_mechanism

    reports = []
    for name in args.name:
        report = check_mechanism(
            name,
            only=args.only,
            skip=args.skip,
            seed=args.seed,
            raise_on_failure=False,
            grid_rank=args.grid_rank,
            **dict(args.option),
        )
        reports.append(report)
        if args.format == "text":
            print(report, flush=True)
    if args.format == "json":
        print(json.dumps([r.to_dict() for r in reports], indent=2))
    return 0 if all(r.passed for r in reports) else 1


def _explain(args: argparse.Namespace) -> int:
    from core_attn import api

    explanation = api.explain(
        args.name,
        length=args.length,
        context=args.context,
        batch=args.batch,
        heads=args.heads,
        key_heads=args.key_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        device=args.device,
        causal=args.causal,
        requires_grad=args.training,
        mask=args.mask,
        bias=args.bias,
        key_padding=args.key_padding,
        window=None if args.window is None else tuple(args.window),
        dropout=args.dropout,
    )
    if args.format == "json":
        print(json.dumps([c.__dict__ for c in explanation.choices], indent=2))
    else:
        print(explanation)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from core_attn import bench

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    suites = [name for name in args.name if name in SUITES]
    if suites and (len(suites) < len(args.name) or args.causal or args.device != "cpu"):
        raise ValueError(
            f"suites ({', '.join(SUITES)}) are measured apart from mechanisms, on the CPU, with causal and noncausal "
            f"cases of their own; run core-attn bench {' '.join(suites)}"
        )
    for suite in suites:
        found = bench.measure_suite(
            suite,
            lengths=args.lengths or (),
            batch=args.batch,
            heads=args.heads,
            head_dim=args.head_dim or 64,
            dtype=args.dtype,
            rounds=args.rounds,
            progress=progress,
        )
        print(bench.suite_heading(found))
        print(bench.suite_table(found))
        if args.save is not None:
            print("saved " + ", ".join(str(path) for path in bench.save_suite(found, args.save)))
    if suites:
        return 0
    rows = bench.measure(
        args.name,
        lengths=args.lengths or (256, 1024, 4096),
        batch=args.batch,
        heads=8 if args.heads is None else args.heads,
        head_dim=args.head_dim or 32,
        dtype=args.dtype or "float32",
        device=args.device,
        causal=args.causal,
        rounds=args.rounds,
        progress=progress,
    )
    print(bench.heading(rows))
    print(bench.table(rows))
    if args.save is not None:
        print("saved " + ", ".join(str(path) for path in bench.save(rows, args.save)))
    return 0
