"""What several backbones are made of.

Shapes: B sequences, L bases, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core_attn
from attn_genomics.tokens import MASK, N, mirror
from attn_shared.layers import Dropout
from core_attn import registry
from core_attn.contract import Pattern, TokenMixer

LETTERS = 5
"""Channels of `letters`."""


def letters(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) codes -> (B, L, 5): one channel for each of A, C, G, T and for a hidden base; N is zeros."""
    seen = torch.where(tokens == MASK, N, tokens)
    kept = torch.where(tokens == N, MASK, seen)
    return F.one_hot(kept, MASK + 1)[..., :LETTERS].to(dtype)


def build_mixer(
    name: str, *, dim: int, heads: int, causal: bool, options: Mapping[str, Any] | None = None
) -> TokenMixer | BothWays:
    """The mechanism `name`; where both directions are asked of one that is causal only, `BothWays`."""
    options = options or {}
    if not causal and Pattern.NONCAUSAL_SELF not in registry.get(name).info.patterns:
        return BothWays(name, dim=dim, heads=heads, options=options)
    return core_attn.build(name, dim=dim, heads=heads, causal=causal, **options)


class BothWays(nn.Module):
    """A causal mechanism in both directions: forth over one half of the channels, back over the other.

    Each direction has weights and heads of its own, so that it costs about as much as one of full width.

    Args:
        name: of the mechanism.
        dim: channels C, even.
        heads: of both directions together.
        options: of the mechanism.
    """

    causal = False

    def __init__(self, name: str, *, dim: int, heads: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"{name} reads in one direction only: for both, dim must be even, got {dim}")
        self.ways = nn.ModuleList(
            core_attn.build(name, dim=dim // 2, heads=max(1, heads // 2), causal=True, **options) for _ in range(2)
        )

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        forth, back = x.chunk(2, dim=-1)
        lengths = None if key_padding_mask is None else key_padding_mask.sum(dim=1)
        return torch.cat([self.ways[0](forth), turn(self.ways[1](turn(back, lengths)), lengths)], dim=-1)


def turn(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, L, C), each row read from its end; what fills it up stays behind it."""
    if lengths is None:
        return x.flip(1)
    return x.gather(1, mirror(lengths, x.shape[1])[..., None].expand_as(x))


def strongest(x: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """(B, C, L), mask (B, L) -> the maxima of every `size` places, the last of a row of what is left, and their mask.

    What fills up a row is 0 in what comes back.
    """
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(1), 0.0 if size == 1 else -torch.inf)
    if size == 1:
        return x, mask
    x = F.max_pool1d(x, size, ceil_mode=True)
    if mask is not None:
        mask = mask[:, ::size]
        x = x.masked_fill(~mask.unsqueeze(1), 0.0)
    return x, mask


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x + b₁) + b₂, with gelu's tanh form.

    Args:
        dim: channels C.
        inner: width between.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x ← x + mixer(norm(x)), x ← x + ffn(norm(x)).

    Args:
        mixer: (B, L, C) -> (B, L, C), a `TokenMixer` or `BothWays`.
        norms: before the mixer and before `ffn`.
        ffn: None = no second half.
        dropout: of what is added.
    """

    def __init__(self, mixer: nn.Module, *, norms: tuple[nn.Module, nn.Module], ffn: nn.Module | None, dropout: float):
        super().__init__()
        self.mixer = mixer
        self.norm1 = norms[0]
        self.ffn = ffn
        self.norm2 = norms[1] if ffn is not None else None
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        read = self.norm1(x)
        # What fills up a row stands behind it, where a causal mixer never looks.
        mixed = self.mixer(read) if mask is None or self.mixer.causal else self.mixer(read, key_padding_mask=mask)
        return self._rest(x + self.dropout(mixed))

    def init_state(self, batch: int, *, device: torch.device | None, dtype: torch.dtype | None) -> Any:
        return self.mixer.init_state(batch, device=device, dtype=dtype)  # type: ignore[operator]

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.norm1(x), state)  # type: ignore[operator]
        return self._rest(x + mixed), state

    def _rest(self, x: Tensor) -> Tensor:
        if self.ffn is None or self.norm2 is None:
            return x
        return x + self.dropout(self.ffn(self.norm2(x)))


class Blocks(nn.ModuleList):
    """Blocks one after the other.

    Args:
        blocks: the blocks.
        recompute: keep only what enters each block in training, and compute it again in the backward pass.
    """

    def __init__(self, blocks: list[Block], *, recompute: bool) -> None:
        super().__init__(blocks)
        self.recompute = recompute

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x

    def decodes(self, *, constant: bool = False) -> bool:
        """Whether every mixer has a state; `constant` = one that does not grow."""
        mixers = [block.mixer for block in self]
        return all(
            isinstance(mixer, TokenMixer)
            and mixer.causal
            and mixer.info.decodes
            and (mixer.info.constant_state or not constant)
            for mixer in mixers
        )

    def init_state(self, batch: int, *, device: torch.device | None, dtype: torch.dtype | None) -> list[Any]:
        return [block.init_state(batch, device=device, dtype=dtype) for block in self._all()]

    def step(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        after = []
        for block, state in zip(self._all(), states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return x, after

    def _all(self) -> Iterator[Block]:
        for block in self:
            assert isinstance(block, Block)
            yield block
