"""Auto-Correlation: attention over time delays, chosen by the correlation of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.ops.autocorrelation.fft import auto_correlation_fft
from core_attn.ops.autocorrelation.gathers import auto_correlation_gathers
from core_attn.ops.autocorrelation.reference import auto_correlation_reference

AUTO_CORRELATION = Operator(
    "auto_correlation",
    [
        Backend("torch", auto_correlation_fft),
        Backend("gathers", auto_correlation_gathers),
        Backend("reference", auto_correlation_reference),
    ],
)


def auto_correlation(
    q: Tensor, k: Tensor, v: Tensor, *, factor: float = 1.0, batch_delays: bool = False, backend: str = "auto"
) -> Tensor:
    """Sum of the values shifted by the k = floor(factor ln L) best delays, weighted by a softmax of their correlations.

    R(tau) = mean over heads and channels of irfft(rfft(q) conj(rfft(k))); out(t) = sum over the chosen tau of
    softmax(R)(tau) v((t + tau) mod L). Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term
    Series Forecasting (S73), eq. (5)-(7), in the form with one set of delays for all heads that its experiments use.

    Args:
        q: (B, H, L, D).
        k: (B, H, M, D); tokens after the L-th are not used, missing ones are zeros.
        v: (B, H, M, Dv); likewise.
        factor: c > 0. At least one delay is used, where c ln L < 1 too, and at most L.
        batch_delays: choose the delays by the mean of R over the batch (the paper's training form; each sample keeps
            its own weights) and not for each sample (its evaluation form).
        backend: "auto", "torch" (O(L log L)), "gathers" (O(L^2), ordinary operations only, for exported graphs) or
            "reference" (O(L^2)).

    Returns:
        (B, H, L, Dv), dtype of v. Half precision is computed in float32.

    Raises:
        ValueError: shapes that do not fit, or a factor that is not positive.
        BackendError: the backend cannot run.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"auto_correlation takes q, k, v of shape (B, H, L, D), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "auto_correlation takes k and v of one batch, head count and length, and q and k of one width, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    # Delays are chosen by R: rounding would choose others.
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = AUTO_CORRELATION(q, k, v, factor=factor, batch_delays=batch_delays, backend=backend)
    return out
