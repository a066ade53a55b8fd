"""From a command line, YAML files and presets to a `RunConfig`. Imports no torch.

Later wins: defaults of the dataclasses, defaults of the app, its preset for the model and data set, `--config`, the
command line.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from attn_shared.app import App, Kind
from attn_shared.config import OptimConfig, RunConfig, TrainerConfig
from attn_shared.errors import UserError
from core_attn.naming import nearest

if TYPE_CHECKING:
    import jsonargparse

MISSING = "\0missing"  # stands where an option's value should be

_HELP = {
    "model": "which model to train; `models` lists them",
    "data": "data set by name (`data list`) or path of a file of your own",
    "mixer": "attention mechanism in place of the model's own; `core-attn list` shows them",
    "seed": "decides weights, order of samples, augmentation and dropout",
    "runs": "folder under which run folders are made",
    "kind": "kind of task; follows from --data, and need be given only for a file that would suit several",
}


@dataclass(frozen=True)
class Option:
    """One dotted option of a command."""

    name: str
    type: Any
    default: Any
    help: str = ""
    metavar: str | None = None


@dataclass
class Parsed:
    """What a command line said, before presets: the raw dotted options and the words that are no options."""

    words: list[str] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str | None:
        """The last value given for `name`."""
        return next((value for key, value in reversed(self.options) if key == name), None)

    def take(self, name: str) -> str | None:
        """`last`, and the option is used up."""
        value = self.last(name)
        self.options = [(key, kept) for key, kept in self.options if key != name]
        return value


# -- command lines ----------------------------------------------------------------------------------------------------


def split(argv: Sequence[str], *, flags: Iterable[str] = ()) -> Parsed:
    """Sort words from `--name value` and `--name=value` pairs; `flags` take no value.

    Raises:
        UserError: an option without its value.
    """
    parsed, flags, rest = Parsed(), set(flags), list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            parsed.words += rest
            break
        if not token.startswith("-") or token == "-" or re.fullmatch(r"-\d.*", token):
            parsed.words.append(token)
        elif not token.startswith("--"):
            raise UserError(f"unknown option {token}; options start with two dashes, `--help` lists them")
        elif "=" in token:
            name, value = token[2:].split("=", 1)
            parsed.options.append((name, value))
        elif token[2:] in flags:
            parsed.options.append((token[2:], "true"))
        elif not rest or _is_option(rest[0]):
            parsed.options.append((token[2:], MISSING))
        else:
            parsed.options.append((token[2:], rest.pop(0)))
    return parsed


def _is_option(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def check_options(parsed: Parsed, known: Iterable[str], *, free: Iterable[str] = ()) -> None:
    """Refuse options that are not `known` (or below one of the `free` prefixes), naming the nearest.

    Raises:
        UserError: an unknown option, or one without its value.
    """
    known, free = list(known), tuple(f"{prefix}." for prefix in free)
    for name, value in parsed.options:
        if name not in known and not name.startswith(free or ("\0",)):
            raise UserError(_unknown_option(name, known))
        if value == MISSING:
            raise UserError(f"--{name} needs a value")


def _unknown_option(name: str, known: Sequence[str], *, dashes: str = "--", kind: str = "option") -> str:
    # A long common prefix makes everything in a group look near, so the last part is compared: first within the group
    # (`--model_args.widht`), then the whole name, then the last part anywhere (`--lr` for `--optim.lr`).
    group, _, last = name.rpartition(".")
    mates = {full.rpartition(".")[2]: full for full in known if group and full.rpartition(".")[0] == group}
    tails = {full.rpartition(".")[2]: full for full in known}
    close = [mates[tail] for tail in nearest(last, mates)]
    close = close or nearest(name, [] if mates else known) or [tails[tail] for tail in nearest(last, tails)]
    if close:
        return f"unknown {kind} {dashes}{name}; did you mean {' or '.join(dashes + c for c in close)}?"
    return f"unknown {kind} {dashes}{name}; `--help` lists the options"


# -- the options of a model and data set ------------------------------------------------------------------------------


def describe_fields(cls: type) -> dict[str, str]:
    """Field -> its text in the "Attributes:" section of the docstring of `cls` and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"^\s*Attributes:\n(.*?)(?=^\S|\n\s*\n\s*\w+:\n|\Z)", base.__doc__ or "", re.S | re.M)
        if section is None:
            continue
        name, indent = "", None
        for line in section.group(1).splitlines():
            depth = len(line) - len(line.lstrip())
            entry = re.match(r"\s*([\w, ]+):\s*(.*)", line)
            indent = depth if indent is None and entry else indent
            if entry and depth == indent:
                names = [part.strip() for part in entry.group(1).split(",")]
                name = names[0]
                texts.update(dict.fromkeys(names, entry.group(2)))
            elif name and line.strip():
                for each in [key for key, text in texts.items() if text == texts[name]]:
                    texts[each] += " " + line.strip()
    return texts


