"""The report of a run: one HTML file that holds everything and needs nothing."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from matplotlib.figure import Figure

from attn_shared import page, plotting
from attn_shared.app import App
from attn_shared.page import Figures, Markup, Row
from attn_shared.profiling import DEFINITIONS, machine
from attn_shared.runs import Run, slug, write_atomically
from attn_shared.task import DataBundle, Sound, Task
from core_attn import capture

COST_NAMES = {
    "parameters": "Parameters",
    "flops": "Operations a sample",
    "train_samples_per_s": "Training, samples/s",
    "eval_samples_per_s": "Evaluation, samples/s",
    "latency_ms": "Latency, ms",
    "peak_memory_mb": "Peak memory, MiB",
}
MAP_LAYERS, MAP_HEADS, MAP_SIDE = 4, 4, 256


def write_report(app: App, run: Run, task: Task, bundle: DataBundle) -> Path:
    """Write `report.html` of a finished run, and its figures under `plots/`.

    Weights, modes and random states of the task stay as they are.

    Raises:
        UserError: the run has not finished (no metrics.json).
    """
    results = run.results()
    config = run.config()
    report = _Report(app, run, task, bundle, results, config)
    write_atomically(run.report, report.html())
    return run.report


def main_metrics(task: Task | type[Task], figures: Mapping[str, Any], limit: int = 6) -> list[str]:
    """Metrics that stand in tables: the primary, then the first that the task gives a format, or the first of all."""
    named = [name for name in task.metric_format if name in figures] or list(figures)
    return [task.primary, *(name for name in named if name != task.primary)][:limit]


def metric_text(task: Task | type[Task], name: str, value: Any) -> str:
    """A metric as the task wants it shown: its `metric_format` is a format such as ".3f"."""
    return page.number(value, task.metric_format.get(name, "") if isinstance(value, float) else "")


def sentence(text: str) -> str:
    """`text` with a full stop."""
    text = text.strip()
    return text if not text or text[-1] in ".!?" else f"{text}."


def sort_key(task: Task | type[Task], value: Any) -> tuple[bool, float]:
    """Orders table rows best first; rows without the figure come last."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return (True, 0.0)
    return (False, -value if task.maximize else value)


