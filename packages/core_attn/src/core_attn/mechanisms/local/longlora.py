"""Shifted sparse attention (S²-Attn) of LongLoRA: groups of tokens, shifted by half a group in half of the heads.

"LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models" (S130), section 3.2 and algorithm 1. Shapes: B
batch, L tokens, H heads, D channels of a head, G tokens of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import softmax_attention
from core_attn.ops.softmax import reference
from core_attn.registry import register
from core_attn.state import FullCache, WindowCache


@register(
    name="longlora",
    title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
    source="S130",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    constant_state=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d] for m in the group of l",
            "top[b,h,l] = max[m] S[b,h,l,m]",
            "W[b,h,l,m] = exp(S[b,h,l,m] - top[b,h,l])",
            "sum[b,h,l] = W[b,h,l,m]",
            "Y[b,h,l,d] = W[b,h,l,m] * V[b,h,m,d]",
            "O[b,h,l,d] = Y[b,h,l,d] / sum[b,h,l]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*D*((H - N)*P + N*W)",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={"N": "heads with shifted groups", "W": "pairs of a query and a key that such a head reads"},
    ),
)
class LongLoRAAttention(MultiHeadMixer):
    """Each token reads its own group of G tokens; in the second half of the heads groups begin half a group later.

    So what one half of the heads cuts apart the other half holds together, in O(L·G). Before the first shifted group
    there is half a group, and behind the last one too; the last group of either half is short where G does not divide
    the length.

    The paper's algorithm 1 shifts by rolling the sequence, which makes one group of those two halves: the first G/2
    tokens come after the last G/2 in it, and read them even when the attention is causal. That is `wrap=True`, for
    parity with models trained so, and with the official code's plain forward; its FlashAttention forward has the two
    halves apart, as here by default.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`. With an odd number of heads the second half has one more.
        group_size: G, even; a quarter of the sequence in the paper.
        wrap: the two half groups at the ends are one group. Then causal attention leaks, and cannot decode.
        full_in_eval: read all tokens in eval mode, as the paper does after fine-tuning.
        backend: see `core_attn.ops.softmax_attention`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        group_size: int = 256,
        wrap: bool = False,
        full_in_eval: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if group_size < 2 or group_size % 2:
            raise ValueError(f"group_size must be even and at least 2, got {group_size}")
        self.group_size, self.wrap, self.full_in_eval = group_size, wrap, full_in_eval
        self.backend = backend

    @property
    def grouped(self) -> bool:
        """Whether groups apply in the present mode."""
        return self.training or not self.full_in_eval

    def halves(self) -> tuple[tuple[slice, int], tuple[slice, int]]:
        """The heads without shift and with: which, and how far before the first token their first group begins."""
        half = self.heads // 2
        return (slice(0, half), 0), (slice(half, self.heads), self.group_size // 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if not self.grouped:
            return self._read(q, k, v, key_padding_mask)
        outs = []
        for heads, shift in self.halves():
            own = (q[:, heads], k[:, heads], v[:, heads])
            if shift and self.wrap:
                outs.append(self._wrapped(*own, key_padding_mask, shift))
            else:
                outs.append(self._in_groups(*own, key_padding_mask, shift))
        return torch.cat(outs, dim=1)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return softmax_attention(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, backend=self.backend)

    def _in_groups(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shift: int) -> Tensor:
        """Attention inside groups, the first of which is `shift` tokens short."""
        length, size = q.shape[2], self.group_size
        first = min(size - shift, length) if shift else 0
        whole = (length - first) // size * size
        # At most three calls, none with padding: the short group, those of full size as one batch, what is left.
        outs = []
        for start, stop in ((0, first), (first, first + whole), (first + whole, length)):
            if stop == start:
                continue
            a, b, c = (x[:, :, start:stop] for x in (q, k, v))
            seen = None if mask is None else mask[:, start:stop]
            if stop - start > size:
                groups = (stop - start) // size
                a, b, c = (self._fold(x, groups) for x in (a, b, c))
                out = self._read(a, b, c, None if seen is None else seen.reshape(-1, size))
                outs.append(out.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3))
            else:
                outs.append(self._read(a, b, c, seen))
        return torch.cat(outs, dim=2) if outs else torch.zeros_like(v)

    def _fold(self, x: Tensor, groups: int) -> Tensor:
        """(B, H, groups·G, D) -> (B·groups, H, G, D)."""
        return x.unflatten(2, (groups, self.group_size)).transpose(1, 2).flatten(0, 1)

    def _wrapped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shift: int) -> Tensor:
        """Algorithm 1: roll, attention inside groups, roll back; padded to whole groups."""
        batch, length = q.shape[0], q.shape[2]
        missing = -length % self.group_size
        real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
        if mask is not None or missing:
            mask = torch.nn.functional.pad(real, (0, missing)).roll(-shift, 1)
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)).roll(-shift, 2) for x in (q, k, v))
        return self._in_groups(q, k, v, mask, 0).roll(shift, 2)[:, :, :length]

    def order(self, length: int, shift: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """(L,) place of each token in the order that causality follows, and (L,) its group."""
        place = torch.arange(length, device=device)
        if shift and self.wrap:
            place = (place - shift) % (-(-length // self.group_size) * self.group_size)
            return place, place // self.group_size
        return place, (place + shift) // self.group_size

    def allowed(self, length: int, device: torch.device | None = None) -> Tensor:
        """Which keys a query may read by the definition: (H, L, L) bool."""
        kinds = []
        for heads, shift in self.halves():
            place, group = self.order(length, shift, device)
            keep = group[:, None] == group
            if self.causal:
                keep = keep & (place[:, None] >= place)
            kinds.append(keep.expand(heads.stop - heads.start, length, length))
        return torch.cat(kinds)

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            q,
            k,
            causal=self.causal and not self.grouped,
            mask=self.allowed(q.shape[2], q.device)[None] if self.grouped else None,
            bias=None,
            key_padding_mask=key_padding_mask,
            window=None,
            scale=self.head_dim**-0.5,
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        counts = [torch.bincount(self.order(length, shift)[1]) for _, shift in self.halves()]
        pairs = [int((n * (n + 1) // 2 if self.causal else n * n).sum()) for n in counts]
        return sizes | {"N": self.heads - self.heads // 2, "P": pairs[0], "W": pairs[1]}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullCache:
        """An empty cache: of the last G - 1 tokens, which hold the present group; of all where it reads all.

        Raises:
            ValueError: this module is not causal, or its groups wrap around.
        """
        if not self.causal:
            raise ValueError("longlora decodes token by token only when it is built with causal=True")
        if self.wrap and self.grouped:
            raise ValueError("longlora cannot decode with wrap=True: the first tokens would read the last ones")
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        sizes = (batch, self.heads, self.head_dim)
        if not self.grouped:
            return FullCache(*sizes, device=device, dtype=dtype)
        return WindowCache(*sizes, left=self.group_size - 1, device=device, dtype=dtype)

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        if self.grouped:
            oldest, start = state.seen - k.shape[2], state.seen - q.shape[2]
            halves = [
                self._next(q[:, heads], k[:, heads], v[:, heads], shift, start, oldest)
                for heads, shift in self.halves()
            ]
            out = torch.cat(halves, dim=1)
        else:
            out = self._read(q, k, v, None)
        return self.out_proj(self.merge_heads(out)), state

    def _next(self, q: Tensor, k: Tensor, v: Tensor, shift: int, start: int, oldest: int) -> Tensor:
        """Queries from position `start` on, keys from `oldest` on: group by group."""
        outs, stop = [q[:, :, :0]], start + q.shape[2]
        here = start
        while here < stop:
            first = (here + shift) // self.group_size * self.group_size - shift
            until = min(first + self.group_size, stop)
            seen = slice(max(first, 0) - oldest, until - oldest)
            outs.append(self._read(q[:, :, here - start : until - start], k[:, :, seen], v[:, :, seen], None))
            here = until
        return torch.cat(outs, dim=2)

    def extra_repr(self) -> str:
        kinds = f"group_size={self.group_size}, wrap={self.wrap}"
        return f"heads={self.heads}, causal={self.causal}, {kinds}"
