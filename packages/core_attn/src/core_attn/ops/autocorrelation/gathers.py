"""Auto-Correlation of ordinary tensor operations only: what a graph exported to other runtimes can hold.

No FFT, no strides, no loop: one L x L matrix of products a sample, summed along its circular diagonals, and one with
the weights of the chosen delays on its own. O(L^2): other runtimes lack the transforms and fused sums of the fast form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.ops.autocorrelation.reference import choose_delays, fit_length


def auto_correlation_gathers(
    q: Tensor, k: Tensor, v: Tensor, *, factor: float = 1.0, batch_delays: bool = False
) -> Tensor:
    """As `core_attn.ops.auto_correlation`."""
    heads, length, width = q.shape[1:]
    k, v = fit_length(k, length), fit_length(v, length)
    dtype = v.dtype
    wide = torch.promote_types(q.dtype, torch.float32)
    steps = torch.arange(length, device=q.device)
    later = (steps[:, None] + steps) % length  # [s, tau]: the step tau after s
    gram = torch.einsum("bhsd,bhtd->bst", k.to(wide), q.to(wide))
    correlation = gram.gather(2, later.expand(gram.shape[0], -1, -1)).sum(1) / (heads * width)
    delays = choose_delays(correlation.detach(), factor=factor, batch_delays=batch_delays)
    weights = torch.softmax(correlation.gather(-1, delays), dim=-1)
    by_delay = torch.zeros_like(correlation).scatter(-1, delays, weights)
    circulant = by_delay[:, (steps - steps[:, None]) % length]  # [t, s]: the weight of the delay from t to s
    out = circulant @ v.to(wide).transpose(1, 2).flatten(2)
    return out.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