class _Report:
    def __init__(
        self,
        app: App,
        run: Run,
        task: Task,
        bundle: DataBundle,
        results: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        self.app, self.run, self.task, self.bundle = app, run, task, bundle
        self.results, self.config = results, config
        self.card = app.models.get(str(results["model"]))
        self.dataset = app.datasets.get(str(results["data"]))
        splits = results["splits"]
        self.split = "test" if splits.get("test") else next((s for s in splits if splits[s]), "test")
        self.figures: Mapping[str, float] = splits.get(self.split) or {}
        self.metrics = main_metrics(task, self.figures)
        self.figure_count = 0

    # -- the page -----------------------------------------------------------------------------------------------------

    def html(self) -> str:
        data_name = Path(str(self.results["data"])).name
        model = str(self.results["model"])
        title = f"{model} on {data_name}"
        mixer = self.results.get("mixer") or (self.card.mixer if self.card else None)
        under = " · ".join(
            str(part)
            for part in (
                self.card.title if self.card else "",
                self.dataset.title if self.dataset else "",
                f"attention: {mixer}" if mixer else "",
                f"seed {self.results.get('seed', 0)}",
            )
            if part
        )
        body = [
            page.header(self.app.title, title, under),
            page.cards(self._key_figures()),
            page.paragraph(self._verdict(), "lead"),
            page.section("Results", self._results_table(), page.paragraph(self._protocol(), "small soft")),
            page.section("Pictures of the task", *self._pictures()),
            page.section("Training", self._curves(), page.paragraph(self._training_sentence(), "small soft")),
            page.section("What the model attends to", *self._attention()),
            page.section("Cost", self._cost(), self._cost_notes()),
            page.section("Data", self._data()),
            page.section("Do it again", *self._commands()),
            page.section("Details", self._all_figures(), self._configuration(), self._environment()),
            f"<footer>{page.escape(self.app.name)} · {page.escape(self.run.path.name)}</footer>",
        ]
        return page.page(title, "\n".join(part for part in body if part))

    def _text(self, name: str, value: Any) -> str:
        return metric_text(self.task, name, value)

    def _key_figures(self) -> list[Figures]:
        primary = self.task.primary
        cost = self.results.get("cost") or {}
        figures = [
            Figures(
                name=f"{primary}, {self.split}",
                value=self._text(primary, self.figures.get(primary)),
                note="higher is better" if self.task.maximize else "lower is better",
            )
        ]
        figures += [Figures(name=f"{m}, {self.split}", value=self._text(m, self.figures[m])) for m in self.metrics[1:2]]
        if (seconds := self.results.get("train_seconds")) is not None:
            epochs = self.results.get("epochs")
            figures.append(
                Figures(name="training", value=page.duration(seconds), note=f"{epochs} epochs" if epochs else "")
            )
        if cost:
            figures.append(Figures(name="parameters", value=page.big(cost.get("parameters"))))
            figures.append(
                Figures(name="latency", value=f"{page.number(cost.get('latency_ms'), '.3g')} ms", note="one sample")
            )
            figures.append(
                Figures(
                    name="peak memory", value=f"{page.number(cost.get('peak_memory_mb'), '.0f')} MiB", note="training"
                )
            )
        return figures

    def _verdict(self) -> str:
        """How the model stands against the best baseline, and against its own published figure or else the best."""
        primary = self.task.primary
        own = self.figures.get(primary)
        if own is None or not math.isfinite(own):
            return ""
        parts = []
        for kind, key in (("the best baseline", "baselines"), ("the best published figure", "published")):
            rows = [r for r in self.results.get(key) or [] if isinstance(r.get(primary), int | float)]
            rows = [r for r in rows if not r.get("oracle")]
            if not rows:
                continue
            if key == "published" and (same := [r for r in rows if r.get("model") == self.results["model"]]):
                rows, kind = same, "its published figure"
            best = min(rows, key=lambda r: sort_key(self.task, r[primary]))
            value = best[primary]
            if not value:
                continue
            gain = (own - value) / abs(value) * (1 if self.task.maximize else -1)
            how = (
                "level with"
                if abs(gain) < 0.0005
                else f"{abs(gain):{'.0%' if abs(gain) >= 0.1 else '.1%'}} {'better' if gain > 0 else 'worse'} than"
            )
            parts.append(f"{how} {kind} ({best.get('model', '?')}, {self._text(primary, value)})")
        if not parts:
            return ""
        return f"{primary} {self._text(primary, own)} on the {self.split} split: {' and '.join(parts)}."

    def _results_table(self) -> str:
        primary = self.task.primary
        rows: list[tuple[Mapping[str, Any], str, str]] = [
            ({"model": self.results["model"], **self.figures}, "this run", "mark")
        ]
        rows += [
            (row, "oracle" if row.get("oracle") else "baseline", "") for row in self.results.get("baselines") or []
        ]
        rows += [(row, "published", "") for row in self.results.get("published") or []]
        rows.sort(key=lambda r: sort_key(self.task, r[0].get(primary)))
        metrics = [m for m in self.metrics if any(m in row for row, _, _ in rows)]
        best = {
            m: min(
                (r.get(m) for r, _, _ in rows if r.get(m) is not None),
                key=lambda v: sort_key(self.task, v),
                default=None,
            )
            for m in metrics[:1]
        }
        body = []
        for row, tag, kind in rows:
            name = Markup(f'{page.escape(row.get("model", "?"))}<span class="tag">{page.escape(tag)}</span>')
            cells: list[Any] = [name]
            for m in metrics:
                text = self._text(m, row.get(m))
                is_best = m in best and row.get(m) is not None and row.get(m) == best[m]
                cells.append(Markup(f'<span class="best">{page.escape(text)}</span>') if is_best else text)
            cells.append(row.get("source") or row.get("note") or "")
            body.append(Row(cells=cells, kind=kind))
        if not any(row.cells[-1] for row in body):
            return page.table(["model", *metrics], [Row(cells=row.cells[:-1], kind=row.kind) for row in body])
        # The source reads best beside the name; numbers stay to the right.
        moved = [Row(cells=[row.cells[0], row.cells[-1], *row.cells[1:-1]], kind=row.kind) for row in body]
        return page.table(["model", "source", *metrics], moved, text_columns=(0, 1))

    def _protocol(self) -> str:
        text = sentence(str(self.results.get("protocol") or self.bundle.protocol))
        note = "Published figures come from their papers; everything else was measured in this run."
        return " ".join(part for part in (text, note if self.results.get("published") else "") if part)

    # -- figures ------------------------------------------------------------------------------------------------------

    def _figure(self, fig: Figure, name: str, caption: str, sounds: Sequence[Sound] = ()) -> str:
        self.figure_count += 1
        self.run.plots.mkdir(exist_ok=True)
        (self.run.plots / f"{slug(name)}.png").write_bytes(plotting.png(fig))
        return page.picture(fig, caption, f"f{self.figure_count}", page.players(sounds))

    def _pictures(self) -> list[str]:
        with _as_it_was(self.task):
            return [self._figure(p.figure, p.name, p.caption, p.sounds) for p in self.task.pictures(self.bundle)]

    def _curves(self) -> str:
        rows = self.run.read_metrics()
        score = f"val_{self.task.primary}"
        losses = [
            (r["step"], r["train_loss"]) for r in rows if r.get("train_loss") is not None and r.get(score) is None
        ]
        epochs = [
            (r["step"], r["train_loss"]) for r in rows if r.get("train_loss") is not None and r.get(score) is not None
        ]
        scores = [(r["step"], r[score]) for r in rows if r.get(score) is not None]
        if not losses and not scores:
            return ""
        fig = plotting.figure(9, 3.1)
        with plotting.style():
            left, right = fig.subplots(1, 2)
            if losses:
                left.plot(*zip(*losses), color=plotting.COLOURS[0], alpha=0.6, linewidth=1, label="of single steps")
            if epochs:
                left.plot(*zip(*epochs), color=plotting.COLOURS[0], marker="o", markersize=4, label="mean of the epoch")
            left.set(title="training loss", xlabel="optimiser step")
            if losses or epochs:
                left.legend()
            if scores:
                right.plot(*zip(*scores), color=plotting.COLOURS[1], marker="o", markersize=4)
            best = min(scores, key=lambda s: sort_key(self.task, s[1]), default=None)
            if best is not None:
                right.plot(
                    *best, marker="o", markersize=10, fillstyle="none", color=plotting.COLOURS[2], linestyle="none"
                )
                right.annotate(
                    f"best: {self._text(self.task.primary, best[1])}",
                    best,
                    xytext=(0.97, 0.93),
                    textcoords="axes fraction",
                    ha="right",
                    va="top",
                    color=plotting.COLOURS[2],
                    fontweight="bold",
                )
            right.set(title=f"{self.task.primary}, validation", xlabel="optimiser step")
            for axes in (left, right):
                axes.margins(x=0.03)
        return self._figure(fig, "training", "The loss of training and the score that chooses the best epoch.")

    def _training_sentence(self) -> str:
        r = self.results
        if not r.get("steps"):
            return ""
        parts = [f"{r['steps']:,} steps in {r.get('epochs', '?')} epochs"]
        if r.get("train_seconds") is not None:
            cpu = r.get("train_cpu_seconds")
            parts.append(
                f"{page.duration(r['train_seconds'])}" + (f" ({page.duration(cpu)} of processor time)" if cpu else "")
            )
        best = r.get("best") or {}
        if best.get("epoch") is not None:
            parts.append(f"the weights are those of epoch {best['epoch'] + 1}")
        return ", ".join(parts) + "."

    def _attention(self) -> list[str]:
        """Attention maps of one real sample, where the mechanism has maps that can be read."""
        model = self.task.model
        device = next(iter(model.parameters()), torch.empty(0)).device
        try:
            with _as_it_was(self.task), torch.no_grad():
                batch = move_data_to_device(self.task.example_batch(self.bundle, 1), device)
                self.task.eval()
                with capture(model) as maps:
                    self.task.forward_batch(batch)
                found = {name: maps[name][0].float().cpu() for name in maps}
        except ValueError as error:  # no mechanism in this model, or none with maps
            return [page.paragraph(f"Nothing to show: {error}.", "soft")] if self.card and self.card.mixer else []
        if not found:
            return []
        names = list(found)
        chosen = (
            names if len(names) <= MAP_LAYERS else [names[i * (len(names) - 1) // (MAP_LAYERS - 1)] for i in range(4)]
        )
        heads = min(MAP_HEADS, max(found[n].shape[0] for n in chosen))
        fig = plotting.figure(9, 2.35 * len(chosen) + 0.2)
        with plotting.style():
            grid = fig.subplots(len(chosen), heads, squeeze=False)
            for line, name in zip(grid, chosen):
                for head, axes in enumerate(line):
                    axes.grid(False)
                    if head >= found[name].shape[0]:
                        axes.set_axis_off()
                        continue
                    shown = _shrunk(found[name][head])
                    rows, columns = found[name][head].shape
                    axes.imshow(
                        shown.numpy(),
                        cmap=plotting.SEQUENTIAL,
                        aspect="auto",
                        interpolation="nearest",
                        extent=(0, columns, rows, 0),
                    )
                    axes.set_title(f"head {head + 1}", fontsize=9)
                    axes.tick_params(labelsize=7)
                    if head == 0:
                        axes.set_ylabel(name.removeprefix("model."), fontsize=8)
        total = f"{len(chosen)} of {len(names)} layers" if len(names) > len(chosen) else f"{len(names)} layers"
        caption = (
            f"Attention of one sample, {total}, up to {MAP_HEADS} heads each: a row for each token that reads, "
            "a column for each token that is read; brighter is more."
        )
        return [self._figure(fig, "attention", caption)]

    # -- facts --------------------------------------------------------------------------------------------------------

    def _cost(self) -> str:
        cost = self.results.get("cost") or {}
        rows = [
            Row(cells=[title, cost_text(key, cost.get(key)), DEFINITIONS[key]])
            for key, title in COST_NAMES.items()
            if key in cost
        ]
        return page.table(["", "figure", "what is measured"], rows, text_columns=(0, 2))

    def _cost_notes(self) -> str:
        cost = self.results.get("cost") or {}
        if not cost:
            return ""
        text = (
            f"Measured after training on {cost.get('device', '?')}, threads: {cost.get('threads', '?')}; batches of "
            f"{cost.get('batch_size', '?')} (training) and {cost.get('eval_batch_size', '?')} (evaluation)."
        )
        if cost.get("uncounted"):
            text += f" Operators whose operations are not counted: {', '.join(cost['uncounted'])}."
        return page.paragraph(text, "small soft")

    def _data(self) -> str:
        pairs: dict[str, Any] = {}
        if self.dataset is not None:
            card = self.dataset
            pairs = {
                "Name": f"{card.title} ({card.name})" + (", SYNTHETIC" if card.synthetic else ""),
                "Task": card.task,
                "Licence": card.licence,
                "Source": card.source,
                "Size": card.size,
                "Splits": card.split,
                "Citation": card.citation,
                **{k.capitalize(): v for k, v in card.facts.items()},
            }
        else:
            pairs = {"File": Path(str(self.results["data"])).name}
        found = {k.replace("_", " ").capitalize(): _fact(v) for k, v in self.bundle.facts.items()}
        return page.facts(pairs) + (page.paragraph("Found in the data:", "soft") + page.facts(found) if found else "")

    def _commands(self) -> list[str]:
        name, where = self.app.name, shlex.quote(_short(self.run.path))
        suffix = self.app.file_suffixes[0] if self.app.file_suffixes else ""
        lines = [
            "# the same training again",
            f"{name} train --config {shlex.quote(_short(self.run.path / 'config.yaml'))}",
            "# the table above from the saved weights",
            f"{name} eval {where}",
            "# predictions for files of your own",
            f"{name} predict {where} INPUT{suffix} --output predictions",
        ]
        return [page.code("\n".join(lines))]

    def _all_figures(self) -> str:
        splits = {name: figures for name, figures in self.results["splits"].items() if figures}
        metrics = list(dict.fromkeys(m for figures in splits.values() for m in figures))
        rows = [Row(cells=[m, *(self._text(m, figures.get(m)) for figures in splits.values())]) for m in metrics]
        return page.fold("All metrics of all splits", page.table(["metric", *splits], rows))

    def _configuration(self) -> str:
        return page.fold(
            "Configuration", page.code(yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))
        )

    def _environment(self) -> str:
        facts = {**machine(), **(self.results.get("versions") or {})}
        return page.fold("Environment", page.facts(facts))


def cost_text(key: str, value: Any) -> str:
    """A figure of `Cost` for a table."""
    if value is None:
        return page.NONE
    if key in ("parameters", "flops"):
        return page.big(value)
    return page.number(float(value), ",.0f" if value >= 100 else ".3g")


def _fact(value: Any) -> Any:
    if isinstance(value, float):
        return page.number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_fact(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(_fact(v)) for v in value)
    return value


def _shrunk(weights: torch.Tensor) -> torch.Tensor:
    """At most MAP_SIDE cells a side, each the mean of what it covers."""
    rows, columns = (min(MAP_SIDE, extent) for extent in weights.shape)
    return torch.nn.functional.adaptive_avg_pool2d(weights[None, None], (rows, columns))[0, 0]


def _short(path: Path) -> str:
    """`path` as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


class _as_it_was:
    """Keeps train and eval modes and the random state of a task over a block."""

    def __init__(self, task: Task) -> None:
        self.modes = [(module, module.training) for module in task.modules()]
        self.fork = torch.random.fork_rng()

    def __enter__(self) -> None:
        self.fork.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
        for module, training in self.modes:
            module.training = training
