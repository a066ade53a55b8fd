"""Models and mechanisms trained on equal terms: one grid, one table.

Every cell of the grid (model, mechanism, seed) is an ordinary run. A finished cell whose configuration, data and
versions are the same is not trained again, so an interrupted comparison goes on where it stopped, and a comparison
grows by naming more mechanisms.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from attn_shared import datasets, options, page, plotting, trainer
from attn_shared.app import App, ModelCard
from attn_shared.config import RunConfig, config_to_dict
from attn_shared.errors import UserError
from attn_shared.intervals import interval_names
from attn_shared.profiling import DEFINITIONS, Cost, machine, measure_costs
from attn_shared.report import COST_NAMES, cost_text, main_metrics, metric_text, sentence, sort_key
from attn_shared.runs import Run, slug, write_atomically
from attn_shared.task import DataBundle, Task
from core_attn import registry

NAME = "comparison"
_MARKERS = "osD^vPX"
_COST_HEADS = {
    "parameters": "parameters",
    "flops": "FLOPs",
    "train_samples_per_s": "train, 1/s",
    "eval_samples_per_s": "eval, 1/s",
    "latency_ms": "latency, ms",
    "peak_memory_mb": "memory, MiB",
}


@dataclass
class Cell:
    """One training: its configuration, and how it ended."""

    config: RunConfig
    mixer: str | None
    digest: str
    run: Path | None = None
    results: dict[str, Any] | None = None
    error: str = ""


@dataclass
class Line:
    """A row of the table.

    Attributes:
        kind: "model" (trained here), "baseline", "published" or "failed".
        metrics: name -> the values of the seeds.
    """

    kind: str
    model: str
    mixer: str = ""
    source: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    cost: Cost | None = None
    error: str = ""

    def mean(self, metric: str) -> float | None:
        values = self.metrics.get(metric)
        return statistics.fmean(values) if values else None

    def sd(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        values = self.metrics.get(metric, [])
        if len(values) < 2:
            return None
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def compare(
    app: App,
    config: RunConfig,
    *,
    mixers: Sequence[str | None],
    models: Sequence[str] | None = None,
    seeds: int = 1,
    output: Path | None = None,
    settings: Mapping[str, RunConfig] | None = None,
) -> Path:
    """Train the grid with equal budgets, evaluate on the same split, print and save one table.

    Args:
        config: what all cells share: data, trainer, first seed. Its model options belong to its model; the others take
            those of their own preset, and of `config` what differs from its preset and what they have too.
        mixers: mechanisms; None is the model's own, "all" stands for every one that fits. Models that mix no tokens
            take part once.
        models: names; default: the one of `config`.
        seeds: runs a cell, from `config.seed` on.
        output: folder for table, figures and runs; default beside the runs, the same for the same models and data.
        settings: a whole configuration for each model, in place of equal terms: papers give each model its own
            look-back and budget. The table then names what differs.

    Returns:
        The folder with comparison.{md,csv,json,html}.

    Raises:
        UserError: a mechanism that does not fit a model or data that is not here (before anything is trained), or not
            one cell succeeded.
    """
    if config.trainer.devices != 1:
        raise UserError("compare trains in one process; leave --trainer.devices at 1")
    models = list(dict.fromkeys(models or [config.model]))
    cells = _grid(app, config, models, list(mixers) or [None], seeds, settings or {})
    card = app.datasets.get(config.data)
    if card is not None and card.files:
        datasets.locate(card)
    if output is None:
        data = Path(config.data).stem if Path(config.data).suffix else config.data
        output = Path(config.runs) / slug(app.name) / "compare" / f"{'+'.join(map(slug, models))}-{slug(data)}"
    store = output / "cells"
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}; choose another --output") from None

    for number, cell in enumerate(cells, 1):
        _say(f"[{number}/{len(cells)}] {_title(cell)}, seed {cell.config.seed}")
        _train_or_reuse(app, cell, store)
    task_class = trainer.task_class(app, config)
    lines = _lines(app, cells)
    table = _Table(app, task_class, config, cells, lines)
    write_atomically(output / f"{NAME}.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False))
    table.save(output)
    if not any(cell.results for cell in cells):
        raise UserError(f"no training of the comparison succeeded; the first failed so: {cells[0].error}")
    print(table.markdown())
    return output


# -- the grid ---------------------------------------------------------------------------------------------------------


def fitting(card: ModelCard) -> list[str]:
    """Mechanisms that can replace a model's own: those that compute every pattern the model asks for."""
    return [name for name in registry.names() if card.takes(registry.get(name).info.patterns)]


