"""The command line of every app: `run(app, argv)`. Torch is imported only when work starts."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attn_shared import options
from attn_shared.app import App, Kind, ModelCard, load
from attn_shared.config import RunConfig, config_to_dict
from attn_shared.errors import UserError
from attn_shared.options import Option, Parsed
from core_attn.naming import UnknownNameError, unknown
from core_attn.terminal import print_anything

COMMANDS = {
    "train": "train a model, evaluate the best epoch, write a report",
    "eval": "figures of a trained model on a split",
    "predict": "read files, write predictions",
    "compare": "train models or attention mechanisms on equal terms, one table",
    "data": "list data sets, fetch one, check one or a file of your own",
    "models": "list models, or describe one",
}


def run(app: App, argv: Sequence[str] | None = None) -> int:
    """An app's whole `main`: 0 when all went well, 2 when the user can put something right, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    # Read by OpenMP when torch is imported. Threads that spin while they wait made a minute's training take ten where
    # cores are shared; sleeping threads cost nothing measurable where they are not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    handlers: dict[str, Callable[[App, list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "compare": _compare,
        "data": _data,
        "models": _models,
    }
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview(app))
            return 0 if words else 2
        name, rest = words[0], words[1:]
        if name == "eval" and any(word.partition("=")[0] in app.eval_flags for word in rest):
            name = "score"
        if name in handlers:
            return handlers[name](app, rest)
        if name in app.commands:
            return int(load(app.commands[name][0])(rest) or 0)
        raise unknown("command", name, [*handlers, *app.commands])
    except (UserError, UnknownNameError) as error:
        print(f"{app.name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{app.name}: interrupted", file=sys.stderr)
        return 130


def _overview(app: App) -> str:
    commands = {**COMMANDS, **{name: text for name, (_, text) in app.commands.items()}}
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {text}" for name, text in commands.items()]
    examples = [
        "train",
        *(f"train --model {kind.default_model} --data {kind.default_data}" for kind in app.kinds),
        f"eval runs/{app.name}/…/<time>",
    ]
    return "\n".join(
        [
            f"{app.name}: {app.title}",
            "",
            f"usage: {app.name} COMMAND …",
            "",
            *lines,
            "",
            f"`{app.name} COMMAND --help` says more. Examples:",
            *(f"  {app.name} {example}" for example in examples),
        ]
    )


def _wants_help(argv: Sequence[str]) -> bool:
    return any(token in ("-h", "--help") for token in argv)


# -- train and compare ------------------------------------------------------------------------------------------------

_RUN_EXTRA = (
    ("config FILE.yaml", "read options from a file; the command line wins over it"),
    ("print_config", "print the configuration that the other arguments make, as YAML, and stop"),
    ("preset auto|none", "the app's own settings for this model and data set (default: auto)"),
    ("mixer_args.X VALUE", "option X of the attention mechanism"),
)


def _train(app: App, argv: list[str]) -> int:
    if _wants_help(argv):
        extra = (*_RUN_EXTRA, ("resume RUN", "go on with an interrupted run; only --trainer options can change"))
        return _run_help(app, argv, "train", "Train a model, evaluate the best epoch, write a report.", extra)
    parsed = options.split(argv, flags=["print_config"])
    _no_words(parsed, "train")
    source = parsed.last("resume")
    if source is not None:
        return _resume(app, parsed)
    config = options.resolve(app, parsed, extra=["print_config", "resume"])
    if parsed.last("print_config"):
        return _print_config(config)
    return _work(app, config, None)


def _resume(app: App, parsed: Parsed) -> int:
    known = _all_names(app)
    source = parsed.take("resume")
    options.check_options(Parsed(options=[("resume", source or "")]), ["resume"])
    if source == options.MISSING:
        raise UserError("--resume needs a run folder")
    names = [name for name in known if name.startswith("trainer.")]
    for name, _ in parsed.options:
        if name not in names and (
            name in known or name.startswith(("model_args.", "data_args.", "task_args.", "mixer_args"))
        ):
            raise UserError(f"--{name} cannot change when a run is resumed; only --trainer options can")
    show = parsed.take("print_config")
    options.check_options(parsed, names)
    assert source is not None
    _must_exist(source)
    from attn_shared import trainer

    config = trainer.resume_config(app, Path(source), dict(parsed.options))
    return _print_config(config) if show else _work(app, config, Path(source))


