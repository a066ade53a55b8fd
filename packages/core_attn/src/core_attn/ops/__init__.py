"""Attention operators: pure functions on tensors of shape (B, H, L, D), every one with the keyword `backend`.

The functions are imported on first use; `core_attn.dispatch.operators()` holds their backends.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "agent_attention": "core_attn.ops.agent",
    "auto_correlation": "core_attn.ops.autocorrelation",
    "block_sparse_attention": "core_attn.ops.block_sparse",
    "channel_attention": "core_attn.ops.channel",
    "clipped_softmax_attention": "core_attn.ops.clipped",
    "delta_rule": "core_attn.ops.delta",
    "delta_rule_step": "core_attn.ops.delta",
    "edge_attention": "core_attn.ops.edge",
    "edge_softmax": "core_attn.ops.edge",
    "edge_sum": "core_attn.ops.edge",
    "efficient_attention": "core_attn.ops.efficient",
    "fft_conv": "core_attn.ops.fftconv",
    "flow_attention": "core_attn.ops.flow",
    "gather_attention": "core_attn.ops.gather",
    "gated_linear_attention": "core_attn.ops.gated_linear",
    "gated_linear_step": "core_attn.ops.gated_linear",
    "joint_attention": "core_attn.ops.joint",
    "kernel_attention": "core_attn.ops.kernel",
    "kernel_step": "core_attn.ops.kernel",
    "landmark_attention": "core_attn.ops.landmark",
    "neighborhood_attention": "core_attn.ops.neighborhood",
    "prob_sparse_attention": "core_attn.ops.prob_sparse",
    "rat_attention": "core_attn.ops.rat",
    "rat_step": "core_attn.ops.rat",
    "relative_attention": "core_attn.ops.relative",
    "scalar_decay_attention": "core_attn.ops.scalar_decay",
    "scalar_decay_step": "core_attn.ops.scalar_decay",
    "sinkhorn": "core_attn.ops.transport",
    "softmax_attention": "core_attn.ops.softmax",
    "softmax_attention_varlen": "core_attn.ops.softmax.varlen",
    "sort_edges": "core_attn.ops.edge",
    "titans_memory": "core_attn.ops.titans",
    "titans_step": "core_attn.ops.titans",
    "window_attention": "core_attn.ops.window",
    "window_cross_attention": "core_attn.ops.partition",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'core_attn.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
