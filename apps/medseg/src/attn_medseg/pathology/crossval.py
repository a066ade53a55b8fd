"""`medseg crossval`: train every fold of bags or patients, repeatedly, and score what the folds say together.

A fold of ten bags has no AUROC worth the name, so predictions of all folds are put together: each bag is predicted once
in each repeat, by the model that has not seen it. A score is computed on these for each repeat, and its mean over
repeats reported, with two spreads: the standard deviation over repeats (another dealing, another start), and a 95 %
interval that resamples patients, with what all repeats say of them. Risks of different models cannot be ranked among
each other: of survival a score is computed in each fold and averaged over folds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_shared import options
from attn_shared.errors import UserError

if TYPE_CHECKING:
    from attn_shared.config import RunConfig

NAME = "crossval"
KINDS = ("bags", "survival")
_HELP = """usage: medseg crossval [--data NAME_OR_PATH] [--model A,B,…] [options]

Train every fold of bags or survival, repeatedly; one table of what the folds say together.

options:
  --data NAME_OR_PATH         bags or survival (default: synthetic_bags)
  --model A,B,…               models to compare on the same folds (default: the data's)
  --data_args.folds N         parts, each the test part once (default: 10 of bags, 5 of survival)
  --repeats N                 so many times, the folds dealt anew, another start (default: 1)
  --output DIR                for crossval.md, .json and predictions.csv (default: runs/medseg/crossval/<models>-<data>)
  --seed N, --config FILE.yaml, --preset none, and every --data_args, --task_args, --trainer, --optim and --model_args
                              option of `train`"""


@dataclass
class Result:
    """What became of a model, or of a baseline.

    Attributes:
        rows: of each repeat, of each fold: what `keep` of the kind's `folds` keeps.
        seconds: of training, CPU time.
    """

    name: str
    note: str = ""
    rows: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status."""
    from attn_medseg.cli import APP
    from attn_shared.runs import slug

    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_HELP)
        return 0 if argv else 2
    parsed = options.split(argv)
    if parsed.words:
        raise UserError(f"crossval takes options only, got {parsed.words[0]!r}; did you mean --data {parsed.words[0]}?")
    models = [name.strip() for name in (parsed.take("model") or "").split(",") if name.strip()]
    repeats, output = _number(parsed.take("repeats"), "repeats"), parsed.take("output")
    if output == options.MISSING:
        raise UserError("--output needs a value")
    if parsed.last("data") is None and not models:
        parsed.options.append(("data", "synthetic_bags"))
    for name in models:
        APP.model(name)
    first = options.resolve(APP, parsed, model=models[0] if models else None)
    if first.kind not in KINDS:
        raise UserError(f"crossval is for bags and survival; {first.data} is to segment: `medseg compare` with folds")
    if first.data_args.fold is not None:
        raise UserError("crossval goes through all folds; leave --data_args.fold out")
    configs = [options.resolve(APP, parsed, model=name) for name in models] or [first]
    folds = first.data_args.folds or (10 if first.kind == "bags" else 5)
    folder = Path(output) if output else Path(first.runs) / APP.name / NAME / _place(configs, slug)
    found, protocol = run(configs, folds=folds, repeats=repeats)
    print(save(folder, configs, found, folds=folds, repeats=repeats, protocol=protocol))
    print(folder)
    return 0


def run(configs: Sequence[RunConfig], *, folds: int, repeats: int) -> tuple[list[Result], str]:
    """Train every model on every fold of every repeat, all on the same folds; models first, baselines after them."""
    from attn_medseg.cli import APP
    from attn_shared import trainer

    kind = _kind(configs[0])
    models = {config.model: Result(config.model) for config in configs}
    beside: dict[str, Result] = {}
    protocol = ""
    for repeat in range(repeats):
        for fold in range(folds):
            for number, config in enumerate(configs):
                data_args = dataclasses.replace(
                    config.data_args, folds=folds, fold=fold, shuffle=config.data_args.shuffle + repeat
                )
                config = dataclasses.replace(config, data_args=data_args, seed=config.seed + repeat * folds + fold)
                bundle = trainer.load_data(APP, config)
                if bundle.test is None:
                    raise UserError(f"fold {fold} of {folds} has nothing to test on; choose fewer --data_args.folds")
                protocol = bundle.protocol
                begun = time.process_time()
                task: Any = trainer.fit(APP, config, bundle)
                result = models[config.model]
                result.seconds += time.process_time() - begun
                trainer.evaluate_split(task, bundle, "test", config)
                _keep(result, repeat, kind.keep(task.scored("test"), bundle.test))
                figure = kind.figures(result.rows[repeat][-1:])[task.primary]
                place = f"repeat {repeat + 1}/{repeats}, fold {fold + 1}/{folds}"
                print(f"{place}, {config.model}: {task.primary} {figure:.3f}", file=sys.stderr)
                if not number:
                    for name, (note, scored) in kind.baselines(bundle).items():
                        _keep(beside.setdefault(name, Result(name, note)), repeat, kind.keep(scored, bundle.test))
    return [*models.values(), *beside.values()], protocol