def _work(app: App, config: RunConfig, resume: Path | None) -> int:
    if config.trainer.devices > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's hints; must stand before torch is imported
    from attn_shared import trainer

    first = not int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    try:
        folder = trainer.train(app, config, resume=resume)
        if first:
            print(folder)
        return 0
    except trainer.Interrupted as stop:
        if stop.run is not None:
            command = shlex.join([app.name, "train", "--resume", str(stop.run)])
            print(f"stopped at step {stop.step}; go on with: {command}", file=sys.stderr)
        return 130


def _compare(app: App, argv: list[str]) -> int:
    if _wants_help(argv):
        extra = (
            ("mixer A,B,…", "attention mechanisms to compare; `own` is the paper's"),
            ("model A,B,…", "models to compare"),
            ("seeds N", "train each with N seeds, from --seed on (default: 1)"),
            ("output DIR", "where the table goes (default: beside the runs)"),
            ("own_settings", "each model with its own preset for data and budget too, as papers compare"),
            *_RUN_EXTRA,
        )
        return _run_help(app, argv, "compare", "Train on equal terms, evaluate on the same split, one table.", extra)
    parsed = options.split(argv, flags=["print_config", "own_settings"])
    _no_words(parsed, "compare")
    own_settings = parsed.take("own_settings") is not None
    models = _names(parsed.take("model")) or None
    mixers = _names(parsed.take("mixer"))
    seeds, output = parsed.take("seeds") or "1", parsed.take("output")
    if not seeds.isdecimal() or int(seeds) < 1:
        raise UserError(f"--seeds takes a whole number from 1 on, got {seeds}")
    if options.MISSING in (output, *mixers, *(models or ())):
        raise UserError("--model, --mixer and --output need a value")
    for model in models or ():
        app.model(model)
    config = options.resolve(app, parsed, model=models[0] if models else None, extra=["print_config"])
    if parsed.last("print_config"):
        return _print_config(config)
    settings = {name: options.resolve(app, parsed, model=name) for name in models or ()} if own_settings else None
    from attn_shared.compare import compare

    print(
        compare(
            app,
            config,
            mixers=[None if name == "own" else name for name in mixers] or [config.mixer],
            models=models,
            seeds=int(seeds),
            output=Path(output) if output else None,
            settings=settings,
        )
    )
    return 0


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _print_config(config: RunConfig) -> int:
    import yaml

    print(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), end="")
    return 0


def _run_help(app: App, argv: Sequence[str], command: str, text: str, extra: Sequence[tuple[str, str]]) -> int:
    named = options.split([token for token in argv if token not in ("-h", "--help")], flags=["print_config"])
    chosen = next(iter(_names(named.last("model"))), None)
    model, data, kind = app.defaults(chosen, named.last("data"), named.last("kind"))
    card = app.model(model)
    print(f"usage: {app.name} {command} [options]\n\n{text}\n\noptions:")
    _print_options(extra)
    groups: dict[str, list[Option]] = {}
    for option in options.run_options(app, model, data, kind):
        if command == "compare" and option.name in ("model", "mixer"):
            continue
        groups.setdefault(option.name.partition(".")[0] if "." in option.name else "", []).append(option)
    _print_options([_entry(option) for option in groups.pop("")])
    titles = {"model_args": f"options of the model {card.name} (--model NAME shows another's)"}
    titles |= {"data_args": "options of the data", "task_args": "options of the task"}
    titles |= {"trainer": "training", "optim": "optimiser"}
    if app.several:
        titles["data_args"] += f" ({kind.name}: {kind.title}; --data NAME shows another kind's)"
    for head, members in groups.items():
        print(f"\n{titles.get(head, head)}:")
        _print_options([_entry(option) for option in members])
    return 0


def _entry(option: Option) -> tuple[str, str]:
    kind = options.type_name(option.type)
    default = "" if option.default is None or option.default == "" else f" (default: {_show(option.default)})"
    return (
        f"{option.name} {option.metavar or kind}",
        f"{option.help.rstrip('.') if default else option.help}{default}".strip(),
    )


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def _print_options(entries: Sequence[tuple[str, str]]) -> None:
    import shutil
    import textwrap

    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    for name, text in entries:
        head = f"  --{name}"
        lines = textwrap.wrap(text, max(30, width - 34)) or [""]
        if len(head) > 32:
            print(head)
            head = ""
        print(f"{head:<34}{lines[0]}".rstrip())
        for line in lines[1:]:
            print(f"{'':34}{line}")


