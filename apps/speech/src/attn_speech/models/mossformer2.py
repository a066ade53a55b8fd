"""MossFormer2, from "MossFormer2: Combining Transformer and RNN-Free Recurrent Network for Enhanced Time-Domain
Monaural Speech Separation" (Zhao et al., ICASSP 2024).

Shapes: as in `mossformer`; e channels inside a memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from attn_speech.config import MossFormer2Config
from attn_speech.models.frames import FramesNorm, depthwise, only
from attn_speech.models.mossformer import Frames, MossFormer, conv_weight, ff_conv


class MossFormer2(MossFormer):
    """MossFormer with a gated memory, in place of a recurrent network, behind each block.

    Args:
        config, speakers, mixer, mixer_args: see `MossFormer`.

    Raises:
        ValueError: an option out of its range; a mixer that cannot do what it must here.
    """

    config: MossFormer2Config

    def __init__(
        self,
        config: MossFormer2Config,
        speakers: int,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        for name in ("inner", "order"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        super().__init__(config, speakers, mixer=mixer, mixer_args=mixer_args)
        self.memories = nn.ModuleList(GatedMemory(config) for _ in range(config.blocks))

    def through_blocks(self, x: Tensor, frames: Frames) -> Tensor:
        for block, memory in zip(self.blocks, self.memories, strict=True):
            x = memory(block(x, frames), frames)
        return x


class GatedMemory(nn.Module):
    """x + W LN(y + v ⊙ (u + memory(W₂ relu(W₁ u)))), y = LN(PReLU(W x)), v and u = FFConv(y).

    FFConv begins with a layer norm here. Those to u and v are one, rows belong to u and v in this order.
    """

    def __init__(self, config: MossFormer2Config) -> None:
        super().__init__()
        d, e = config.dim, config.inner
        self.causal = config.causal
        self.enter = nn.Linear(d, e)
        self.prelu = nn.PReLU()
        self.norm1 = nn.LayerNorm(e)
        self.in_norm = Affine(2 * e)
        self.in_proj = nn.Linear(e, 2 * e)
        self.in_conv = conv_weight(2 * e, config.taps)
        self.dropout = Dropout(config.dropout)
        self.linear = nn.Linear(e, e)
        self.project = nn.Linear(e, e, bias=False)
        self.memory = DilatedMemory(e, config.order, causal=config.causal)
        self.norm2 = nn.LayerNorm(e)
        self.leave = nn.Linear(e, d)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        inner = self.norm1(self.prelu(self.enter(x)))
        u, v = self._project(inner, frames.mask).chunk(2, dim=-1)
        remembered = self.memory(self.project(F.relu(self.linear(u))), frames.mask)
        return x + self.leave(self.norm2(torch.addcmul(inner, v, u + remembered)))

    def _project(self, inner: Tensor, mask: Tensor | None) -> Tensor:
        """Both FFConv: (B, L, e) -> (B, L, 2 e). Their layer norms differ in factor and shift only, which the map takes
        over."""
        e = inner.shape[-1]
        normed = F.layer_norm(inner, (e,), eps=1e-5)
        weights = self.in_proj.weight.unflatten(0, (2, e))  # (2, e, e)
        scale, shift = self.in_norm.weight.view(2, 1, e), self.in_norm.bias.view(2, e, 1)
        bias = self.in_proj.bias + (weights @ shift).flatten()
        mixed: Tensor = self.dropout(
            ff_conv(normed, (weights * scale).flatten(0, 1), bias, self.in_conv, mask=mask, causal=self.causal)
        )
        return mixed


class Affine(nn.Module):
    """Factors and shifts of layer norms, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class Filters(nn.Module):
    """(channels, inputs, taps), drawn as torch draws those of a grouped convolution."""

    def __init__(self, channels: int, inputs: int, taps: int) -> None:
        super().__init__()
        bound = (inputs * taps) ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, inputs, taps).uniform_(-bound, bound))


class DilatedMemory(nn.Module):
    """Two depthwise convolutions of 2 · order - 1 taps; the second is dilated and reads the first one's input as well.

    Group g of the second reads channels 2 g and 2 g + 1 of [first; input]: the first half of the groups reads the first
    convolution, the second half its input, as in the official code.
    """

    def __init__(self, channels: int, order: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        taps = 2 * order - 1
        self.conv1, self.conv2 = Filters(channels, 1, taps), Filters(channels, 2, taps)
        self.norm1, self.norm2 = (FramesNorm(channels, eps=1e-5, together=False, causal=causal) for _ in range(2))
        self.prelu1, self.prelu2 = nn.PReLU(channels), nn.PReLU(channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, e) -> (B, L, e)."""
        x = only(x, mask)
        first = depthwise(x, self.conv1.weight[:, 0], causal=self.causal)
        first = only(self._finish(first, self.norm1, self.prelu1, mask), mask)
        both = torch.cat([first, x], dim=-1)
        second = depthwise(both[..., 0::2], self.conv2.weight[:, 0], dilation=2, causal=self.causal)
        second = second + depthwise(both[..., 1::2], self.conv2.weight[:, 1], dilation=2, causal=self.causal)
        return self._finish(second, self.norm2, self.prelu2, mask)

    @staticmethod
    def _finish(x: Tensor, norm: FramesNorm, prelu: nn.PReLU, mask: Tensor | None) -> Tensor:
        x = norm(x, mask)
        # By hand: torch's PReLU wants channels second.
        return torch.where(x >= 0, x, x * prelu.weight.to(x.dtype))
