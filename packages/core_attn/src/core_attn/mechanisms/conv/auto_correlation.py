"""Auto-Correlation as a token mixer.

Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting (S73), section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.autocorrelation.reference import auto_correlation_map, number_of_delays
from core_attn.registry import register


@register(
    name="auto_correlation",
    title="Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting",
    source="S73",
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    time=Growth.LOGLINEAR,
    memory=Growth.LOGLINEAR,
    maps=True,
    selects=True,
    batch_dependent_training=True,
    cascade=Cascade(
        einsums=(
            "F[b,h,f,d] = fft[t] Q[b,h,t,d]",
            "G[b,h,f,d] = fft[t] K[b,h,t,d]",
            "S[b,f] = F[b,h,f,d] * conj(G[b,h,f,d])",
            "R[b,tau] = ifft[f] S[b,f] / (H * D)",
            "delay[b,n] = top[tau] R[b,tau]",
            "W[b,n] = softmax[n] R[b,delay[b,n]]",
            "O[b,h,t,d] = W[b,n] * V[b,h,t + delay[b,n],d]",
        ),
        # The keys for all correlations, then the values at the delays they choose.
        passes=2,
        # Keys and values are cut or padded to L. Short sequences take the correlations from one matrix product instead.
        flops="4*B*(L + M)*C**2 + 2.5*B*(2*C + 1)*L*T + 2*B*L*C*N",
        bytes="E*(B*(2*L + X)*C + 4*C**2)",
        symbols={"N": "delays", "T": "log2 of L: a real transform of L numbers takes 2.5 L log2 L"},
    ),
)
class AutoCorrelation(MultiHeadMixer):
    """Series attend to themselves at the delays where they resemble themselves.

    In train mode the delays are chosen by the mean correlation of the batch, in eval mode for each sample, as in the
    paper's implementation. Time is circular, and in cross attention keys and values are cut or zero-padded to L.

    Args:
        dim, heads, causal, bias: see `MultiHeadMixer`.
        factor: c of k = floor(c ln L) delays; the paper uses 1 to 3.
        backend: see `core_attn.ops.auto_correlation`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        bias: bool = True,
        factor: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads=heads, causal=causal, bias=bias)
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}")
        self.factor = factor
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.auto_correlation(q, k, v, factor=self.factor, batch_delays=self.training, backend=self.backend)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return {**sizes, "N": number_of_delays(length, self.factor), "T": math.log2(max(length, 2))}

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return auto_correlation_map(q, k, factor=self.factor, batch_delays=self.training)
