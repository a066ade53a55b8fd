"""MossFormer beside the official code: a training step of the small model, and inference of MossFormer-M.

    python benchmarks/mossformer.py --official CHECKOUT [--repeats 5] [--seconds 4] [--only train|inference|parity]

CHECKOUT is github.com/modelscope/modelscope (2905da12); einops and rotary-embedding-torch must be installed. Both sides
have the same weights and the same input, in one process on one thread; figures are CPU-seconds, the fastest of the
repeats, taken in turn. `parity` compares the outputs of M, L and both sizes of MossFormer2 in float32 and
float64.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_speech.config import (
    MossFormer2Config,
    MossFormer2LConfig,
    MossFormer2SConfig,
    MossFormerConfig,
    MossFormerLConfig,
    MossFormerMConfig,
)
from attn_speech.models.convert import from_official
from attn_speech.models.mossformer import MossFormer
from attn_speech.models.mossformer2 import MossFormer2


def official(checkout: Path, name: str = "mossformer") -> Any:
    """The module of an official model. What it needs of the rest of its package is the names below."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content, __path__=[str(checkout.joinpath(*name.split(".")))])
        sys.modules[name] = made
        return made

    class Model(nn.Module):
        def __init__(self, model_dir: str, *args: Any, **kwargs: Any) -> None:
            super().__init__()

    class AnyName:
        def __getattr__(self, name: str) -> str:
            return name

    class Registry:
        def register_module(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            return lambda cls: cls

    class LayerNorm(nn.Module):
        """speechbrain's, which wraps torch's."""

        def __init__(self, width: int, eps: float) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width, eps=eps)

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.norm(x)
            return normed

    separation = "modelscope.models.audio.separation"
    for package in ("modelscope", "modelscope.utils", "modelscope.models.audio", separation, f"{separation}.m2"):
        module(package)
    module("modelscope.metainfo", Models=AnyName())
    module("modelscope.models", MODELS=Registry(), TorchModel=Model)
    module("modelscope.models.base", Tensor=Tensor)
    module("modelscope.utils.constant", Tasks=AnyName(), ModelFile=AnyName())
    normalization = types.SimpleNamespace(LayerNorm=LayerNorm)
    module("speechbrain", nnet=types.SimpleNamespace(normalization=normalization))
    return importlib.import_module(f"modelscope.models.audio.separation.{name}")


def official_model(checkout: Path, c: MossFormerConfig, speakers: int) -> nn.Module:
    """The official model of the sizes of `c`."""
    if isinstance(c, MossFormer2Config):
        again: nn.Module = official(checkout, "m2.mossformer").MossFormer2(
            "", in_channels=c.filters, out_channels=c.dim, num_blocks=c.blocks, kernel_size=c.kernel, num_spks=speakers
        )
        return again
    made: nn.Module = official(checkout).MossFormer(
        "",
        kernel_size=c.kernel,
        in_channels=c.filters,
        out_channels=c.dim,
        stride=c.kernel // 2,
        bias=False,
        num_blocks=c.blocks,
        d_model=c.dim,
        attn_dropout=c.dropout,
        group_size=c.group,
        query_key_dim=c.qk_dim,
        expansion_factor=4.0,
        causal=False,
        norm="ln",
        num_spks=speakers,
    )
    # Its encoder takes the width of the blocks, which is that of the filters in the published L only.
    if c.filters != c.dim:
        made.encoder.conv1d = nn.Conv1d(1, c.filters, c.kernel, c.kernel // 2, bias=False)  # type: ignore[union-attr]
    return made


def pair(checkout: Path, c: MossFormerConfig, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MossFormer]:
    torch.manual_seed(0)
    theirs = official_model(checkout, c, 2)
    # Drawn as published weights look: the copies of z as they begin would leave attention with next to no part.
    for name, parameter in theirs.named_parameters():
        if name.endswith("qk_offset_scale.gamma"):
            nn.init.normal_(parameter, 1.0, 0.3)
    ours = MossFormer2(c, 2) if isinstance(c, MossFormer2Config) else MossFormer(c, 2)
    ours.load_state_dict(from_official(theirs.state_dict()))
    return theirs.to(dtype), ours.to(dtype)


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """CPU-seconds; the calls take turns, so that what else runs on the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: min(taken) for name, taken in times.items()}


def report(title: str, taken: dict[str, float]) -> None:
    print(f"{title}: ours {taken['ours']:.3f} s, official {taken['official']:.3f} s, ", end="")
    print(f"{taken['official'] / taken['ours']:.2f} times as fast", flush=True)


def train(checkout: Path, repeats: int, *, dropout: float) -> None:
    c = MossFormerConfig(dropout=dropout)
    theirs, ours = pair(checkout, c)
    mixture = torch.randn(4, 12000)

    def step(model: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.Adam(model.parameters(), lr=1.5e-4)
        model.train()

        def call() -> None:
            optimiser.zero_grad()
            model(mixture).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()

        return call

    report(
        f"training step, small ({sum(p.numel() for p in ours.parameters())} parameters), 4 x 1.5 s at 8 kHz, "
        f"dropout {dropout}",
        fastest({"ours": step(ours), "official": step(theirs)}, repeats),
    )


def inference(checkout: Path, repeats: int, seconds: float) -> None:
    theirs, ours = pair(checkout, MossFormerMConfig())
    theirs.eval(), ours.eval()
    mixture = torch.randn(1, int(8000 * seconds))
    with torch.no_grad():
        taken = fastest({"ours": lambda: ours(mixture), "official": lambda: theirs(mixture)}, repeats)
        report(f"inference, M, {seconds} s at 8 kHz", taken)
        print(f"  largest difference of the outputs {difference(theirs, ours, mixture)[0]:.1e}")


def difference(theirs: nn.Module, ours: nn.Module, mixture: Tensor) -> tuple[float, float]:
    """Largest difference of the voices, and the largest official sample."""
    with torch.no_grad():
        right = theirs(mixture).transpose(1, 2)
        return (ours(mixture) - right).abs().max().item(), right.abs().max().item()


def parity(checkout: Path, seconds: float) -> None:
    for name, c in (
        ("M", MossFormerMConfig()),
        ("L", MossFormerLConfig()),
        ("2 S", MossFormer2SConfig()),
        ("2 L", MossFormer2LConfig()),
    ):
        for dtype in (torch.float32, torch.float64):
            theirs, ours = pair(checkout, c, dtype=dtype)
            theirs.eval(), ours.eval()
            mixture = torch.randn(1, int(8000 * seconds), dtype=dtype)
            error, largest = difference(theirs, ours, mixture)
            count = sum(p.numel() for p in ours.parameters()) / 1e6
            print(f"{name}, {count:.2f} M parameters, {dtype}: {error:.1e}, of samples up to {largest:.2g}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", choices=("train", "inference", "parity"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only in (None, "parity"):
        parity(given.official, given.seconds)
    if given.only in (None, "train"):
        train(given.official, given.repeats, dropout=0.0)
        train(given.official, given.repeats, dropout=0.1)
    if given.only in (None, "inference"):
        inference(given.official, given.repeats, given.seconds)