def _grid(
    app: App,
    config: RunConfig,
    models: Sequence[str],
    mixers: Sequence[str | None],
    seeds: int,
    settings: Mapping[str, RunConfig],
) -> list[Cell]:
    if config.mixer_args and (len(set(mixers)) > 1 or "all" in mixers):
        raise UserError("--mixer_args belong to one mechanism; compare that one alone, or leave them out")
    cards = [app.model(name) for name in models]
    if any(mixers) and not any(card.mixer_patterns for card in cards):
        raise UserError(f"{' and '.join(models)}: no tokens are mixed, so there is no mechanism to replace by --mixer")
    cells = []
    for card in cards:
        base = settings.get(card.name) or _of_model(app, config, card)
        wanted: list[str | None] = list(mixers)
        if not card.mixer_patterns:
            wanted = [None]
        elif "all" in mixers:
            wanted = [name for m in mixers for name in (fitting(card) if m == "all" else [m])]
        # By its name or as "own", the paper's mechanism is one cell.
        for mixer in dict.fromkeys(None if m == card.mixer else m for m in wanted):
            chosen = dataclasses.replace(
                base, mixer=mixer, mixer_args=dict(base.mixer_args) if card.mixer_patterns else {}
            )
            trainer.check_mixer(app, chosen)
            for seed in range(config.seed, config.seed + seeds):
                seeded = dataclasses.replace(chosen, seed=seed)
                cells.append(Cell(config=seeded, mixer=mixer or card.mixer, digest=_digest(app, seeded)))
    return cells


def _of_model(app: App, config: RunConfig, card: ModelCard) -> RunConfig:
    """`config` for another model: the same data and budget, its own options."""
    if card.name == config.model:
        return config
    named = options.Parsed(options=[("data", config.data), *([("kind", config.kind)] if config.kind else [])])
    usual = options.resolve(app, named, model=config.model)
    own = options.resolve(app, named, model=card.name)
    return dataclasses.replace(
        own,
        model_args=_changed(own.model_args, usual.model_args, config.model_args),
        optim=_changed(own.optim, usual.optim, config.optim),
        data_args=config.data_args,
        task_args=config.task_args,
        trainer=config.trainer,
        mixer_args=config.mixer_args,
        seed=config.seed,
        runs=config.runs,
    )


def _changed(own: Any, usual: Any, given: Any) -> Any:
    """`own` with those values of `given` that its user changed from `usual`, where `own` has such an option."""
    names = {f.name for f in dataclasses.fields(own)}
    changes = {
        f.name: getattr(given, f.name)
        for f in dataclasses.fields(given)
        if f.name in names and getattr(given, f.name) != getattr(usual, f.name)
    }
    return dataclasses.replace(own, **changes)


