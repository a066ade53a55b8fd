"""What an attention mechanism is: the two module contracts and the facts each class declares about itself.

Shapes: B batch, L query tokens, M context (key) tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core_attn.einsums import Cascade, pairs_read


class Pattern(StrEnum):
    """The four ways tokens may look at tokens."""

    NONCAUSAL_SELF = "noncausal_self"
    CAUSAL_SELF = "causal_self"
    NONCAUSAL_CROSS = "noncausal_cross"
    CAUSAL_CROSS = "causal_cross"

    @classmethod
    def of(cls, *, causal: bool, cross: bool) -> Pattern:
        return cls(f"{'causal' if causal else 'noncausal'}_{'cross' if cross else 'self'}")


class Growth(StrEnum):
    """Order of growth in the number of tokens L, at fixed width."""

    CONSTANT = "1"
    LINEAR = "L"
    LOGLINEAR = "L log L"
    ROOT = "L sqrt L"
    QUADRATIC = "L^2"


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismInfo:
    """The facts a mechanism declares. `core_attn.testing.check_mechanism` tests every one of them.

    Attributes:
        name: registry name, lower case with underscores.
        title: title of the paper.
        source: S-number in the project's catalogue, such as "S83"; empty for mechanisms outside it.
        year: year of publication.
        patterns: which of the four patterns it can compute.
        grid_ranks: ranks of token grids it uses (2 for (H, W)); empty when tokens are a plain sequence.
        time: growth of run time in L.
        memory: growth of extra memory in L.
        decodes: `init_state` / `step` give the same as the parallel form, token by token.
        constant_state: the decoding state does not grow with the context.
        padding: `key_padding_mask` is supported.
        maps: attention maps can be read with `core_attn.capture`.
        stochastic: draws random numbers in eval mode; then forward takes `generator=`, and None means a fixed seed.
        batch_dependent_training: in train mode a sample's output depends on the rest of the batch.
        selects: chooses what is read by rank (top-k); where rounding swaps two choices of nearly equal rank, the output
            jumps. Then bfloat16 is compared by the median row, float32 and float64 in full as ever.
        compiles: works under torch.compile and torch.export.
        double_backward: gradients of gradients are defined.
        min_length: the smallest L the definition makes sense for.
        operator: name of the operator in `core_attn.ops` it computes with; empty where that is its own name.
        cascade: its einsums and its costs as formulas in `TokenMixer.sizes`; None where nobody wrote them down.
    """

    name: str
    title: str
    source: str
    year: int
    patterns: frozenset[Pattern]
    time: Growth
    memory: Growth
    grid_ranks: frozenset[int] = frozenset()
    decodes: bool = False
    constant_state: bool = False
    padding: bool = False
    maps: bool = False
    stochastic: bool = False
    batch_dependent_training: bool = False
    selects: bool = False
    compiles: bool = True
    double_backward: bool = True
    min_length: int = 1
    operator: str = ""
    cascade: Cascade | None = None

    def supports(self, *, causal: bool, cross: bool) -> bool:
        return Pattern.of(causal=causal, cross=cross) in self.patterns


class Mechanism(nn.Module):
    """Base of every registered mechanism. Subclasses are one of `TokenMixer` or `FeatureGate`."""

    info: ClassVar[MechanismInfo]  # set by `core_attn.registry.register`


class TokenMixer(Mechanism):
    """(B, L, C) -> (B, L, C): tokens read from tokens.

    Args:
        dim: channels C.
        causal: token i may only read tokens <= i; in cross attention the last query is aligned with the last
            context token (lower right), as in decoding with a cache.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be a positive integer, got {dim}")
        self.dim = dim
        self.causal = causal
        # Set by core_attn.capture and core_attn.edit while they are active; see maps.py.
        self._tap: Callable[..., Any] | None = None

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, L, C) queries; also keys and values when `context` is None.
            context: (B, M, C) what is read from, for cross attention.
            key_padding_mask: (B, L) or (B, M) with context; bool, True = real token. Values under False never matter.
            grid: the tokens' grid, row major, product L; only for mechanisms that declare `grid_ranks`.
            generator: source of randomness, only for mechanisms that declare `stochastic`.

        Returns:
            (B, L, C), dtype of x.

        Raises:
            ValueError: wrong shape, or an option this mechanism does not declare.
        """
        raise NotImplementedError

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """An empty decoding state; only where `info.decodes`, of a causal module."""
        raise ValueError(self._why_no_state())

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One or more further tokens (B, T, C) of a causal sequence -> their outputs (B, T, C) and the new state."""
        raise ValueError(self._why_no_state())

    def _why_no_state(self) -> str:
        if self.info.decodes and not self.causal:
            return f"{self.info.name} decodes token by token only when it is built with causal=True"
        return f"{self.info.name} has no decoding state: it cannot run token by token"

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        """Values of the symbols in this mechanism's `info.cascade` for a call of these sizes; see `einsums.SYMBOLS`.

        Subclasses add their own symbols, and say how many pairs P a head reads where that is not all of them.
        """
        keys = length if context is None else context
        heads = getattr(self, "heads", 1)
        parameter = next(self.parameters(), None)
        return {
            "B": batch,
            "H": heads,
            "G": getattr(self, "kv_heads", heads),
            "L": length,
            "M": keys,
            "X": 0 if context is None else keys,
            "C": self.dim,
            "D": getattr(self, "head_dim", self.dim // heads),
            "P": pairs_read(length, keys, right=0 if self.causal else None),
            "E": 4 if parameter is None else parameter.element_size(),
        }

    def check_inputs(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Refuse, in one sentence, what `forward` cannot take. Subclasses call it first thing in `forward`."""
        name = self.info.name
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name} takes x of shape (B, L, C) with C = {self.dim}, got {tuple(x.shape)}")
        if context is not None and (
            context.dim() != 3 or context.shape[-1] != self.dim or context.shape[0] != x.shape[0]
        ):
            raise ValueError(
                f"{name} takes context of shape (B, M, C) with B = {x.shape[0]} and C = {self.dim}, "
                f"got {tuple(context.shape)}"
            )
        pattern = Pattern.of(causal=self.causal, cross=context is not None)
        if pattern not in self.info.patterns:
            able = ", ".join(sorted(p.value.replace("_", " ") for p in self.info.patterns))
            raise ValueError(f"{name} cannot compute {pattern.value.replace('_', ' ')} attention; it computes: {able}")
        if key_padding_mask is not None:
            keys = x if context is None else context
            if not self.info.padding:
                raise ValueError(f"{name} does not support key_padding_mask; pass sequences of one length without it")
            if key_padding_mask.shape != keys.shape[:2]:
                raise ValueError(
                    f"{name} takes key_padding_mask of shape {tuple(keys.shape[:2])} (B, keys), "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            if key_padding_mask.dtype != torch.bool:
                raise ValueError(
                    f"{name} takes a boolean key_padding_mask (True = real token), got {key_padding_mask.dtype}"
                )
        if grid is not None:
            if len(grid) not in self.info.grid_ranks:
                raise ValueError(f"{name} takes no grid of rank {len(grid)}")
            if torch.Size(grid).numel() != x.shape[1]:
                raise ValueError(
                    f"{name}: grid {tuple(grid)} holds {torch.Size(grid).numel()} tokens, x has {x.shape[1]}"
                )
        if generator is not None and not self.info.stochastic:
            raise ValueError(f"{name} draws no random numbers and takes no generator")


class FeatureGate(Mechanism):
    """(B, C, *spatial) -> same: channel and spatial attention in convolutional networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be a positive integer, got {channels}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError
