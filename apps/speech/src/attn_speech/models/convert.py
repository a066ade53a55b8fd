"""Weights of the official MossFormer and MossFormer2, renamed and joined for the models here.

The parity tests read this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_shared.errors import UserError

# Outside the blocks; wrappers around a model, such as "model." or "module.", fall away first.
_OUTER = (
    (r"^enc(oder)?\.conv1d\.", "encoder."),
    (r"^dec(oder)?\.", "decoder."),
    (r"^mask_?net\.norm\.", "norm."),
    (r"^mask_?net\.conv1d_encoder\.", "project."),
    (r"^mask_?net\.pos_enc\.scale$", "position_scale"),
    (r"^mask_?net\.mdl\.(att|intra)_mdl\.norm\.(norm\.)?", "last_norm."),
    (r"^mask_?net\.mdl\.(att|intra)_norm\.", "out_norm."),
    (r"^mask_?net\.prelu\.", "prelu."),
    (r"^mask_?net\.conv1d_out\.", "split."),
    (r"^mask_?net\.conv1_decoder\.", "mask."),
    (r"^mask_?net\.output\.0\.", "gate.0."),
    (r"^mask_?net\.output_gate\.0\.", "gate.1."),
    (r"^mask_?net\.mdl\.(att|intra)_mdl\.mossformerM\.layers\.", "blocks."),
    (r"^mask_?net\.mdl\.(att|intra)_mdl\.mossformerM\.fsmn\.", "memories."),
    (r"\.qk_offset_scale\.", "."),
    (r"\.mdl\.0\.g$", ".scale"),
    (r"\.mdl\.0\.", ".norm."),
    (r"\.mdl\.1\.", ".proj."),
    (r"\.mdl\.3\.sequential\.1\.conv\.weight$", ".conv"),
    (r"^memories\.(\d+)\.conv1\.0\.", r"memories.\1.enter."),
    (r"^memories\.(\d+)\.conv1\.1\.", r"memories.\1.prelu."),
    (r"^memories\.(\d+)\.conv2\.", r"memories.\1.leave."),
    (r"\.gated_fsmn\.fsmn\.conv\.", ".memory."),
    (r"\.gated_fsmn\.fsmn\.", "."),
    (r"\.gated_fsmn\.", "."),
)
# Parts that are one parameter here, in the order of its rows.
_JOINED = (
    (r"^gate\.([01])\.(weight|bias)$", r"gate.\2"),
    (r"^(blocks\.\d+)\.to_(hidden|qk)\.(scale|conv)$", r"\1.in_\3"),
    (r"^(blocks\.\d+)\.to_(hidden|qk)\.proj\.(weight|bias)$", r"\1.in_proj.\3"),
    (r"^(memories\.\d+)\.to_(u|v)\.(norm|proj)\.(weight|bias)$", r"\1.in_\3.\4"),
    (r"^(memories\.\d+)\.to_(u|v)\.conv$", r"\1.in_conv"),
)
_OURS = re.compile(
    r"(encoder|decoder|norm|project|position_scale|blocks|memories|\w+_norm|prelu|split|gate|mask)(\.|$)"
)
# Computed here, not stored.
_TABLES = re.compile(r"(^|\.)(inv_freq|freqs|cached_freqs|cached_scales|dummy)$")


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an official MossFormer or MossFormer2 as the state_dict of ours of the same sizes.

    It is linear in the weights, so gradients can be converted by it too. MossFormer is published in three files
    ("encoder.bin", "decoder.bin", "masknet.bin"): put their names, "encoder.", "decoder." and "masknet.", before their
    keys.

    Args:
        weights: parameters and buffers by the official names.

    Returns:
        dict: for `load_state_dict`.

    Raises:
        UserError: a key that is none of these models'.
    """
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for official, tensor in weights.items():
        if _TABLES.search(official):
            continue
        key = re.sub(r"^((model|module)\.)+", "", official)
        for pattern, replacement in _OUTER:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^(blocks\.\d+)\.to_out\.(scale|conv)$", r"\1.out_\2", key)
        key = re.sub(r"^(blocks\.\d+)\.to_out\.proj\.", r"\1.out_proj.", key)
        joined = key
        for pattern, replacement in _JOINED:
            joined = re.sub(pattern, replacement, joined)
        if not _OURS.match(joined):
            raise UserError(f"{official!r} is not a weight of MossFormer or MossFormer2")
        parts.setdefault(joined, []).append((key, _shaped(key, tensor)))
    # "hidden" before "qk", "u" before "v", 0 before 1.
    return {name: torch.cat([t for _, t in sorted(found, key=lambda one: one[0])]) for name, found in parts.items()}


def _shaped(key: str, tensor: Tensor) -> Tensor:
    """Convolutions of one tap are linear maps, depthwise ones lists of filters."""
    if key == "encoder.weight":
        return tensor.squeeze(1)
    if key == "decoder.weight":
        return tensor.squeeze(1).mT
    if ".memory.conv" in key:
        return tensor.squeeze(-1)  # (C, inputs of a channel, K)
    if key.endswith((".conv", "_conv")):
        return tensor.squeeze(1)
    if tensor.dim() == 3 and tensor.shape[2] == 1:
        return tensor.squeeze(2)
    return tensor
