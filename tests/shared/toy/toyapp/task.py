from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attn_shared import checkpoint
from attn_shared.config import RunConfig
from attn_shared.errors import UserError
from attn_shared.task import DataBundle, Picture, Task


class Points(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor, *, jitter: bool = False) -> None:
        self.x, self.y, self.jitter = x, y, jitter

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        x = self.x[indices]
        if self.jitter:  # from the global state, as careless libraries do
            x = x + 0.01 * torch.randn_like(x)
        return {"x": x, "y": self.y[indices]}


def draw(samples: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    y = (x.sin().sum(-1, keepdim=True)) * 3 + 5 + noise * torch.randn(samples, 1, generator=generator)
    return x, y


class Mlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.width < 1:
            raise ValueError(f"width must be positive, got {config.width}")
        self.layers = nn.Sequential(
            nn.Linear(4, config.width), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(config.width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Mixing(nn.Module):
    def __init__(self, config: Any, mixer: str | None, mixer_args: dict[str, Any]) -> None:
        super().__init__()
        import core_attn

        self.embed = nn.Linear(1, config.width)
        self.mixer = core_attn.build(mixer or "softmax", dim=config.width, heads=2, **mixer_args)
        self.head = nn.Linear(config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.embed(x.unsqueeze(-1))).mean(1))


class Mean(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1)


class ToyTask(Task):
    primary = "mse"

    def __init__(self, config: RunConfig, data_state: Mapping[str, Any]) -> None:
        super().__init__(config, data_state)
        kinds = {"mlp": Mlp, "mean": Mean}
        if config.model == "mixing":
            self.net: nn.Module = Mixing(config.model_args, config.mixer, config.mixer_args)
        else:
            self.net = kinds[config.model](config.model_args)
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.kill_at = int(os.environ.get("TOY_KILL_AT_STEP", "0"))
        self.signal_at = int(os.environ.get("TOY_SIGINT_AT_STEP", "0"))

    @classmethod
    def load_data(cls, config: RunConfig, *, state: Mapping[str, Any] | None = None) -> DataBundle:
        sizes = {"train": config.data_args.samples, "val": 37, "test": 53}
        if config.data.endswith(".csv"):
            rows = [
                list(map(float, line.split(","))) for line in Path(config.data).read_text(encoding="utf-8").splitlines()
            ]
            table = torch.tensor(rows)
            parts = dict.fromkeys(sizes, (table[:, :4], table[:, 4:5]))
        else:
            parts = {s: draw(n, config.data_args.noise, seed) for seed, (s, n) in enumerate(sizes.items())}
        if state is None:
            y = parts["train"][1]
            state = {"mean": float(y.mean()), "scale": float(y.std())}
        jitter = os.environ.get("TOY_JITTER") == "1"
        sets = {
            split: Points(x, (y - state["mean"]) / state["scale"], jitter=jitter and split == "train")
            for split, (x, y) in parts.items()
        }
        return DataBundle(**sets, state=dict(state), protocol="synthetic points, scaled by the training mean")

    @property
    def model(self) -> nn.Module:
        return self.net

    def training_loss(self, batch: Any) -> Tensor:
        step = self.global_step + 1
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.mse_loss(self.net(batch["x"]), batch["y"])

    def reset_metrics(self, split: str) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self.sums[split] = {"squared": zero.clone(), "absolute": zero.clone(), "count": zero.clone()}

    def update_metrics(self, split: str, batch: Any) -> None:
        error = (self.net(batch["x"]) - batch["y"]).double()
        self.sums[split]["squared"] += error.square().sum()
        self.sums[split]["absolute"] += error.abs().sum()
        self.sums[split]["count"] += error.numel()

    def metric_state(self, split: str) -> dict[str, Tensor]:
        return self.sums[split]

    def compute_metrics(self, split: str, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            "mse": float(sums["squared"] / sums["count"]),
            "mae": float(sums["absolute"] / sums["count"]),
            "samples": float(sums["count"]),
        }

    def example_batch(self, bundle: DataBundle, size: int) -> Any:
        assert isinstance(bundle.test, Points)
        return bundle.test.__getitems__([i % len(bundle.test) for i in range(size)])

    def forward_batch(self, batch: Any) -> Tensor:
        return self.net(batch["x"])

    @classmethod
    def baselines(cls, config: RunConfig, bundle: DataBundle) -> list[dict[str, Any]]:
        assert isinstance(bundle.test, Points)
        return [
            {"model": "mean", "mse": float(bundle.test.y.square().mean()), "mae": float(bundle.test.y.abs().mean())}
        ]

    def pictures(self, bundle: DataBundle) -> Iterable[Picture]:
        return ()

    def predict_files(self, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
        written = []
        for file in inputs:
            try:
                rows = [list(map(float, line.split(","))) for line in file.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                raise UserError(f"{file}: {error}") from None
            values = self.net(torch.tensor(rows)[:, :4]) * self.data_state["scale"] + self.data_state["mean"]
            path = output / f"{file.stem}.txt"
            path.write_text("".join(f"{value:.{options['digits']}f}\n" for value in values.flatten().tolist()))
            written.append(path)
        return written


if "TOY_KILL_IN_WRITE" in os.environ:
    # SIGKILL in the middle of the n-th file of all checkpoints: half of it is on the disk.
    left = int(os.environ["TOY_KILL_IN_WRITE"])
    whole = checkpoint._write

    def torn(path: Path, data: bytes) -> None:
        global left
        left -= 1
        if left:
            whole(path, data)
            return
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write = torn
