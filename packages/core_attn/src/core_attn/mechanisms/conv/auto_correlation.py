"""Auto-Correlation as a token mixer.

Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting (S73), section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core_attn import ops
from core_attn.contract import Growth, Pattern
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.ops.autocorrelation.reference import auto_correlation_map
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

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return auto_correlation_map(q, k, factor=self.factor, batch_delays=self.training)