def _no_words(parsed: Parsed, command: str) -> None:
    if parsed.words:
        raise UserError(
            f"{command} takes options only, got {parsed.words[0]!r}; did you mean --data {parsed.words[0]}?"
        )


def _must_exist(source: str) -> None:
    """Before torch is imported: is there anything at all?"""
    if not Path(source).exists() and not any(
        Path(source).with_name(Path(source).name + end).exists() for end in (".new", ".old")
    ):
        raise UserError(f"there is no run or checkpoint at {source}; `train` prints the folder it made")


# -- eval and predict -------------------------------------------------------------------------------------------------


def _eval(app: App, argv: list[str]) -> int:
    if _wants_help(argv):
        print(
            f"usage: {app.name} eval RUN [options]\n\n"
            "Figures of a trained model: RUN is a run folder (its best checkpoint) or a checkpoint folder.\n\noptions:"
        )
        _print_options(
            [
                ("data NAME_OR_PATH", "other data, under the statistics the model was trained with"),
                ("split NAME", "train, val or test (default: test)"),
                ("output FILE", "also write the result as JSON"),
                ("trainer.eval_batch_size N", "and every other --trainer and --data_args option of `train`"),
            ]
        )
        if app.eval_hint:
            print(f"\n{app.eval_hint}")
        return 0
    parsed = options.split(argv)
    source = _source(parsed, "eval")
    if len(parsed.words) > 1:
        raise UserError(f"eval takes one run, got also {parsed.words[1]!r}")
    known = ["split", "output", *_override_names(app)]
    options.check_options(parsed, known)
    split, output = parsed.take("split") or "test", parsed.take("output")
    if split not in ("train", "val", "test"):
        raise unknown("split", split, ["train", "val", "test"])
    data = parsed.last("data")
    if data is not None:
        options.check_data_name(app, data)
    from attn_shared import trainer

    result = trainer.evaluate(
        app,
        Path(source),
        split=split,
        output=Path(output) if output else None,
        overrides=dict(parsed.options),
    )
    title = f"{result['model']} on {result['data']}, {split} split"
    print(title if not result["mixer"] else f"{title}, {result['mixer']}")
    if result["protocol"]:
        print(result["protocol"])
    width = max(map(len, result["metrics"]), default=0)
    for name, value in result["metrics"].items():
        print(f"  {name:{width}}  {value:.6g}")
    return 0


def _override_names(app: App) -> list[str]:
    """What may differ from training when a trained model is evaluated."""
    parts = ("trainer.", "data_args.", "task_args.")
    return [name for name in _all_names(app) if name.startswith(parts) or name == "data"]


def _all_names(app: App) -> list[str]:
    """Every option of a run, of whatever kind, but those of one model."""
    every = [option for kind in app.kinds for option in options.run_options(app, *_of_kind(kind))]
    return list(dict.fromkeys(option.name for option in every if not option.name.startswith("model_args.")))


def _of_kind(kind: Kind) -> tuple[str, str, Kind]:
    return kind.default_model, kind.default_data, kind


def _predict(app: App, argv: list[str]) -> int:
    own = list({option.name: option for kind in app.kinds for option in _predict_options(kind)}.values())
    if _wants_help(argv):
        print(
            f"usage: {app.name} predict RUN INPUT… --output DIR [options]\n\n"
            "Read each INPUT, write predictions into DIR.\n\noptions:"
        )
        _print_options([("output DIR", "folder for the predictions"), *map(_entry, own)])
        _print_options([("trainer.accelerator NAME", "and every other --trainer option of `train`")])
        if app.file_formats:
            print(f"\n{app.file_formats}")
        return 0
    parsed = options.split(argv)
    source = _source(parsed, "predict")
    trainer_names = [name for name in _override_names(app) if name.startswith("trainer.")]
    options.check_options(parsed, ["output", *trainer_names, *(option.name for option in own)])
    output = parsed.take("output")
    if output is None:
        raise UserError("predict needs --output DIR, the folder for the predictions")
    inputs = [Path(word) for word in parsed.words[1:]]
    if not inputs:
        raise UserError("predict needs one or more input files after the run")
    for file in inputs:
        if not file.exists():
            hint = f"; {file} is a data set: `{app.name} eval {source} --data {file}` scores it"
            raise UserError(f"there is no file {file}{hint if str(file) in app.datasets else ''}")
    names = {option.name for option in own}
    given = [(name, text) for name, text in parsed.options if name in names]
    overrides = {name: text for name, text in parsed.options if name not in names}
    from attn_shared import trainer

    if app.several:
        kind = trainer.saved_kind(app, Path(source))
        own = _predict_options(kind)
        options.check_options(Parsed(options=given), [option.name for option in own])
    chosen = options.typed(own, {}, [f"--{name}={text}" for name, text in given])
    for path in trainer.predict(app, Path(source), inputs, Path(output), options=chosen, overrides=overrides):
        print(path)
    return 0


