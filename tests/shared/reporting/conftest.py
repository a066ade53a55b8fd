"""A small application whose models learn in no time: the sum of a noisy sequence from its tokens."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import core_attn
from attn_shared import plotting
from attn_shared.app import App, DataCard, ModelCard
from attn_shared.config import RunConfig, TrainerConfig
from attn_shared.runs import Run
from attn_shared.task import DataBundle, Picture, Task


@dataclass(kw_only=True)
class Mixing:
    width: int = 16
    heads: int = 2


@dataclass(kw_only=True)
class Rule:
    pass


@dataclass(kw_only=True)
class SumData:
    length: int = 12


class Sums(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, length, 4, generator=generator)
        self.y = self.x.sum((1, 2))

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, index: list[int]) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Mixer(nn.Module):
    def __init__(self, options: Mixing, mixer: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.inward = nn.Linear(4, options.width)
        self.layers = nn.ModuleList(
            core_attn.build(mixer, dim=options.width, heads=options.heads, **arguments) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(options.width)  # a buffer that training changes
        self.dropout = nn.Dropout(0.1)  # a draw that training makes
        self.out = nn.Linear(options.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inward(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.out(self.dropout(self.norm(h.mean(1)))).squeeze(-1)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))


class SumTask(Task):
    primary = "mse"
    metric_format = {"mse": ".3f", "mae": ".3f"}  # noqa: RUF012

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        self.net = (
            Zero() if config.model == "zero" else Mixer(config.model_args, config.mixer or "flow", config.mixer_args)
        )

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        train, val, test = (Sums(n, config.data_args.length, seed) for seed, n in enumerate((200, 40, 60)))
        return DataBundle(
            train=train,
            val=val,
            test=test,
            state={"scale": 1.0},
            facts={"samples": {"train": 200, "val": 40, "test": 60}, "largest": 3.14159, "<odd>": "a & b"},
            protocol="All 60 test sequences, on the scale of the data.",
        )

    @property
    def model(self) -> nn.Module:
        return self.net

    def training_loss(self, batch: Any) -> Tensor:
        return (self.net(batch["x"]) - batch["y"]).square().mean()

    def reset_metrics(self, split: str) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update_metrics(self, split: str, batch: Any) -> None:
        error = self.net(batch["x"]) - batch["y"]
        self.sums += torch.stack([error.square().sum(), error.abs().sum(), torch.tensor(len(error))]).detach()

    def metric_state(self, split: str) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        square, absolute, count = sums["sums"].tolist()
        return {"mse": square / count, "mae": absolute / count}

    def example_batch(self, bundle: DataBundle, size: int) -> Any:
        assert isinstance(bundle.train, Sums)
        return bundle.train.__getitems__(list(range(min(size, len(bundle.train)))))

    def forward_batch(self, batch: Any) -> Tensor:
        return self.net(batch["x"])

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        fig = plotting.figure(6, 3)
        with plotting.style():
            axes = fig.subplots()
            axes.plot([0, 1, 2], [0, 1, 4], color="#222222", label="truth")
            axes.plot([0, 1, 2], [0, 1.2, 3.7], label="model <script>")
            axes.legend(frameon=True)
        yield Picture(name="fit / first", caption="Truth & model <b>", figure=fig)

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        return []


def _app() -> App:
    models = (
        ModelCard(
            name="mix",
            title="Mixing Tokens",
            source="S1",
            year=2020,
            target="attn_sums:Mixer",
            config=Mixing,
            mixer="flow",
            mixer_patterns=("noncausal_self",),
        ),
        ModelCard(
            name="far",
            title="Mixing Tokens From Afar",
            source="S2",
            year=2021,
            target="attn_sums:Mixer",
            config=Mixing,
            mixer="flow",
            mixer_patterns=("noncausal_self", "causal_cross"),
        ),
        ModelCard(
            name="zero",
            title="Always Nothing",
            source="rule",
            year=1900,
            target="attn_sums:Zero",
            config=Rule,
            trainable=False,
        ),
    )
    data = DataCard(
        name="sums",
        title="Sums of noise",
        task="regression",
        licence="CC0",
        source="made here",
        size="300 sequences",
        split="by seed",
        citation="none",
        synthetic=True,
        facts={"step": "1"},
    )
    return App(
        name="sums",
        package="attn_sums",
        title="Sums of sequences",
        models={card.name: card for card in models},
        datasets={"sums": data},
        data_config=SumData,
        default_model="mix",
        default_data="sums",
        task="attn_sums:SumTask",
        file_suffixes=(".csv",),
    )


@dataclass
class World:
    """The application and what a test needs of it."""

    root: Path
    app: App = field(default_factory=_app)
    SumTask: type[SumTask] = SumTask

    def config(self, **changes: Any) -> RunConfig:
        model = changes.pop("model", "mix")
        facts: dict[str, Any] = {
            "app": "sums",
            "model": model,
            "model_args": self.app.models[model].config(),
            "data": "sums",
            "data_args": SumData(),
            "trainer": TrainerConfig(batch_size=32, eval_batch_size=64, max_epochs=2, accelerator="cpu"),
            "runs": str(self.root / "runs"),
            **changes,
        }
        return RunConfig(**facts)

    def task(self, config: RunConfig) -> tuple[SumTask, DataBundle]:
        bundle = SumTask.load_data(config)
        torch.manual_seed(config.seed)
        return SumTask(config, bundle.state), bundle

    def results(self, config: RunConfig, **changes: Any) -> dict[str, Any]:
        return {
            "app": "sums",
            "model": config.model,
            "data": config.data,
            "mixer": config.mixer,
            "seed": config.seed,
            "protocol": "All 60 test sequences, on the scale of the data.",
            "splits": {"val": {"mse": 1.5, "mae": 1.0}, "test": {"mse": 1.25, "mae": 0.9}},
            "baselines": [{"model": "zero", "mse": 48.0, "mae": 5.5}, {"model": "linear", "mse": 0.5, "mae": 0.5}],
            "published": [{"model": "Paper", "source": "Table 1 & <2>", "mse": 1.0}],
            "cost": {
                "parameters": 1234567,
                "flops": 2_500_000,
                "train_samples_per_s": 1234.5,
                "latency_ms": 1.234,
                "eval_samples_per_s": 4321.0,
                "peak_memory_mb": 12.5,
                "batch_size": 32,
                "eval_batch_size": 64,
                "device": "cpu",
                "threads": 1,
                "uncounted": [],
            },
            "steps": 14,
            "epochs": 2,
            "train_seconds": 65.0,
            "train_cpu_seconds": 60.0,
            "best": {"epoch": 1, "step": 14, "mse": 1.5},
            "versions": {"torch": "2.13.0"},
            **changes,
        }

    def run(self, config: RunConfig, **changes: Any) -> Run:
        """A finished run of `config`, without its training."""
        run = Run.create(config)
        for step in range(1, 15):
            run.append({"step": step, "epoch": step // 8, "lr": 1e-3, "train_loss": 10 / step})
            if step % 7 == 0:
                row = {"train_loss": 5 / step, "val_mse": 20 / step, "val_mae": 3 / step}
                run.append({"step": step, "epoch": step // 8, "lr": 1e-3, **row})
        run.write_results(self.results(config, **changes))
        return run


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    package = tmp_path / "lib" / "attn_sums"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    module = importlib.import_module("attn_sums")
    module.SumTask = SumTask  # type: ignore[attr-defined]
    yield World(tmp_path)
    del sys.modules["attn_sums"]