def figures(kind: Any, result: Result, resamples: int) -> dict[str, dict[str, Any]]:
    """Score -> "mean" over repeats, "sd" over them, "from" and "to" of the interval, "repeats"."""
    each = [kind.figures(folds) for folds in result.rows]
    bounds = kind.intervals(result.rows, resamples) if resamples else {}
    found: dict[str, dict[str, Any]] = {}
    for name in each[0]:
        values = [one[name] for one in each]
        found[name] = {"mean": statistics.fmean(values), "repeats": values}
        if len(values) > 1:
            found[name]["sd"] = statistics.stdev(values)
        if name in bounds:
            found[name]["from"], found[name]["to"] = bounds[name]
    return found


def save(
    folder: Path, configs: Sequence[RunConfig], found: Sequence[Result], *, folds: int, repeats: int, protocol: str
) -> str:
    """Write the table, all figures and all predictions; the table."""
    from attn_medseg.cli import APP
    from attn_shared import trainer
    from attn_shared.config import config_to_dict
    from attn_shared.runs import write_atomically

    config, kind = configs[0], _kind(configs[0])
    task = trainer.task_class(APP, config)
    every = {one.name: figures(kind, one, config.task_args.bootstrap) for one in found}
    names = [name for name in task.metric_format if name in every[config.model]][:5]
    lines = [f"| model | {' | '.join(names)} | CPU-seconds of training |", "|---" * (len(names) + 2) + "|"]
    order = sorted(found, key=lambda one: -every[one.name][task.primary]["mean"] * (1 if task.maximize else -1))
    trained = {one.model for one in configs}
    for one in order:
        cells = [_cell(every[one.name].get(name), task.metric_format[name]) for name in names]
        label = one.name if one.name in trained else f"{one.name} (baseline)"
        lines.append(f"| {label} | {' | '.join(cells)} | {f'{one.seconds:.0f}' if one.name in trained else '-'} |")
    over = f"mean ± standard deviation over {repeats} repeats" if repeats > 1 else "one repeat"
    command = shlex.join([APP.name, *sys.argv[1:]]) if sys.argv[1:2] == [NAME] else f"{APP.name} {NAME}"
    told = [
        f"{config.data}, {folds} folds, {over}; in brackets 95 % intervals that resample patients. {kind.TOLD}. "
        f"Last fold: {protocol}.",
        *(f"{one.name}: {one.note}." for one in order if one.note),
        f"Command: `{command}`",
    ]
    text = "\n".join([*lines, "", *told]) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another --output") from None
    record = {
        "folds": folds,
        "repeats": repeats,
        "configs": [config_to_dict(one) for one in configs],
        "figures": every,
        "cpu_seconds": {one.name: one.seconds for one in found if one.name in trained},
        "versions": trainer.versions(APP),
        "command": command,
    }
    write_atomically(folder / f"{NAME}.md", text)
    write_atomically(folder / f"{NAME}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "predictions.csv", kind.table(found))
    return text


def _kind(config: RunConfig) -> Any:
    """The module that says what folds of this kind of task say together."""
    return importlib.import_module(f"attn_medseg.pathology.{config.kind}.folds")


def _keep(result: Result, repeat: int, row: Any) -> None:
    while len(result.rows) <= repeat:
        result.rows.append([])
    result.rows[repeat].append(row)


def _cell(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None:
        return "-"
    text = f"{found['mean']:{form}}"
    text += f" ± {found['sd']:{form}}" if "sd" in found else ""
    return text + (f" [{found['from']:{form}}, {found['to']:{form}}]" if "from" in found else "")


def _place(configs: Sequence[RunConfig], slug: Any) -> str:
    data = configs[0].data
    return f"{'+'.join(slug(one.model) for one in configs)}-{slug(Path(data).stem if Path(data).suffix else data)}"


def _number(text: str | None, name: str) -> int:
    if text is None:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{name} takes a whole number from 1 on, got {text}")
    return int(text)
