"""Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech Separation (Luo and Mesgarani, 2019).

Shapes: B batch, T samples, F frames, C voices, N filters; other letters are the paper's and the configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_speech.config import ConvTasNetConfig
from attn_speech.metrics import valid
from attn_speech.models.base import Separator

_EPS = 1e-8


class ConvTasNet(Separator):
    """A mask for each voice on a learned transform of the mixture, from dilated convolutions over time (figure 1).

        encoder   N filters of L samples, half of them shared by neighbours, no bias
        gLN, 1x1 to B;  R times X blocks of dilation 1, 2, …, 2^(X-1);  sum of their skip outputs
        PReLU, 1x1 to C·N, sigmoid or ReLU: masks on the encoder's frames
        decoder   N filters of L samples, overlap and add, no bias

    Ends of the mixture are padded by half a filter, so that every sample lies under two frames. With `lengths`, norms
    count own frames only and convolutions read zeros behind the end, as they do for the mixture by itself.

    Raises:
        ValueError: a mixer is given (it has no attention); an option out of its range.
    """

    config: ConvTasNetConfig

    def __init__(
        self,
        config: ConvTasNetConfig,
        speakers: int,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, speakers)
        c = config
        if mixer is not None or mixer_args:
            raise ValueError("Conv-TasNet has no attention, so it takes no mixer and no mixer_args")
        for name in ("N", "B", "Sc", "H", "P", "X", "R"):
            if getattr(c, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
        if c.L < 2 or c.L % 2:
            raise ValueError(f"L must be even, as frames overlap by half, got {c.L}")
        if c.P % 2 == 0 and not c.causal:
            raise ValueError(f"P must be odd, so that a block reads as far ahead as back, got {c.P}")
        self.stride, self.reach = c.L // 2, c.L - 1 if c.causal else None
        self.encoder = nn.Conv1d(1, c.N, c.L, stride=self.stride, padding=self.stride, bias=False)
        self.norm = _norm(c.N, c.causal)
        self.bottleneck = nn.Conv1d(c.N, c.B, 1)
        total = c.R * c.X
        self.blocks = nn.ModuleList(Block(c, 2 ** (i % c.X), last=i == total - 1) for i in range(total))
        self.activation = nn.PReLU()
        self.masks = nn.Conv1d(c.Sc, speakers * c.N, 1)
        self.decoder = nn.ConvTranspose1d(c.N, 1, c.L, stride=self.stride, padding=self.stride, bias=False)

    def forward(self, mixture: Tensor, lengths: Tensor | None = None) -> Tensor:
        batch, size = mixture.shape
        if lengths is not None and bool((lengths >= size).all()):
            lengths = None
        frames: Tensor | None = None
        if lengths is not None:
            mixture = torch.where(valid(lengths, size), mixture, 0.0)
            frames = (lengths + self.stride - 1) // self.stride + 1
        encoded = self.encoder(F.pad(mixture, (0, -size % self.stride))[:, None])
        real = None if frames is None else valid(frames, encoded.shape[-1])[:, None]
        if real is not None:
            encoded = encoded * real
        h = self.bottleneck(self.norm(encoded, real))
        skips: Tensor | None = None
        for block in self.blocks:
            h, skip = block(h, real)
            skips = skip if skips is None else skips + skip
        masks = self.masks(self.activation(skips))
        masks = masks.sigmoid() if self.config.mask == "sigmoid" else masks.relu()
        masked = masks.view(batch, self.speakers, -1, masks.shape[-1]) * encoded[:, None]
        voices = self.decoder(masked.flatten(0, 1))[..., :size].reshape(batch, self.speakers, size)
        return voices if lengths is None else torch.where(valid(lengths, size)[:, None], voices, 0.0)


class Block(nn.Module):
    """1x1 to H, PReLU, norm, depthwise convolution, PReLU, norm, 1x1 to what goes on and what is skipped (figure 1c).

    Both outputs of the last 1x1 are one convolution. The last block's first output would lead nowhere and is not there.
    """

    def __init__(self, config: ConvTasNetConfig, dilation: int, *, last: bool) -> None:
        super().__init__()
        c = config
        self.widths = (0 if last else c.B, c.Sc)
        self.expand = nn.Conv1d(c.B, c.H, 1)
        self.first_activation, self.first_norm = nn.PReLU(), _norm(c.H, c.causal)
        reach = (c.P - 1) * dilation
        self.ahead = reach if c.causal else 0
        self.depthwise = nn.Conv1d(c.H, c.H, c.P, dilation=dilation, groups=c.H, padding=0 if c.causal else reach // 2)
        self.second_activation, self.second_norm = nn.PReLU(), _norm(c.H, c.causal)
        self.contract = nn.Conv1d(c.H, sum(self.widths), 1)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, B, F) and which frames are real, (B, 1, F) -> what goes on (B, B, F) and what is skipped (B, Sc, F)."""
        h = self.first_norm(self.first_activation(self.expand(x)), real)
        h = self.depthwise(F.pad(h, (self.ahead, 0)) if self.ahead else h)
        h = self.contract(self.second_norm(self.second_activation(h), real))
        further, skip = h.split(self.widths, dim=1)
        return x + further if self.widths[0] else x, skip


