"""Causal kernelised attention token by token: S_t = S_{t-1} + k_t v_tᵀ, o_t = q_t S_t."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    key_padding_mask: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `core_attn.ops.kernel_attention` hands them on -> outputs and state."""
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    if key_padding_mask is not None:
        k = k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    # Zeros that belong to the graph: without any token they are what there is to differentiate.
    state = k[:, :, :0].mT @ v[:, :, :0] if initial_state is None else initial_state
    outs = []
    for t in range(q.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        read = q[:, :, t, None] @ state
        outs.append(read[..., :-1] / (read[..., -1:] + eps) if normalize else read)
    return (torch.cat(outs, dim=2) if outs else (q @ state)[..., : v.shape[3] - normalize]), state
