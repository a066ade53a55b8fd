"""A graph's edges as part of a module: they move with it and are not saved with it."""

from __future__ import annotations

from torch import nn

from core_attn.ops.edge import Edges


def keep_edges(module: nn.Module, edges: Edges) -> None:
    """Register the tensors of `edges` as buffers."""
    for name, tensor in edges.tensors().items():
        module.register_buffer(f"edge_{name}", tensor, persistent=False)
    module._node_counts = (edges.heads, edges.tails)  # type: ignore[assignment]


def kept_edges(module: nn.Module) -> Edges:
    """The edges that `keep_edges` registered, where the module is now."""
    heads, tails = module._node_counts  # type: ignore[misc]
    known = {"heads": heads, "tails": tails}
    return Edges(**{name: known[name] if name in known else getattr(module, f"edge_{name}") for name in Edges._fields})