def dataclass_options(prefix: str, cls: type, defaults: Any = None) -> Iterator[Option]:
    """An option for each field of a dataclass, dotted below `prefix`; nested dataclasses follow."""
    hints, texts = typing.get_type_hints(cls), describe_fields(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        if defaults is not None:
            default = getattr(defaults, f.name)
        elif f.default is not dataclasses.MISSING:
            default = f.default
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        else:
            raise TypeError(f"{cls.__name__}.{f.name} needs a default")
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from dataclass_options(f"{prefix}.{f.name}", kind, default)
        else:
            yield Option(f"{prefix}.{f.name}", kind, default, texts.get(f.name, ""))


def run_options(app: App, model: str, data: str, kind: Kind) -> list[Option]:
    """Every option of a run of `model`; `mixer_args` apart, which are free."""
    card = app.model(model)
    names = "|".join(each.name for each in app.kinds)
    return [
        Option("model", str, model, _HELP["model"], metavar="NAME"),
        Option("data", str, data, _HELP["data"], metavar="NAME_OR_PATH"),
        *([Option("kind", str | None, kind.name, _HELP["kind"], metavar=names)] if app.several else []),
        Option("mixer", str | None, None, f"{_HELP['mixer']} (its own: {card.mixer or 'none'})", metavar="NAME"),
        Option("seed", int, 0, _HELP["seed"]),
        Option("runs", str, "runs", _HELP["runs"], metavar="DIR"),
        *dataclass_options("model_args", card.config),
        *dataclass_options("data_args", kind.data_config),
        *(dataclass_options("task_args", kind.task_config) if kind.task_config else ()),
        *dataclass_options("trainer", TrainerConfig, kind.trainer_defaults()),
        *dataclass_options("optim", OptimConfig, kind.optim_defaults()),
    ]


def make_parser(prog: str, options: Sequence[Option], *, description: str = "") -> jsonargparse.ArgumentParser:
    """A jsonargparse parser over `options`, grouped by their first part."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, add_help=False, description=description)
    groups: dict[str, Any] = {}
    for option in options:
        head, dot, tail = option.name.partition(".")
        if dot and head not in groups:
            groups[head] = parser.add_argument_group(head)
        target = groups[head] if dot else parser
        metavar = option.metavar or tail.rsplit(".", 1)[-1].upper() or head.upper()
        choices = typing.get_origin(option.type) is typing.Literal or option.type is bool
        keywords: dict[str, Any] = {} if choices else {"metavar": metavar}
        text = (option.help or " ").replace("%", "%%")
        target.add_argument(f"--{option.name}", type=option.type, default=option.default, help=text, **keywords)
    return parser


# -- presets and configuration files --------------------------------------------------------------------------------


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        UserError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"the configuration file {path} holds no mapping of options")
    return loaded


def preset(app: App, model: str, data: str, kind: Kind) -> tuple[str, dict[str, Any]]:
    """Name and content of the app's preset for `model` on `data`.

    It is `<model>-<data>.yaml`, else `<model>.yaml`; of a model that does several kinds of task the latter is for the
    first of them, and `<model>-<kind>.yaml` for another.
    """
    folder = importlib.resources.files(app.package).joinpath("configs")
    names = [f"{model}-{data}.yaml"] if data in app.datasets else []
    first = (app.model(model).kinds or (app.kinds[0].name,))[0]
    names.append(f"{model}.yaml" if kind.name == first else f"{model}-{kind.name}.yaml")
    for name in names:
        file = folder.joinpath(name)
        if file.is_file():
            return name, yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return "", {}


def _flat(mapping: Mapping[str, Any], leaves: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    leaves = set(leaves)
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in leaves:
            yield from _flat(value, leaves, f"{name}.")
        else:
            yield name, value


def _layer(app: App, values: Mapping[str, Any], where: str, options: Sequence[Option]) -> dict[str, Any]:
    """A mapping's options by dotted name, its keys checked."""
    if values.get("app", app.name) != app.name:
        raise UserError(f"{where} is a configuration of {values['app']}, not of {app.name}")
    known = [option.name for option in options]
    flat = dict(_flat({k: v for k, v in values.items() if k not in ("app", "mixer_args")}, known))
    for name in flat:
        if name not in known:
            raise UserError(f"{where}: {_unknown_option(name, known, dashes='', kind='key')}")
    return flat


# -- everything together --------------------------------------------------------------------------------------------


def resolve(
    app: App,
    parsed: Parsed,
    *,
    model: str | None = None,
    extra: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration that a command line asks for.

    Args:
        app: the application.
        parsed: the command line; `config` (path) and `preset` ("none") among its options are honoured.
        model: overrules every other mention of the model, as `compare` needs for a list of models.
        extra: further valid options, which the caller takes care of.
        base: a whole configuration, such as a saved one, in place of defaults and preset.

    Raises:
        UserError: an unknown name, option or key, or a value of the wrong type.
    """
    where = parsed.last("config")
    from_file = load_yaml(Path(where)) if where and where != MISSING else {}
    given = {k: v for k, v in parsed.options if k in ("model", "data", "kind")}
    named = {**(base or {}), **from_file, **given}
    # A saved kind holds for the saved data; other data may be for another one.
    for said in (from_file, given):
        if "data" in said and "kind" not in said:
            named.pop("kind", None)
    if "data" in from_file or "data" in given:  # the file that a saved model was trained on may be gone
        check_data_name(app, str(named["data"]))
    model, data, kind = app.defaults(
        model or _text(named.get("model")), _text(named.get("data")), _text(named.get("kind"))
    )

    options = run_options(app, model, data, kind)
    known = [option.name for option in options]
    check_options(parsed, [*known, "mixer_args", "config", "preset", *extra], free=["mixer_args"])
    choice = parsed.last("preset") or "auto"
    if choice not in ("auto", "none"):
        raise UserError(f"--preset takes auto or none, got {choice!r}")

    layers: list[tuple[str, Mapping[str, Any]]] = []
    if base is not None:
        layers.append(("the saved configuration", base))
    elif choice == "auto":
        name, usual = preset(app, model, data, kind)
        layers.append((f"preset {name}", usual))
    if from_file:
        layers.append((str(where), from_file))

    values: dict[str, Any] = {}
    mixer: str | None = None
    mixer_args: dict[str, Any] = {}
    for name, layer in layers:
        flat = _layer(app, layer, name, options)
        values |= flat
        # Options of one mechanism mean nothing to another.
        if "mixer" in flat and flat["mixer"] != mixer:
            mixer, mixer_args = flat["mixer"], {}
        own = layer.get("mixer_args") or {}
        if not isinstance(own, Mapping):
            raise UserError(f"{name}: mixer_args must be a mapping of options")
        mixer_args |= own
    values |= {"model": model, "data": data} | ({"kind": kind.name} if app.several else {})

    lines: list[str] = []
    for name, text in parsed.options:
        if name == "mixer":
            chosen = None if text in ("", "null", "None") else text
            mixer, mixer_args = chosen, mixer_args if chosen == mixer else {}
            values["mixer"] = chosen
    for name, text in parsed.options:
        if name == "mixer_args":
            given = _scalar(text)
            if not isinstance(given, Mapping):
                raise UserError("--mixer_args takes a mapping, such as {factor: 3}; or use --mixer_args.factor 3")
            mixer_args |= given
        elif name.startswith("mixer_args."):
            mixer_args[name.removeprefix("mixer_args.")] = _scalar(text)
        elif name in known and name not in ("model", "data", "kind", "mixer"):
            lines.append(f"--{name}={text}")

    return _run_config(app, model, data, kind, typed(options, values, lines), mixer_args)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _run_config(
    app: App, model: str, data: str, kind: Kind, flat: Mapping[str, Any], mixer_args: Mapping[str, Any]
) -> RunConfig:
    return RunConfig(
        app=app.name,
        model=model,
        model_args=_build(app.model(model).config, "model_args", flat),
        data=data,
        data_args=_build(kind.data_config, "data_args", flat),
        mixer=flat["mixer"],
        mixer_args=dict(mixer_args),
        trainer=_build(TrainerConfig, "trainer", flat),
        optim=_build(OptimConfig, "optim", flat),
        seed=flat["seed"],
        runs=flat["runs"],
        kind=kind.name if app.several else None,
        task_args=_build(kind.task_config, "task_args", flat) if kind.task_config else None,
    )


def data_args(app: App, data: str, parsed: Parsed) -> Any:
    """The dataclass of `--data_args` options of a file, as its kind of task (`--kind`) has them; None without any.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    named = parsed.take("kind") if app.several else None
    kind = app.kind(data, named)
    known = list(dataclass_options("data_args", kind.data_config))
    check_options(parsed, [option.name for option in known])
    if not parsed.options and named is None:
        return None
    return _build(
        kind.data_config, "data_args", typed(known, {}, [f"--{name}={text}" for name, text in parsed.options])
    )


def check_data_name(app: App, data: str) -> None:
    """Refuse a `--data` that is neither a data set nor a file of the app's kinds."""
    suffixes = app.file_suffixes
    if data in app.datasets:
        return
    if suffixes and (data.lower().endswith(suffixes) or Path(data).exists()):
        if not Path(data).exists():
            raise UserError(f"there is no file {data}")
        return
    app.dataset(data)


def config_from_dict(app: App, values: Mapping[str, Any]) -> RunConfig:
    """The saved form of a configuration (`config_to_dict`) back as dataclasses, names and types checked.

    Raises:
        UserError: what does not fit, in one sentence.
    """
    model, data, kind = app.defaults(str(values.get("model")), str(values.get("data")), _text(values.get("kind")))
    options = run_options(app, model, data, kind)
    flat = typed(options, _layer(app, values, "the saved configuration", options), [])
    mixer_args = values.get("mixer_args") or {}
    if not isinstance(mixer_args, Mapping):
        raise UserError("the saved configuration: mixer_args must be a mapping of options")
    return _run_config(app, model, data, kind, flat, mixer_args)


def override(app: App, config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with dotted options changed, such as {"trainer.eval_batch_size": 64}.

    Raises:
        UserError: an unknown option or a wrong value.
    """
    parsed = Parsed(
        options=[(name, value if isinstance(value, str) else _dump(value)) for name, value in changes.items()]
    )
    if config.kind and parsed.last("data"):
        # A file of one's own is taken for what the model does.
        app.kind(str(parsed.last("data")), config.kind)
        parsed.options.append(("kind", config.kind))
    from attn_shared.config import config_to_dict

    return resolve(app, parsed, base=config_to_dict(config))


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def typed(options: Sequence[Option], values: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """Defaults, then `values`, then command-line `lines`, each checked against the option's type."""
    parser = make_parser("", options)
    lists = {option.name: parts for option in options if (parts := _list_parts(option.type))}
    try:
        space = parser.parse_object(_nest(values))
        space = parser.parse_args([_list_line(line, lists) for line in lines], namespace=space)
    except Exception as error:  # jsonargparse raises ArgumentError, NSKeyError, TypeError by version and place
        raise UserError(_one_sentence(str(error))) from None
    return {option.name: space[option.name] for option in options}


def _list_parts(kind: Any) -> Any:
    """What the elements of a list option are: the T of list[T], tuple[T, ...] or one of them | None; None for any
    other option."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    found = [part for part in (typing.get_args(kind) if union else (kind,)) if part is not type(None)]
    if len(found) != 1:
        return None
    parts = typing.get_args(found[0])
    if typing.get_origin(found[0]) is list or (typing.get_origin(found[0]) is tuple and parts[1:] == (...,)):
        return parts[0]
    return None


def _list_line(line: str, lists: Mapping[str, Any]) -> str:
    """`--columns=a,b` as `--columns=["a", "b"]`; names that look like numbers stay text."""
    name, _, text = line.removeprefix("--").partition("=")
    if name not in lists or text.strip().lower() in ("null", "none"):
        return line
    inside = text.strip()
    if not inside.startswith("["):
        parts: Any = [part.strip() for part in inside.split(",") if part.strip()]
    elif lists[name] is not str:
        return line
    else:
        try:
            parts = yaml.load(inside, Loader=yaml.BaseLoader)  # every scalar as text
        except yaml.YAMLError:
            return line
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return line
    shown = parts if lists[name] is str else [_scalar(part) for part in parts]
    return f"--{name}={json.dumps(shown, ensure_ascii=False)}"


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *heads, tail = name.split(".")
        node = tree
        for head in heads:
            node = node.setdefault(head, {})
        node[tail] = value
    return tree


def _build(cls: type, prefix: str, flat: Mapping[str, Any]) -> Any:
    hints, values = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        if f.init:
            name, kind = f"{prefix}.{f.name}", hints[f.name]
            values[f.name] = _build(kind, name, flat) if dataclasses.is_dataclass(kind) else flat[name]  # type: ignore[arg-type]
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass may check its values in __post_init__
        raise UserError(f"{prefix}: {error}") from None


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def type_name(kind: Any) -> str:
    """A type as help texts and errors show it."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return "|".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_args(kind):
        return f"[{','.join('…' if part is Ellipsis else type_name(part) for part in typing.get_args(kind))}]"
    names = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", Path: "PATH"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _one_sentence(message: str) -> str:
    message = " ".join(message.split())
    match = re.search(r'(?:Parser key|key) "([\w.]+)":\s*(.*)', message)
    if not match:
        return message
    name, rest = match.groups()
    wrong = re.search(r"Got value: (.*?)(?: Subtypes| - Expected|$)", rest)
    union = re.search(r"any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", rest)
    if union and not wrong:
        kinds = re.sub(r"<class '([\w.]+)'>", r"\1", union.group(1)).replace("typing.", "").split(", ")
        shown = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        return f"--{name} takes {shown}, got {union.group(2)}"
    wanted = re.search(r"Expected a (.*?)\. Got value", rest)
    if wrong and wanted:
        kind = re.sub(r"<class '([\w.]+)'>", r"\1", wanted.group(1)).replace("typing.", "")
        kind = re.sub(r"Literal\[(.*)\]", lambda m: "one of " + m.group(1).replace("'", ""), kind)
        return f"--{name} takes {kind}, got {wrong.group(1)}"
    return f"--{name}: {rest}"