class GlobalNorm(nn.GroupNorm):
    """gLN: mean and variance over channels and frames of an utterance, its own frames only; others come out as 0."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, eps=_EPS)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if real is None:
            return super().forward(x)
        count = real.sum(dim=(1, 2), keepdim=True) * x.shape[1]
        mean = (x * real).sum(dim=(1, 2), keepdim=True) / count
        x = (x - mean) * real
        variance = x.square().sum(dim=(1, 2), keepdim=True) / count
        return (x * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]) * real


class CumulativeNorm(nn.Module):
    """cLN: mean and variance over channels and all frames so far (section II-C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        # Sums over a long past lose digits in single precision.
        count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=torch.float64) * x.shape[1]
        mean = x.sum(dim=1, dtype=torch.float64).cumsum(dim=-1) / count
        power = x.square().sum(dim=1, dtype=torch.float64).cumsum(dim=-1) / count
        scale = ((power - mean.square()).clamp(min=0) + _EPS).rsqrt()
        x = (x - mean[:, None].to(x.dtype)) * scale[:, None].to(x.dtype)
        x = x * self.weight[:, None] + self.bias[:, None]
        return x if real is None else x * real


def _norm(channels: int, causal: bool) -> GlobalNorm | CumulativeNorm:
    return CumulativeNorm(channels) if causal else GlobalNorm(channels)


def from_torchaudio(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of torchaudio's `ConvTasNet` under the names used here, for `load_state_dict`.

    They were trained with `mask` relu where the model came from `conv_tasnet_base`.

    Raises:
        ValueError: a name that its model does not have.
    """
    heads = {
        "encoder": "encoder",
        "decoder": "decoder",
        "mask_generator.input_norm": "norm",
        "mask_generator.input_conv": "bottleneck",
        "mask_generator.output_prelu": "activation",
        "mask_generator.output_conv": "masks",
    }
    inner = {
        "conv_layers.0": "expand",
        "conv_layers.1": "first_activation",
        "conv_layers.2": "first_norm",
        "conv_layers.3": "depthwise",
        "conv_layers.4": "second_activation",
        "conv_layers.5": "second_norm",
    }
    found: dict[str, Tensor] = {}
    outputs: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        head, _, kind = name.rpartition(".")
        if head in heads:
            found[f"{heads[head]}.{kind}"] = value
            continue
        number, _, part = head.removeprefix("mask_generator.conv_layers.").partition(".")
        if part in inner:
            found[f"blocks.{number}.{inner[part]}.{kind}"] = value
        elif part in ("res_out", "skip_out"):
            outputs.setdefault(f"blocks.{number}.contract.{kind}", {})[part] = value
        else:
            raise ValueError(f"torchaudio's Conv-TasNet has no weight {name!r}")
    for name, parts in outputs.items():
        found[name] = torch.cat([parts[part] for part in ("res_out", "skip_out") if part in parts])
    return found