def _predict_options(kind: Kind) -> list[Option]:
    own = options.dataclass_options("", kind.predict_options) if kind.predict_options else ()
    return [Option(option.name.lstrip("."), option.type, option.default, option.help) for option in own]


def _source(parsed: Parsed, command: str) -> str:
    if not parsed.words:
        raise UserError(f"{command} needs a run or checkpoint folder; `train` prints the one it made")
    _must_exist(parsed.words[0])
    return parsed.words[0]


# -- data and models --------------------------------------------------------------------------------------------------


def _data(app: App, argv: list[str]) -> int:
    usage = f"usage: {app.name} data list | fetch NAME | check NAME_OR_PATH [--data_args.X VALUE]"
    if _wants_help(argv) or not argv:
        print(f"{usage}\n\nData is looked up under $ATTN_DATA (default: data/ here).")
        if app.file_formats:
            print(f"\n{app.file_formats}")
        return 0 if argv else 2
    from attn_shared import datasets

    action, names = argv[0], argv[1:]
    if action == "list":
        _count(names, 0, usage)
        print(datasets.list_data(app))
        return 0
    if action == "fetch":
        _count(names, 1, usage)
        print(datasets.fetch(app.dataset(names[0])))
        return 0
    if action == "check":
        parsed = options.split(names)
        names = parsed.words
        _count(names, 1, usage)
        options.check_data_name(app, names[0])
        problems = datasets.check(app, names[0], options.data_args(app, names[0], parsed))
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{names[0]}: no problem found")
        return 2 if problems else 0
    raise unknown("data command", action, ["list", "fetch", "check"])


def _count(words: Sequence[str], wanted: int, usage: str) -> None:
    if len(words) != wanted:
        raise UserError(usage)


def _models(app: App, argv: list[str]) -> int:
    if _wants_help(argv):
        print(f"usage: {app.name} models [NAME]\n\nList the models, or describe one with its options.")
        return 0
    if len(argv) > 1:
        raise UserError(f"usage: {app.name} models [NAME]")
    if argv:
        _describe_model(app, app.model(argv[0]))
        return 0
    head = ["name", "year", "source", "mixer", "trainable", *(["does"] if app.several else []), "paper"]
    rows = [
        [
            *(c.name, str(c.year or "-"), c.source, c.mixer or "-", "yes" if c.trainable else "no"),
            *([_does(app, c)] if app.several else []),
            c.title,
        ]
        for c in app.models.values()
    ]
    print(table(head, rows))
    return 0


def _describe_model(app: App, card: ModelCard) -> None:
    facts = {
        "paper": f"{card.title} ({card.year})" if card.year else card.title,
        "source": card.source,
        "mixer": f"{card.mixer or 'none'}"
        + (f"; takes any that computes {card.mixer_wanted} attention" if card.mixer_patterns else ""),
        "trainable": "yes" if card.trainable else "no",
        "does": _does(app, card) if app.several else "",
        "note": card.note,
    }
    print(card.name)
    for name, text in facts.items():
        if text:
            print(f"  {name:10} {text}")
    print("\noptions:")
    _print_options([_entry(option) for option in options.dataclass_options("model_args", card.config)])


def _does(app: App, card: ModelCard) -> str:
    return ", ".join(kind.name for kind in app.kinds if app.does(card.name, kind))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text, the last one ragged."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    lines = [head, ["-" * len(word) for word in head], *rows]
    return "\n".join("  ".join([*(f"{c:{w}}" for c, w in zip(row, widths)), row[-1]]).rstrip() for row in lines)
