"""DuoAttention: a gate a head decides between full attention and sinks with a window.

"DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (S134), section 2. Shapes: B
batch, L tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops import window_attention
from core_attn.ops.softmax.reference import weights
from core_attn.ops.window import reference
from core_attn.registry import register
from core_attn.state import FullCache, MixedCache, SinkCache


@register(
    name="duo",
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    source="S134",
    year=2024,
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    double_backward=False,
    operator="window_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d]",
            "F[b,h,l,m] = softmax[m] S[b,h,l,m]",
            "R[b,h,l,m] = softmax[m] S[b,h,l,m] for m a sink or in the window of l",
            "A[b,h,l,m] = gate[h] * F[b,h,l,m] + (1 - gate[h]) * R[b,h,l,m]",
            "O[b,h,l,d] = A[b,h,l,m] * V[b,h,m,d]",
        ),
        passes=1,
        flops="8*B*L*C**2 + 4*B*D*(N*P + T*W)",
        bytes="E*(2*B*L*C + 4*C**2)",
        symbols={
            "N": "heads that compute full attention",
            "T": "heads that compute sinks and a window",
            "W": "pairs of a query and a key in sinks and a window",
        },
    ),
)
class DuoAttention(MultiHeadMixer):
    """gate · full attention + (1 - gate) · streaming attention in every head (section 2.2).

    The gates start at 1 and are trained with the loss of the task, or of distillation, and `penalty()`, which draws
    them to 0. `prune` then sorts the heads: retrieval heads keep full attention and every key, streaming heads read and
    keep the sinks and the last `window` tokens only. Positions are the model's own, as in the official code.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        window: w, the tokens that streaming heads read besides the sinks, the token itself included, at least 1; with
            `causal=False` so many to both sides.
        sinks: the first tokens that streaming heads always read.
        backend: of both kinds of attention, see `core_attn.ops.window_attention`. Gradients of gradients need
            "reference".

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
        window: int = 256,
        sinks: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {window}")
        if sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {sinks}")
        self.window, self.sinks = window, sinks
        self.backend = backend
        self.gates = nn.Parameter(torch.ones(heads))
        # The retrieval heads after `prune`; None while all heads compute both kinds.
        self.retrieval: tuple[int, ...] | None = None

    def penalty(self) -> Tensor:
        """Mean of the gates' sizes, the regulariser of section 2.2; 0.05 of it joins the loss in the paper."""
        return self.gates.abs().mean()

    def prune(self, threshold: float = 0.5) -> Self:
        """Make heads with a gate above `threshold` retrieval heads and all others streaming heads.

        Their gates become 1 and 0 and are no longer trained, so that the saved weights say which is which: load them
        into a fresh module, and it computes the same; call `prune` there too, and it is as fast.

        Returns:
            The module itself.
        """
        with torch.no_grad():
            self.gates.copy_(self.gates > threshold)
        self.gates.requires_grad_(False)
        self.retrieval = tuple(i for i, gate in enumerate(self.gates.tolist()) if gate)
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """Keys of the window before and after a token."""
        return self.window - 1, 0 if self.causal else self.window - 1

    def kinds(self) -> list[tuple[tuple[int, ...], bool]]:
        """After `prune`: the heads of each kind that has any, and whether they are streaming heads."""
        retrieval = self.retrieval or ()
        rest = tuple(i for i in range(self.heads) if i not in retrieval)
        return [(heads, streaming) for heads, streaming in ((retrieval, False), (rest, True)) if heads]

    def _read(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, *, streaming: bool) -> Tensor:
        return window_attention(
            q,
            k,
            v,
            window=self.sides if streaming else None,
            causal=self.causal,
            sinks=self.sinks if streaming else 0,
            key_padding_mask=key_padding_mask,
            backend=self.backend,
        )

    def _blend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        gates = self.gates.clamp(0, 1).to(q.dtype)[:, None, None]
        full = self._read(q, k, v, key_padding_mask, streaming=False)
        near = self._read(q, k, v, key_padding_mask, streaming=True)
        return gates * full + (1 - gates) * near

    def _joined(self, outs: list[Tensor]) -> Tensor:
        """The heads of all kinds in their own order."""
        order = torch.tensor([i for heads, _ in self.kinds() for i in heads], device=outs[0].device)
        return torch.cat(outs, dim=1).index_select(1, order.argsort())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        if self.retrieval is None:
            return self._blend(q, k, v, key_padding_mask)
        outs = []
        for heads, streaming in self.kinds():
            index = torch.tensor(heads, device=q.device)
            a, b, c = (x.index_select(1, index) for x in (q, k, v))
            outs.append(self._read(a, b, c, key_padding_mask, streaming=streaming))
        return self._joined(outs)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        gates = self.gates.clamp(0, 1).to(q.dtype)[:, None, None]
        full, near = (
            weights(
                reference.scores(
                    q,
                    k,
                    window=window,
                    causal=self.causal,
                    key_padding_mask=key_padding_mask,
                    scale=self.head_dim**-0.5,
                    sinks=sinks,
                )
            )
            for window, sinks in ((None, 0), (self.sides, self.sinks))
        )
        return gates * full + (1 - gates) * near

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        left, right = self.sides
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        full = self.heads if self.retrieval is None else len(self.retrieval)
        near = self.heads if self.retrieval is None else self.heads - full
        pairs = reference.pairs(length, length, left=left, right=right, sinks=self.sinks)
        return sizes | {"N": full, "T": near, "W": pairs}

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullCache | MixedCache:
        """An empty cache: all tokens, and after `prune` in streaming heads the sinks and the last w - 1 only.

        Raises:
            ValueError: this module is not causal.
        """
        if not self.causal:
            raise ValueError("duo decodes token by token only when it is built with causal=True")
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        if self.retrieval is None:
            return FullCache(batch, self.heads, self.head_dim, device=device, dtype=dtype)
        parts: list[tuple[tuple[int, ...], FullCache | SinkCache]] = []
        for heads, streaming in self.kinds():
            sizes = (batch, len(heads), self.head_dim)
            if streaming:
                cache = SinkCache(*sizes, sinks=self.sinks, left=self.window - 1, device=device, dtype=dtype)
                parts.append((heads, cache))
            else:
                parts.append((heads, FullCache(*sizes, device=device, dtype=dtype)))
        return MixedCache(parts)

    def step(self, x: Tensor, state: FullCache | MixedCache) -> tuple[Tensor, FullCache | MixedCache]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); `state` is updated in place and returned."""
        self.check_inputs(x)
        if isinstance(state, MixedCache) == (self.retrieval is None):
            raise ValueError("this state was made before prune, or for another module: call init_state again")
        q = self.split_heads(self.q_proj(x))
        k, v = self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))
        if isinstance(state, MixedCache):
            outs = []
            for (heads, streaming), own in zip(self.kinds(), state.append(k, v), strict=True):
                queries = q.index_select(1, torch.tensor(heads, device=q.device))
                outs.append(self._read(queries, *own, None, streaming=streaming))
            out = self._joined(outs)
        else:
            out = self._blend(q, *state.append(k, v), None)
        return self.out_proj(self.merge_heads(out)), state

    def extra_repr(self) -> str:
        kinds = f"window={self.window}, sinks={self.sinks}, retrieval={self.retrieval}"
        return f"heads={self.heads}, causal={self.causal}, {kinds}"