def _digest(app: App, config: RunConfig) -> str:
    """Changes with whatever may change the outcome: configuration, versions, contents of a data file."""
    facts = {**config_to_dict(config), "runs": None, "versions": trainer.versions(app)}
    if config.data not in app.datasets and Path(config.data).is_file():
        facts["contents"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# -- training ---------------------------------------------------------------------------------------------------------


def _train_or_reuse(app: App, cell: Cell, store: Path) -> None:
    """Fill in how the cell ended: reused, gone on with, trained, or failed in a sentence."""
    note = store / f"{slug(_title(cell))}-seed{cell.config.seed}-{cell.digest}.json"
    begun = _read_note(note)
    if begun is not None and begun.get("status") == "done":
        try:
            cell.run = store / begun["run"]
            cell.results = Run.open(cell.run).results()
            _say("  done before, used again")
            return
        except UserError:
            begun = None  # the run was removed
    resume = store / begun["run"] if begun is not None and (store / begun["run"]).is_dir() else None
    config = dataclasses.replace(cell.config, runs=str(store))
    try:
        cell.run = trainer.train(app, config, resume=resume)
        cell.results = Run.open(cell.run).results()
    except trainer.Interrupted as stop:
        if stop.run is not None:
            _write_note(note, cell, "interrupted", stop.run, store)
        _say("stopped; the same command goes on from here")
        raise KeyboardInterrupt from None
    except UserError as error:
        cell.error = " ".join(str(error).split())
    except Exception as error:  # one cell's fault must not cost the others' work
        text = next(iter(str(error).strip().splitlines()), "")
        cell.error = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if cell.error:
        _say(f"  failed: {cell.error}")
        return
    assert cell.run is not None
    _write_note(note, cell, "done", cell.run, store)


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("run"), str) else None


def _write_note(note: Path, cell: Cell, status: str, run: Path, store: Path) -> None:
    # Relative, so that the folder can be moved.
    where = run.resolve().relative_to(store.resolve()).as_posix()
    facts = {"status": status, "run": where, "config": config_to_dict(cell.config)}
    write_atomically(note, json.dumps(facts, indent=2) + "\n")


def _title(cell: Cell) -> str:
    return f"{cell.config.model}-{cell.mixer}" if cell.mixer else cell.config.model


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- rows -------------------------------------------------------------------------------------------------------------


def split_of(results: Mapping[str, Any]) -> str:
    """The split that tables show: test, or validation where there is none."""
    return "test" if results["splits"].get("test") else "val"


def _lines(app: App, cells: Sequence[Cell]) -> list[Line]:
    groups: dict[tuple[str, str | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.config.model, cell.mixer), []).append(cell)
    first = {key: next((c for c in group if c.results), None) for key, group in groups.items()}
    costs = dict(zip([k for k, c in first.items() if c], _costs(app, [c for c in first.values() if c])))
    lines = []
    for key, group in groups.items():
        done = [c.results for c in group if c.results]
        failed = [c for c in group if c.error]
        error = ""
        if failed:
            error = failed[0].error if not done else f"{len(failed)} of {len(group)} seeds failed: {failed[0].error}"
        metrics: dict[str, list[float]] = {}
        for results in done:
            for name, value in results["splits"][split_of(results)].items():
                metrics.setdefault(name, []).append(value)
        lines.append(
            Line(
                kind="model" if done else "failed",
                model=key[0],
                mixer=key[1] or "",
                metrics=metrics,
                cost=costs.get(key),
                error=error,
            )
        )
    return lines + _rows_beside(cells, {line.model for line in lines})


def _rows_beside(cells: Sequence[Cell], trained: Collection[str]) -> list[Line]:
    """Baselines and published figures of all runs."""
    lines: list[Line] = []
    for kind, name in (("baseline", "baselines"), ("published", "published")):
        # Other models' runs with the same seed repeat a row; other seeds may have other data, and so other figures.
        found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for cell in cells:
            for row in (cell.results or {}).get(name) or []:
                entry = (str(row.get("model", "?")), str(row.get("source") or ""))
                # A baseline that takes part itself stands there already.
                if not (kind == "baseline" and entry[0] in trained):
                    found.setdefault(entry, {}).setdefault(cell.config.seed, _numbers(row))
        lines += [
            Line(kind=kind, model=model, source=source, metrics=_gathered(list(rows.values())))
            for (model, source), rows in found.items()
        ]
    return lines


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "seed"
    }


