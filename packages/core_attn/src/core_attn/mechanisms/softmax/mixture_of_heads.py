"""Mixture-of-Head attention, "MoH: Multi-Head Attention as Mixture-of-Head Attention" (S178), section 3.

Shapes: B batch, L queries, M keys, C channels, H heads of which S are shared and H - S routed, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.ops.softmax import reference
from core_attn.registry import register
from core_attn.state import FullCache


@register(
    name="moh",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    source="S178",
    year=2024,
    patterns=frozenset(Pattern),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    maps=True,
    selects=True,
    double_backward=False,
    operator="softmax_attention",
    cascade=Cascade(
        einsums=(
            "S[b,h,l,m] = scale * Q[b,h,l,d] * K[b,h,m,d]",
            "A[b,h,l,m] = softmax[m] S[b,h,l,m]",
            "Y[b,h,l,d] = A[b,h,l,m] * V[b,h,m,d]",
            "R[b,l,r] = softmax[r] (X[b,l,c] * Wr[c,r])",
            "g[b,l,h] = shared and largest routed gates, each group mixed by softmax (X[b,l,c] * Wh[c,2])",
            "O[b,l,h,d] = g[b,l,h] * Y[b,h,l,d]",
        ),
        passes=1,
        flops="4*B*(L + M)*C**2 + 4*B*H*P*D + 2*B*L*C*N",
        bytes="E*(B*(2*L + X)*C + 4*C**2 + N*C)",
        symbols={"N": "outputs of the routers: one a routed head, one a shared head, and two that mix both groups"},
    ),
)
class MixtureOfHeads(SoftmaxAttention):
    """Heads as experts: each token weighs all shared heads and its few best routed heads, Σ g_i head_i W_i (eq. 5).

    With routers W_s, W_r and W_h on the query's token x: shared heads have g_i = α₁ S softmax(x W_s)_i; the `active`
    largest of softmax(x W_r), brought to a sum of `active`, have g_i = α₂ softmax(x W_r)_i; the other heads 0; and
    (α₁, α₂) = 2 softmax(x W_h) (eq. 6 to 8, with the factors of the official code, which keep a head's mean gate at 1).
    A single shared head has no router, and without shared heads α₂ = 1.

    Args:
        dim, heads, causal, bias, kv_heads, dropout, window, scale, backend: see `SoftmaxAttention`.
        shared: number S of heads that every token uses; a quarter by default.
        active: number of routed heads that a token uses besides; by default so many that it uses three quarters of all.

    Raises:
        ValueError: fewer than no shared head, or not 1 to H - S active ones.
    """

    def __init__(
        self, dim: int, *, heads: int = 8, shared: int | None = None, active: int | None = None, **options: Any
    ) -> None:
        super().__init__(dim, heads=heads, **options)
        self.shared = heads // 4 if shared is None else shared
        routed = heads - self.shared
        self.active = max(1, round(0.75 * heads) - self.shared) if active is None else active
        if self.shared < 0 or not 1 <= self.active <= routed:
            raise ValueError(
                f"moh takes shared >= 0 and 1 <= active <= heads - shared, got heads={heads}, shared={self.shared} and "
                f"active={self.active}"
            )
        self.routed_gate = nn.Linear(dim, routed, bias=False)
        self.shared_gate = nn.Linear(dim, self.shared, bias=False) if self.shared > 1 else None
        self.group_gate = nn.Linear(dim, 2, bias=False) if self.shared else None
        self._losses: list[Tensor] | None = None

    def gates(self, x: Tensor, query_padding_mask: Tensor | None = None) -> Tensor:
        """The weight of each head for each token, (B, L, C) -> (B, L, H), shared heads first.

        Inside `balance_losses` the load balance loss of the routed heads is kept (eq. 9): the number of routed heads
        times Σ_i f_i P_i, with f_i the share of tokens that use head i and P_i its mean gate, over real tokens.
        """
        routed = torch.softmax(self.routed_gate(x), dim=-1)
        chosen = torch.zeros_like(routed).scatter(-1, routed.topk(self.active, dim=-1).indices, 1.0)
        if self._losses is not None:
            real = torch.ones_like(routed[..., :1])
            if query_padding_mask is not None:
                real = query_padding_mask.unsqueeze(-1).to(routed.dtype)
            count = real.sum().clamp(min=1.0)
            use, mean = ((t * real).sum(dim=(0, 1)) / count for t in (chosen, routed))
            self._losses.append(routed.shape[-1] * (use * mean).sum())
        picked = routed * chosen
        picked = self.active * picked / picked.sum(-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps)
        if self.group_gate is None:
            return picked
        always = torch.ones_like(picked[..., :1])
        if self.shared_gate is not None:
            always = self.shared * torch.softmax(self.shared_gate(x), dim=-1)
        groups = 2 * torch.softmax(self.group_gate(x), dim=-1)
        return torch.cat([groups[..., :1] * always, groups[..., 1:] * picked], dim=-1)

    def side_input(
        self,
        q: Tensor,
        k: Tensor,
        *,
        x: Tensor,
        query_padding_mask: Tensor | None,
        grid: tuple[int, ...] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The gates as (B, H, L, 1)."""
        return self.gates(x, query_padding_mask).transpose(1, 2).unsqueeze(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Tensor) -> Tensor:
        return aux * super().attend(q, k, v, key_padding_mask=key_padding_mask, aux=None)

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Tensor) -> Tensor:
        scores = SoftmaxAttention.attention_scores(self, q, k, key_padding_mask=key_padding_mask)
        return aux * reference.weights(scores)

    # The gates come after the softmax, so scores alone do not give the map.
    attention_scores = None  # type: ignore[assignment]

    def step(self, x: Tensor, state: FullCache) -> tuple[Tensor, FullCache]:
        self.check_inputs(x)
        q = self.split_heads(self.q_proj(x))
        k, v = state.append(self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)))
        aux = self.gates(x).transpose(1, 2).unsqueeze(-1)
        return self.out_proj(self.merge_heads(self.attend(q, k, v, key_padding_mask=None, aux=aux))), state

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        gates = (self.routed_gate, self.shared_gate, self.group_gate)
        outputs = sum(gate.out_features for gate in gates if gate is not None)
        return {**super().sizes(batch=batch, length=length, context=context, grid=grid), "N": outputs}


@contextmanager
def balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """The load balance losses of every `MixtureOfHeads` in a model, one a call in order, differentiable.

    They keep the router from always choosing the same heads; the paper adds their mean times 0.01 to the task's loss.

    Args:
        model: any module.

    Yields:
        list of scalars, filled as the model runs inside the block.

    Example:
        >>> with balance_losses(model) as losses:
        ...     out = model(x)
        >>> loss = task_loss(out) + 0.01 * torch.stack(losses).mean()
    """
    losses: list[Tensor] = []
    mixers = [m for m in model.modules() if isinstance(m, MixtureOfHeads)]
    for mixer in mixers:
        mixer._losses = losses
    try:
        yield losses
    finally:
        for mixer in mixers:
            mixer._losses = None
