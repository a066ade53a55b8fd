"""Weights of other people's PyTorch code, renamed for the models here. The parity tests read these tables."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from core_attn.naming import unknown

Rename = tuple[str, str]  # regular expression, replacement

RENAMES: dict[str, tuple[Rename, ...]] = {
    # The official code and the checkpoints that its authors publish.
    "rbtransformer": (
        (r"^bde_proj_layer\.linear\.", "embedding."),
        (r"^electrode_id_embedding\.embedding$", "identity"),
        (r"^intercortical_attention_blocks\.(\d+)\.", r"blocks.\1."),
        (r"\.(attention|feed_forward)\.norm\.", r".\1_norm."),
        (r"\.attention\.fn\.to_out\.0\.", ".attention.out_proj."),
        (r"\.attention\.fn\.", ".attention."),
        (r"\.feed_forward\.fn\.net\.", ".feed_forward."),
        (r"^classification_head\.norm\.", "norm."),
        (r"^classification_head\.mlp\.", "head."),
    ),
    # braindecode's EEGNet with final_layer_with_constraint.
    "eegnet": (
        (r"\.parametrizations\.weight\.original$", ".weight"),
        (r"^conv_temporal\.", "temporal."),
        (r"^bnorm_temporal\.", "temporal_norm."),
        (r"^conv_spatial\.", "spatial."),
        (r"^bnorm_1\.", "spatial_norm."),
        (r"^conv_separable_depth\.", "depthwise."),
        (r"^conv_separable_point\.", "pointwise."),
        (r"^bnorm_2\.", "separable_norm."),
        (r"^final_layer\.linearconstraint\.", "dense."),
    ),
}


def from_official(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an official model as the state_dict of ours with the same sizes.

    It is linear in the weights, so gradients can be converted by it too.

    Args:
        name: "rbtransformer" (the official code) or "eegnet" (braindecode's).
        weights: their parameters and buffers by their names.

    Returns:
        dict: for `load_state_dict`.

    Raises:
        UnknownNameError: a model without a counterpart.
    """
    if name not in RENAMES:
        raise unknown("model with official weights", name, RENAMES)
    ours: dict[str, Tensor] = {}
    for official, tensor in weights.items():
        key = official
        for pattern, replacement in RENAMES[name]:
            key = re.sub(pattern, replacement, key)
        if key == "identity":
            ours[key] = tensor.squeeze(0)
        elif key.endswith(".attention.to_qkv.weight"):
            for projection, part in zip("qkv", tensor.chunk(3)):
                ours[key.replace("to_qkv", f"{projection}_proj")] = part
        else:
            ours[key] = tensor
    return ours
