"""Whole training steps of Autoformer and Informer, beside the papers' official code.

    python benchmarks/forecast_step.py --official-autoformer CHECKOUT --official-informer CHECKOUT

A step is forward, mean squared error, backward and Adam, on ETTh1's 96 -> 96 shape with batch 32. Both sides get the
same weights and must give the same forecasts (1e-5) before anything is timed. Steps of both sides alternate in one run
on one thread; CPU time, median. Prints a Markdown table. Checkouts: github.com/thuml/Autoformer (51c7d416) and
github.com/zhouhaoyi/Informer2020 (29f2a739); a side that is not given is not run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attn_shared.app import load
from attn_shared.profiling import machine, peak_memory
from attn_timeseries.config import MODELS
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.convert import from_official
from core_attn import registry

SHAPE = SeriesShape(seq_len=96, label_len=48, pred_len=96, channels=7, marks=4)
BATCH = 32
SIZES = ((128, 256), (512, 2048))
OPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {"n_heads": 8, "e_layers": 2, "d_layers": 1, "dropout": 0.05, "factor": 3},
    "informer": {"n_heads": 8, "e_layers": 2, "d_layers": 1, "dropout": 0.05, "factor": 5, "distil": True, "mix": True},
}
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official-autoformer", type=Path, metavar="CHECKOUT")
    parser.add_argument("--official-informer", type=Path, metavar="CHECKOUT")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a side at the smaller size")
    args = parser.parse_args()
    checkouts = {"autoformer": args.official_autoformer, "informer": args.official_informer}
    if not any(checkouts.values()):
        parser.error("give at least one of --official-autoformer and --official-informer")
    torch.set_num_threads(1)
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    print(f"One thread; {facts}.\n")
    print("| model | d_model / d_ff | official ms | here ms | times faster | official peak MB | here peak MB |")
    print("|---|---|---|---|---|---|---|")
    for name, checkout in checkouts.items():
        for size in SIZES if checkout else ():
            print(row(name, checkout, size, max(3, args.steps * SIZES[0][0] // size[0])), flush=True)


def row(name: str, checkout: Path, size: tuple[int, int], steps: int) -> str:
    options = OPTIONS[name] | {"d_model": size[0], "d_ff": size[1]}
    torch.manual_seed(0)
    with importing_from(checkout):
        official, forward_official = OFFICIAL[name](options)
    ours = load(MODELS[name].target)(MODELS[name].config(**options), SHAPE)
    ours.load_state_dict(from_official(name, official.state_dict()))
    x, x_mark, y_mark, target = example()
    check_equal(official, lambda: forward_official((x, x_mark, y_mark)), ours, lambda: ours(x, x_mark, y_mark))
    sides = [
        training_step(official, lambda: forward_official((x, x_mark, y_mark)), target),
        training_step(ours, lambda: ours(x, x_mark, y_mark), target),
    ]
    for step in sides:
        step()
    seconds: list[list[float]] = [[], []]
    for _ in range(steps):
        for step, times in zip(sides, seconds):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
    peaks = []
    for step in sides:
        with peak_memory() as peak:
            step()
        peaks.append(peak.megabytes)
    slow, fast = (statistics.median(times) for times in seconds)
    return (
        f"| {name} | {size[0]} / {size[1]} | {slow * 1e3:.0f} | {fast * 1e3:.0f} | {slow / fast:.2f} "
        f"| {peaks[0]:.0f} | {peaks[1]:.0f} |"
    )


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of ETTh1's shape and a target; the values do not matter for time."""
    s = SHAPE
    x = torch.randn(BATCH, s.seq_len, s.channels).cumsum(dim=1)
    x_mark = torch.rand(BATCH, s.seq_len, s.marks) - 0.5
    y_mark = torch.rand(BATCH, s.label_len + s.pred_len, s.marks) - 0.5
    return x, x_mark, y_mark, torch.randn(BATCH, s.pred_len, s.channels)


def training_step(model: nn.Module, forward: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.mse_loss(forward(), target).backward()
        optimiser.step()

    return step


def check_equal(
    official: nn.Module, forward_official: Callable[[], Tensor], ours: nn.Module, forward: Callable[[], Tensor]
) -> None:
    """Same weights, same forecast; the keys the official ProbSparse attention draws are handed to ours."""
    official.eval()
    ours.eval()
    mixer, draw, randint = registry.get("prob_sparse"), registry.get("prob_sparse").draw, torch.randint
    keys: list[Tensor] = []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        keys.append(randint(*args, **kwargs))
        return keys[-1]

    try:
        torch.randint = recorded
        mixer.draw = lambda self, q, k, generator: keys.pop(0)
        with torch.no_grad():
            difference = (forward_official() - forward()).abs().max().item()
    finally:
        torch.randint, mixer.draw = randint, draw
    if difference > 1e-5:
        raise SystemExit(f"the official forecast and ours differ by {difference:.1e}: nothing was timed")


def official_autoformer(options: dict[str, Any]) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    from models.Autoformer import Model

    model = Model(
        SimpleNamespace(
            **options,
            **{key: getattr(SHAPE, key) for key in ("seq_len", "label_len", "pred_len")},
            **dict.fromkeys(("enc_in", "dec_in", "c_out"), SHAPE.channels),
            moving_avg=25,
            output_attention=False,
            embed="timeF",
            freq="h",
            activation="gelu",
        )
    )
    return model, lambda inputs: model(inputs[0], inputs[1], decoder_values(inputs[0]), inputs[2])


def official_informer(options: dict[str, Any]) -> tuple[nn.Module, Callable[[Inputs], Tensor]]:
    from models.model import Informer

    channels = [SHAPE.channels] * 3
    model = Informer(*channels, SHAPE.seq_len, SHAPE.label_len, SHAPE.pred_len, **options, embed="timeF", freq="h")
    return model, lambda inputs: model(inputs[0], inputs[1], decoder_values(inputs[0]), inputs[2])


OFFICIAL = {"autoformer": official_autoformer, "informer": official_informer}


def decoder_values(x: Tensor) -> Tensor:
    return torch.cat([x[:, SHAPE.seq_len - SHAPE.label_len :], x.new_zeros(BATCH, SHAPE.pred_len, x.shape[2])], dim=1)


@contextmanager
def importing_from(checkout: Path) -> Iterator[None]:
    """Import from an official checkout; its top-level names (`models`, `layers`, `utils`) are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for module in set(sys.modules) - before:
            if module.split(".")[0] in ("models", "layers", "utils"):
                del sys.modules[module]


if __name__ == "__main__":
    main()
