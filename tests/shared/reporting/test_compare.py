"""compare.py with a trainer that writes results at once: the grid, reuse, failures, and the forms of the table."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_shared import compare as module
from attn_shared import trainer
from attn_shared.app import DataFile
from attn_shared.cli import run
from attn_shared.compare import compare
from attn_shared.config import OptimConfig, RunConfig
from attn_shared.errors import UserError
from attn_shared.profiling import Cost, measure_costs
from attn_shared.runs import Run
from core_attn import registry

SCORES = {"flow": 1.0, "auto_correlation": 2.0, None: 1.0}


class Stub:
    """In place of the trainer: remembers what it was asked, writes a run with a known result."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.trained: list[RunConfig] = []
        self.resumed: list[Path | None] = []
        self.faults: dict[tuple[str | None, int], BaseException] = {}
        self.published: list[dict[str, Any]] = []
        self.more: dict[str, float] = {}

    def train(self, app: Any, config: RunConfig, *, resume: Path | None = None) -> Path:
        self.trained.append(config)
        self.resumed.append(resume)
        fault = self.faults.get((config.mixer, config.seed))
        if fault is not None:
            raise fault
        score = SCORES[config.mixer] + 0.1 * config.seed
        changes: dict[str, Any] = {"splits": {"val": {}, "test": {"mse": score, "mae": score / 2, **self.more}}}
        if self.published:
            changes["published"] = self.published
        run: Run = self.world.run(config, **changes)
        return run.path

    def load_task(self, app: Any, source: Path) -> tuple[Any, RunConfig]:
        saved = Run.open(source).config()
        config = next(c for c in self.trained if (c.mixer, c.model) == (saved["mixer"], saved["model"]))
        return self.world.task(config)[0], config


@pytest.fixture
def stub(world: Any, monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub(world)
    monkeypatch.setattr(trainer, "train", made.train)
    monkeypatch.setattr(trainer, "load_task", made.load_task)
    monkeypatch.setattr(module, "measure_costs", lambda entries: [COST] * len(entries))
    monkeypatch.setattr(module._Table, "plot", lambda table: None)
    return made


COST = Cost(
    parameters=100,
    flops=1000,
    train_samples_per_s=10.0,
    latency_ms=1.0,
    eval_samples_per_s=20.0,
    peak_memory_mb=3.0,
    batch_size=32,
    eval_batch_size=64,
    device="cpu",
    threads=1,
)
PLOT = module._Table.plot


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]


MIXERS = ("flow", "auto_correlation")