def _gathered(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The values of each metric over seeds; a single one where no seed changes anything."""
    if all(_same(row, rows[0]) for row in rows):
        rows = rows[:1]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def _same(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a.keys() == b.keys() and all(a[k] == b[k] or (math.isnan(a[k]) and math.isnan(b[k])) for k in a)


def _costs(app: App, cells: Sequence[Cell]) -> Iterator[Cost | None]:
    """What each trained model costs, all measured in one go and in turns."""
    bundles: dict[str, DataBundle] = {}
    entries: list[tuple[Task, DataBundle, RunConfig]] = []
    for cell in cells:
        assert cell.run is not None
        task, config = trainer.load_task(app, cell.run)
        key = json.dumps(
            [config.data, config_to_dict(config)["data_args"], task.data_state], sort_keys=True, default=str
        )
        if key not in bundles:
            bundles[key] = trainer.load_data(app, config, task.data_state)
        entries.append((task, bundles[key], config))
    try:
        yield from measure_costs(entries)
    except (RuntimeError, ValueError, MemoryError):
        # One that cannot be measured (out of memory, for one) must not take the figures from the others.
        for entry in entries:
            try:
                yield measure_costs([entry])[0]
            except (RuntimeError, ValueError, MemoryError) as error:
                _say(f"  the cost of {entry[2].model} could not be measured: {error}")
                yield None


def merged(texts: Sequence[str]) -> str:
    """What runs with several seeds say of their protocol, in one text: "fold 1 of 6" and "fold 2 of 6" are "fold 1-2".

    Numbers that differ become their range; texts that differ in more than numbers follow one another.
    """
    texts = list(dict.fromkeys(texts))
    parts = [re.split(r"(\d+(?:,\d{3})*(?:\.\d+)?)", text) for text in texts]
    if len(texts) < 2:
        return "".join(texts)
    if len({tuple(part[::2]) for part in parts}) > 1:
        return "; ".join(texts)
    words = []
    for place, found in enumerate(zip(*parts)):
        ends = sorted(set(found), key=_number) if place % 2 else [found[0]]
        words.append(ends[0] if len(ends) == 1 else f"{ends[0]}-{ends[-1]}")
    return "".join(words)


def _number(word: str) -> float:
    return float(word.replace(",", ""))


# -- the table --------------------------------------------------------------------------------------------------------


class _Table:
    COSTS = tuple(_COST_HEADS)

    def __init__(
        self, app: App, task: type[Task], config: RunConfig, cells: Sequence[Cell], lines: Sequence[Line]
    ) -> None:
        self.app, self.task, self.config, self.cells = app, task, config, cells
        self.lines = sorted(lines, key=lambda line: (line.kind == "failed", *sort_key(task, line.mean(task.primary))))
        results = next((c.results for c in cells if c.results), None)
        self.split = split_of(results) if results else "test"
        said: dict[str, list[str]] = {}
        for cell in cells:
            if cell.results:
                said.setdefault(cell.config.model, []).append(str(cell.results["protocol"]))
        protocols = {model: merged(texts) for model, texts in said.items()}
        same = len(set(protocols.values())) < 2
        # Models under their own settings may see longer look-backs.
        self.protocol = (
            next(iter(protocols.values()), "")
            if same
            else "; ".join(f"{model}: {protocol}" for model, protocol in protocols.items())
        )
        figures = results["splits"][self.split] if results else {}
        self.metrics = main_metrics(task, figures, limit=3) if results else [task.primary]
        self.all_metrics = list(dict.fromkeys([*self.metrics, *figures]))
        self.seeds = len({c.config.seed for c in cells})
        self.machine = machine()
        self.sources = any(line.source for line in self.lines)

    def save(self, output: Path) -> None:
        """Write every form of the table, each whole or not at all."""
        plots = output / "plots"
        plots.mkdir(exist_ok=True)
        figure = self.plot()
        if figure is not None:
            (plots / "quality_cost.png").write_bytes(plotting.png(figure))
        write_atomically(output / f"{NAME}.md", self.markdown() + "\n")
        write_atomically(output / f"{NAME}.csv", self.csv())
        write_atomically(output / f"{NAME}.json", json.dumps(self.record(), indent=2) + "\n")
        write_atomically(output / f"{NAME}.html", self.html(figure))

    # -- cells --------------------------------------------------------------------------------------------------------

    def _quality(self, line: Line, metric: str) -> str:
        text = metric_text(self.task, metric, line.mean(metric))
        sd = line.sd(metric)
        if sd is not None:
            text = f"{text} ± {metric_text(self.task, metric, sd)}"
        bounds = [line.mean(name) for name in interval_names(metric)]
        if None not in bounds:
            text += f" [{', '.join(metric_text(self.task, metric, bound) for bound in bounds)}]"
        return text

    def _cost(self, line: Line, key: str) -> str:
        return cost_text(key, getattr(line.cost, key)) if line.cost is not None else page.NONE

    def _name(self, line: Line) -> str:
        return {"model": line.model, "failed": line.model}.get(line.kind, f"{line.model} ({line.kind})")

    def head(self) -> list[str]:
        return ["model", "attention / source", *self.metrics, *_COST_HEADS.values()]

    def _row(self, line: Line) -> list[str]:
        if line.kind == "failed":
            return [self._name(line), line.mixer, "failed", *[""] * (len(self.metrics) + len(self.COSTS) - 1)]
        return [
            self._name(line),
            line.mixer or line.source,
            *(self._quality(line, m) for m in self.metrics),
            *(self._cost(line, c) for c in self.COSTS),
        ]

    # -- words --------------------------------------------------------------------------------------------------------

    def title(self) -> str:
        models = list(dict.fromkeys(c.config.model for c in self.cells))
        return f"{', '.join(models)} on {Path(self.config.data).name}"

    def sentences(self) -> list[str]:
        """What must be known to read the table."""
        best = "highest" if self.task.maximize else "lowest"
        spread = f", mean ± standard deviation over {self.seeds} seeds" if self.seeds > 1 else ", one seed"
        said = [f"{self.split} split, {best} {self.task.primary} first{spread}. {sentence(self.protocol)}".strip()]
        if any(interval_names(m)[0] in line.metrics for m in self.metrics for line in self.lines):
            over = ", each bound the mean over seeds" if self.seeds > 1 else ""
            said.append(f"In brackets: 95 % intervals by bootstrap over the test cases of one run{over}.")
        own = self.settings()
        if own:
            said.append(
                "Each model trained here had its own settings: "
                + "; ".join(f"{model} {', '.join(facts)}" for model, facts in own.items())
                + "."
            )
        else:
            said.append(f"Every model trained here had the same budget ({_budget(self.config)}) and the same data.")
        if any(cell.results["splits"].get("val") for cell in self.cells if cell.results):
            said[-1] += " The best epoch was chosen on the validation split."
        else:
            said[-1] += " There was no validation split, so the last epoch was taken."
        if any(line.cost for line in self.lines):
            cost = next(line.cost for line in self.lines if line.cost)
            said.append(
                f"Costs were measured in turns on one machine, {cost.device}, threads: {cost.threads}; training and "
                f"evaluation in samples a second, batches of {cost.batch_size} and {cost.eval_batch_size}."
            )
        if any(line.kind == "published" for line in self.lines):
            said.append("Published figures come from their papers.")
        return said

    def settings(self) -> dict[str, list[str]]:
        """Budget, differing data options and training time of each model; empty where all had the same terms."""
        configs: dict[str, RunConfig] = {}
        for cell in self.cells:
            configs.setdefault(cell.config.model, cell.config)
        plain = {model: config_to_dict(config) for model, config in configs.items()}
        first = next(iter(plain.values()))
        if all(c["data_args"] == first["data_args"] and c["trainer"] == first["trainer"] for c in plain.values()):
            return {}
        differing = [k for k in first["data_args"] if len({str(c["data_args"][k]) for c in plain.values()}) > 1]
        said = {}
        for model, config in configs.items():
            times = [c.results["train_cpu_seconds"] for c in self.cells if c.config.model == model and c.results]
            said[model] = [f"{key} {plain[model]['data_args'][key]}" for key in differing]
            said[model].append(_budget(config))
            said[model] += [f"{statistics.fmean(times):.0f} CPU-seconds of training"] if times else []
        return said

    def failures(self) -> list[str]:
        return [f"{_name_of(line)}: {line.error}" for line in self.lines if line.error]

    def command(self) -> str:
        """The command line that made the table, or one that makes it again."""
        if sys.argv[1:2] == ["compare"]:
            return shlex.join([self.app.name, *sys.argv[1:]])
        models = dict.fromkeys(c.config.model for c in self.cells)
        mixers = dict.fromkeys(c.mixer for c in self.cells if c.mixer)
        words = [self.app.name, "compare", "--config", f"{NAME}.yaml", "--model", ",".join(models)]
        words += ["--mixer", ",".join(mixers)] if mixers else []
        return shlex.join([*words, "--seeds", str(self.seeds)])

    # -- forms --------------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        rows = [[cell.replace("|", "\\|") for cell in self._row(line)] for line in self.lines]
        head = self.head()
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

        def line(cells: Sequence[str]) -> str:
            words = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
            return f"| {' | '.join(words)} |"

        rule = "|" + "|".join("-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
        parts = [f"# {self.title()}", "\n".join([line(head), rule, *map(line, rows)]), *self.sentences()]
        if failures := self.failures():
            parts.append("Failed:\n" + "\n".join(f"- {text}" for text in failures))
        parts.append(f"Command: `{self.command()}`")
        parts.append("Machine: " + ", ".join(f"{k} {v}" for k, v in self.machine.items()))
        return "\n\n".join(parts)

    def csv(self) -> str:
        """Numbers unrounded; one row a line of the table."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        quality = [f"{m}_{s}" for m in self.all_metrics for s in ("mean", "sd")]
        writer.writerow(["kind", "model", "attention", "source", "seeds", *quality, *self.COSTS, "error"])
        for line in self.lines:
            figures = [v for m in self.all_metrics for v in (line.mean(m), line.sd(m))]
            costs = [getattr(line.cost, c) if line.cost is not None else None for c in self.COSTS]
            count = max((len(v) for v in line.metrics.values()), default=0)
            seeds = count if line.kind == "model" or count > 1 else ""
            writer.writerow([line.kind, line.model, line.mixer, line.source, seeds, *figures, *costs, line.error])
        return out.getvalue()

    def record(self) -> dict[str, Any]:
        rows = [
            {
                "kind": line.kind,
                "model": line.model,
                "mixer": line.mixer or None,
                "source": line.source or None,
                "metrics": {
                    m: {"mean": line.mean(m), "sd": line.sd(m), "values": values} for m, values in line.metrics.items()
                },
                "cost": asdict(line.cost) if line.cost is not None else None,
                "error": line.error or None,
            }
            for line in self.lines
        ]
        return {
            "app": self.app.name,
            "data": self.config.data,
            "split": self.split,
            "protocol": self.protocol,
            "primary": self.task.primary,
            "maximize": self.task.maximize,
            "rows": rows,
            "cells": [
                {
                    "model": c.config.model,
                    "mixer": c.mixer,
                    "seed": c.config.seed,
                    "config": c.digest,
                    "train_seconds": (c.results or {}).get("train_seconds"),
                    "error": c.error or None,
                }
                for c in self.cells
            ],
            "command": self.command(),
            "machine": self.machine,
            "definitions": DEFINITIONS,
            "config": config_to_dict(self.config),
        }

    def html(self, figure: Figure | None) -> str:
        rows = []
        best = next((line for line in self.lines if line.kind == "model"), None)
        for line in self.lines:
            tag = {"model": "", "failed": "failed"}.get(line.kind, line.kind)
            name = page.Markup(
                page.escape(line.model) + (f'<span class="tag">{page.escape(tag)}</span>' if tag else "")
            )
            kind = "mark" if line is best else "fail" if line.kind == "failed" else ""
            rows.append(page.Row(cells=[name, *self._row(line)[1:]], kind=kind))
        failures = "".join(page.paragraph(text) for text in self.failures())
        parts = [
            page.header(self.app.title, self.title(), f"Comparison · {self.machine['date']}"),
            page.paragraph(self.verdict(), "lead"),
            page.section(
                "Results",
                page.table(self.head(), rows, text_columns=(0, 1)),
                *(page.paragraph(text, "small soft") for text in self.sentences()),
            ),
            page.section("What failed", failures),
            page.section(
                "Quality and cost",
                page.picture(figure, "Each point is a row of the table trained here; bars span the seeds.", "f1")
                if figure is not None
                else "",
            ),
            page.section(
                "How this was measured",
                page.facts({COST_NAMES[c]: DEFINITIONS[c] for c in self.COSTS}),
                page.code(self.command()),
                page.fold("All metrics", self._all_metrics()),
                page.fold("Machine", page.facts(self.machine)),
                page.fold("Configuration", page.code(yaml.safe_dump(config_to_dict(self.config), sort_keys=False))),
            ),
        ]
        return page.page(self.title(), "\n".join(part for part in parts if part), wide=True)

    def _all_metrics(self) -> str:
        if len(self.all_metrics) == len(self.metrics):
            return ""
        rows = [
            page.Row(cells=[self._name(line), line.mixer, *(self._quality(line, m) for m in self.all_metrics)])
            for line in self.lines
            if line.kind in ("model", "baseline")
        ]
        return page.table(["model", "attention", *self.all_metrics], rows, text_columns=(0, 1))

    def verdict(self) -> str:
        """One sentence: who came first, by how much, among those trained here."""
        trained = [line for line in self.lines if line.kind == "model"]
        if len(trained) < 2:
            return ""
        first, second = trained[:2]
        p = self.task.primary
        return (
            f"{_name_of(first)} comes first with {p} {self._quality(first, p)}, "
            f"then {_name_of(second)} with {self._quality(second, p)}."
        )

    def plot(self) -> Figure | None:
        """Quality against operations, time and memory."""
        trained = [line for line in self.lines if line.kind == "model" and line.cost is not None]
        panels = (
            ("operations a sample", lambda c: c.flops),
            ("training, ms a sample", lambda c: 1000 / c.train_samples_per_s if c.train_samples_per_s else None),
            ("peak memory, MiB", lambda c: c.peak_memory_mb),
        )
        points = [line for line in trained if math.isfinite(line.mean(self.task.primary) or math.nan)]
        if not points:
            return None
        fig = plotting.figure(9.5, 3.4 + 0.22 * ((len(points) + 3) // 4))
        with plotting.style():
            grid = fig.subplots(1, 3, sharey=True)
            for axes, (label, value) in zip(grid, panels):
                for i, line in enumerate(points):
                    assert line.cost is not None
                    x = value(line.cost)
                    if not x:  # a log axis has no place for nothing
                        continue
                    axes.errorbar(
                        x,
                        line.mean(self.task.primary),
                        yerr=line.sd(self.task.primary),
                        color=plotting.COLOURS[i % len(plotting.COLOURS)],
                        marker=_MARKERS[(i // len(plotting.COLOURS)) % len(_MARKERS)],
                        markersize=7,
                        capsize=3,
                        linestyle="none",
                        label=_name_of(line),
                    )
                drawn = [x for line in points if (x := value(line.cost))]
                if drawn and max(drawn) > 8 * min(drawn):
                    axes.set_xscale("log")
                else:
                    axes.set_xlim(0, 1.15 * max(drawn, default=1.0))
                    axes.xaxis.set_major_locator(MaxNLocator(4))
                    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.set_xlabel(label)
            grid[0].set_ylabel(f"{self.task.primary} ({'higher' if self.task.maximize else 'lower'} is better)")
            found: dict[str, Any] = {}
            for axes in grid:
                for handle, name in zip(*axes.get_legend_handles_labels()):
                    found.setdefault(name, handle)
            fig.legend(list(found.values()), list(found), loc="outside lower center", ncols=4)
        return fig


def _budget(config: RunConfig) -> str:
    t = config.trainer
    text = f"{t.max_epochs} epoch{'s' if t.max_epochs != 1 else ''} at most"
    if t.max_steps is not None:
        text += f", {t.max_steps:,} steps"
    if t.max_minutes is not None:
        text += f", {t.max_minutes:g} minutes"
    return f"{text}, batches of {t.batch_size}"


def _name_of(line: Line) -> str:
    return f"{line.model} with {line.mixer}" if line.mixer else line.model