def test_missing_data_is_said_once_and_nothing_is_trained(
    world: Any, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTN_DATA", str(tmp_path))
    (card,) = (card for name, card in world.app.datasets.items() if name == world.config().data)
    far = dataclasses.replace(card, embedded=False, files=(DataFile(path="sums/a.csv"),), manual="ask for it")
    app = dataclasses.replace(world.app, datasets={far.name: far})
    assert run(app, ["compare", "--data", far.name, "--seeds", "3", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "is not under" in said
    assert "ask for it" in said
    assert not stub.trained
    assert not (tmp_path / "out").exists()


def test_grid_table_and_files(
    world: Any, stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_costs", lambda entries: measure_costs(entries, seconds=0.0))
    monkeypatch.setattr(module._Table, "plot", PLOT)
    folder = compare(world.app, world.config(), mixers=MIXERS, seeds=2)
    assert folder == world.root / "runs" / "sums" / "compare" / "mix-sums"
    # The model's own mechanism by its name is its own; every seed of every mechanism once.
    assert [(c.mixer, c.seed) for c in stub.trained] == [
        (None, 0),
        (None, 1),
        ("auto_correlation", 0),
        ("auto_correlation", 1),
    ]
    assert len({json.dumps(dataclasses.asdict(c.trainer)) for c in stub.trained}) == 1
    found = rows(folder)
    assert [(r["kind"], r["model"], r["mixer"]) for r in found] == [
        ("baseline", "linear", None),
        ("published", "Paper", None),
        ("model", "mix", "flow"),
        ("model", "mix", "auto_correlation"),
        ("baseline", "zero", None),
    ]
    assert found[2]["metrics"]["mse"] == {
        "mean": pytest.approx(1.05),
        "sd": pytest.approx(0.0707107, abs=1e-6),
        "values": [1.0, 1.1],
    }
    assert found[2]["cost"]["parameters"] > 1000
    assert found[0]["cost"] is None

    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "comparison.md").read_text(encoding="utf-8").strip()
    assert "| mix " in printed
    assert "1.050 ± 0.071" in printed
    assert "All 60 test sequences" in printed
    assert "mean ± standard deviation over 2 seeds" in printed
    assert "2 epochs at most, batches of 32" in printed
    assert "Command: `sums compare --config comparison.yaml --model mix --mixer flow,auto_correlation" in printed
    table = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [r["mse_mean"] for r in table][:2] == ["0.5", "1.0"]
    assert float(table[2]["mse_sd"]) == pytest.approx(0.0707107, abs=1e-6)
    assert table[2]["seeds"] == "2"
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "mix with flow comes first" in page
    assert page.count("<tr class=mark>") == 1
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert (folder / "plots" / "quality_cost.png").stat().st_size > 1000
    assert (folder / "comparison.yaml").exists()


def test_finished_cells_are_used_again(world: Any, stub: Stub) -> None:
    config = world.config()
    compare(world.app, config, mixers=["flow"])
    compare(world.app, config, mixers=MIXERS)
    assert [c.mixer for c in stub.trained] == [None, "auto_correlation"]
    # What does not match is trained: another budget, another model option, another seed.
    changes: list[Callable[[], RunConfig]] = [
        lambda: world.config(trainer=dataclasses.replace(config.trainer, max_epochs=3)),
        lambda: world.config(model_args=dataclasses.replace(config.model_args, width=8)),
        lambda: world.config(optim=OptimConfig(lr=0.5)),
    ]
    for number, change in enumerate(changes, 3):
        compare(world.app, change(), mixers=["flow"])
        assert len(stub.trained) == number
    compare(world.app, config, mixers=["flow"], seeds=2)
    assert len(stub.trained) == 6
    assert stub.trained[-1].seed == 1


def test_changed_data_file_is_no_reason_to_reuse(world: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.root / "mine.csv"
    for content, times in (("a", 1), ("a", 1), ("b", 2)):
        file.write_text(content)
        compare(world.app, world.config(data=str(file)), mixers=["flow"])
        assert len(stub.trained) == times


def test_removed_run_is_trained_again(world: Any, stub: Stub) -> None:
    folder = compare(world.app, world.config(), mixers=["flow"])
    for results in folder.rglob("metrics.json"):
        results.unlink()
    compare(world.app, world.config(), mixers=["flow"])
    assert len(stub.trained) == 2


def test_moved_folder_is_used_again(world: Any, stub: Stub) -> None:
    folder = compare(world.app, world.config(), mixers=["flow"])
    folder.rename(world.root / "moved")
    compare(world.app, world.config(), mixers=["flow"], output=world.root / "moved")
    assert len(stub.trained) == 1


def test_one_failure_costs_only_itself(world: Any, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.faults[("auto_correlation", 0)] = RuntimeError("out of memory: <tried> 5 GiB\nlong story")
    folder = compare(world.app, world.config(), mixers=[*reversed(MIXERS)])
    found = rows(folder)
    assert [(r["kind"], r["mixer"]) for r in found if r["kind"] in ("model", "failed")] == [
        ("model", "flow"),
        ("failed", "auto_correlation"),
    ]
    assert found[-1]["error"] == "RuntimeError: out of memory: <tried> 5 GiB"
    assert "mix with auto_correlation: RuntimeError: out of memory" in capsys.readouterr().out
    assert "&lt;tried&gt; 5 GiB" in (folder / "comparison.html").read_text(encoding="utf-8")
    # Failures are not remembered: the next call tries again.
    stub.faults.clear()
    compare(world.app, world.config(), mixers=MIXERS)
    assert [r["kind"] for r in rows(folder) if r["mixer"]] == ["model", "model"]
    assert [c.mixer for c in stub.trained] == ["auto_correlation", None, "auto_correlation"]


def test_failed_seed_is_told_beside_the_others(world: Any, stub: Stub) -> None:
    stub.faults[(None, 1)] = UserError("the loss is not a number")
    folder = compare(world.app, world.config(), mixers=["flow"], seeds=3)
    row = next(r for r in rows(folder) if r["kind"] == "model")
    assert row["metrics"]["mse"]["values"] == [1.0, 1.2]
    assert row["error"] == "1 of 3 seeds failed: the loss is not a number"


def test_all_failed(world: Any, stub: Stub) -> None:
    stub.faults[(None, 0)] = UserError("there is no data")
    with pytest.raises(UserError, match="no training of the comparison succeeded; the first failed so: there is no"):
        compare(world.app, world.config(), mixers=["flow"], output=world.root / "out")
    assert "there is no data" in (world.root / "out" / "comparison.md").read_text(encoding="utf-8")


def test_interrupted_cell_is_gone_on_with(world: Any, stub: Stub) -> None:
    config = world.config()
    begun = world.run(dataclasses.replace(config, runs=str(world.root / "out" / "cells"))).path
    stub.faults[(None, 0)] = trainer.Interrupted(begun, 7)
    with pytest.raises(KeyboardInterrupt):
        compare(world.app, config, mixers=MIXERS, output=world.root / "out")
    assert stub.resumed == [None]
    stub.faults.clear()
    compare(world.app, config, mixers=MIXERS, output=world.root / "out")
    assert stub.resumed[1].resolve() == begun.resolve()
    assert stub.resumed[2] is None


def test_mechanism_that_does_not_fit_is_refused_first(world: Any, stub: Stub) -> None:
    fit = [n for n in registry.names() if "causal_cross" in registry.get(n).info.patterns]
    unfit = next(n for n in registry.names() if "causal_cross" not in registry.get(n).info.patterns)
    with pytest.raises(UserError, match=f"{unfit} cannot replace the attention of far.*{fit[0] if fit else 'none'}"):
        compare(world.app, world.config(), mixers=["flow", unfit], models=["mix", "far"])
    with pytest.raises(UserError, match="did you mean 'flow'"):
        compare(world.app, world.config(), mixers=["flwo"])
    with pytest.raises(UserError, match="no tokens are mixed"):
        compare(world.app, world.config(model="zero"), mixers=["flow"])
    with pytest.raises(UserError, match="mixer_args belong to one mechanism"):
        compare(world.app, world.config(mixer_args={"a": 1}), mixers=MIXERS)
    many = dataclasses.replace(world.config().trainer, devices=2)
    with pytest.raises(UserError, match="one process"):
        compare(world.app, world.config(trainer=many), mixers=MIXERS)
    assert stub.trained == []


def test_all_stands_for_every_fitting_mechanism(world: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = module.fitting(world.app.models["mix"])
    assert set(MIXERS) <= set(fit)
    assert fit == [n for n in registry.names() if "noncausal_self" in registry.get(n).info.patterns]
    monkeypatch.setattr(module, "fitting", lambda card: list(MIXERS))
    compare(world.app, world.config(), mixers=["all"])
    assert [c.mixer for c in stub.trained] == ["auto_correlation", None] or [c.mixer for c in stub.trained] == [
        None,
        "auto_correlation",
    ]


def test_several_models(world: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without tokens takes part once; options that others have go along, and every budget is the same."""
    monkeypatch.setattr(module, "measure_costs", lambda entries: measure_costs(entries, seconds=0.0))
    config = world.config(model_args=world.app.models["mix"].config(width=24), optim=OptimConfig(lr=0.5))
    folder = compare(world.app, config, mixers=["auto_correlation"], models=["mix", "zero"])
    assert [(c.model, c.mixer) for c in stub.trained] == [("mix", "auto_correlation"), ("zero", None)]
    mix, zero = stub.trained
    assert mix.model_args.width == 24
    assert zero.trainer == mix.trainer
    assert zero.data_args == mix.data_args
    assert zero.optim.lr == 0.5
    found = rows(folder)
    # The rule that takes part does not stand there as a baseline as well.
    assert [r["kind"] for r in found if r["model"] == "zero"] == ["model"]
    zero_row = next(r for r in found if r["model"] == "zero")
    assert zero_row["cost"]["train_samples_per_s"] is None


def test_text_of_other_people_cannot_break_the_table(world: Any, stub: Stub) -> None:
    stub.published = [{"model": "a|b <i>", "source": "x|y", "mse": 0.1}]
    folder = compare(world.app, world.config(), mixers=["flow"])
    lines = [
        line for line in (folder / "comparison.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"\|", lines[0]))}
    assert "<i>" not in (folder / "comparison.html").read_text(encoding="utf-8")


def test_cost_that_cannot_be_measured(world: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entries: Sequence[Any]) -> list[Any]:
        if any(config.mixer is None for _, _, config in entries):
            raise torch.OutOfMemoryError("too big")
        return [COST] * len(entries)

    monkeypatch.setattr(module, "measure_costs", refuse)
    found = {r["mixer"]: r for r in rows(compare(world.app, world.config(), mixers=MIXERS)) if r["kind"] == "model"}
    assert found["flow"]["cost"] is None
    assert found["auto_correlation"]["cost"]["flops"] > 0


def test_own_settings_are_kept_and_named(world: Any, stub: Stub) -> None:
    mix, zero = world.config(), world.config(model="zero")
    zero = dataclasses.replace(
        zero,
        data_args=dataclasses.replace(zero.data_args, length=20),
        trainer=dataclasses.replace(zero.trainer, max_epochs=7),
    )
    settings = {"mix": mix, "zero": zero}
    folder = compare(world.app, mix, mixers=["flow"], models=["mix", "zero"], settings=settings)
    assert [(c.model, c.data_args.length, c.trainer.max_epochs) for c in stub.trained] == [
        ("mix", 12, 2),
        ("zero", 20, 7),
    ]
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "own settings: mix length 12, 2 epochs at most, batches of 32, 60 CPU-seconds of training; zero" in text
    assert "length 20, 7 epochs at most" in text
    assert "same budget" not in text
    # On equal terms, the second model takes part under the first one's data and budget.
    equal = compare(world.app, mix, mixers=["flow"], models=["mix", "zero"], output=world.root / "equal")
    assert (stub.trained[-1].data_args.length, stub.trained[-1].trainer.max_epochs) == (12, 2)
    assert "same budget (2 epochs at most, batches of 32)" in (equal / "comparison.md").read_text(encoding="utf-8")


def test_baselines_gather_their_figures_over_seeds() -> None:
    def cell(seed: int, model: str, *baselines: dict[str, Any]) -> module.Cell:
        config = RunConfig(app="sums", model=model, model_args=None, data="sums", data_args=None, seed=seed)
        results = {"splits": {"test": {"mse": 1.0}}, "baselines": list(baselines)}
        return module.Cell(config=config, mixer=None, digest="", results=results, error="")

    same = {"model": "zero", "mse": 4.0, "mae": float("nan")}
    cells = [
        cell(0, "a", same, {"model": "linear", "mse": 1.0}),
        cell(1, "a", same, {"model": "linear", "mse": 2.0}),
        cell(0, "b", same, {"model": "linear", "mse": 1.0}),
        cell(1, "b", same, {"model": "linear", "mse": 2.0}, {"model": "late", "mse": 3.0}),
    ]
    found = {line.model: line for line in module._rows_beside(cells, {"a", "b"})}
    assert found["linear"].metrics == {"mse": [1.0, 2.0]}  # a value a seed, not a run
    assert found["zero"].metrics["mse"] == [4.0]  # no seed changes it
    assert found["late"].metrics == {"mse": [3.0]}
    assert not module._rows_beside(cells, {"a", "zero", "linear", "late"})


def test_intervals_stand_beside_their_metric(world: Any, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.more = {"mse, 95% from": 0.25, "mse, 95% to": 1.75}
    compare(world.app, world.config(), mixers=[None], seeds=2)
    printed = capsys.readouterr().out
    assert "| 1.050 ± 0.071 [0.250, 1.750] |" in printed
    assert "intervals by bootstrap over the test cases of one run, each bound the mean over seeds" in printed


def test_protocols_of_seeds_are_told_in_one() -> None:
    assert module.merged(["fold 2 of 6, 1,180 windows", "fold 10 of 6, 990 windows"]) == (
        "fold 2-10 of 6, 990-1,180 windows"
    )
    assert module.merged(["step 0.5 s", "step 2.25 s"]) == "step 0.5-2.25 s"
    assert module.merged(["a", "a"]) == "a"
    assert module.merged(["a 1", "b 1"]) == "a 1; b 1"
    assert module.merged([]) == ""
