"""Weights of the papers' official PyTorch code, renamed for the models here. The parity tests read this table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from core_attn.naming import unknown

Rename = tuple[str, str]  # regular expression, replacement

_ATTENTION: tuple[Rename, ...] = (
    (r"\.self_attention\.", ".attention."),
    (r"\.query_projection\.", ".q_proj."),
    (r"\.key_projection\.", ".k_proj."),
    (r"\.value_projection\.", ".v_proj."),
    (r"\.out_projection\.", ".out_proj."),
)
_LAYERS: tuple[Rename, ...] = (
    *_ATTENTION,
    (r"^encoder\.attn_layers\.(\d+)\.", r"encoder.\1."),
    (r"^decoder\.layers\.(\d+)\.", r"decoder.\1."),
    (r"\.conv1\.", ".feed_forward.up."),
    (r"\.conv2\.", ".feed_forward.down."),
)
_ENCODER_DECODER: tuple[Rename, ...] = (
    *_LAYERS,
    (r"^enc_embedding\.", "encoder_embedding."),
    (r"^dec_embedding\.", "decoder_embedding."),
    (r"\.value_embedding\.tokenConv\.", ".token."),
    (r"\.temporal_embedding\.embed\.", ".calendar."),
    (r"^(encoder|decoder)\.norm\.", r"\1_norm."),
    (r"^decoder\.projection\.", "projection."),
)

RENAMES: dict[str, tuple[Rename, ...]] = {
    "autoformer": (
        *_ENCODER_DECODER,
        (r"_norm\.layernorm\.", "_norm.norm."),
        (r"^(decoder\.\d+)\.projection\.", r"\1.trend."),
    ),
    "informer": (
        *_ENCODER_DECODER,
        (r"^encoder\.conv_layers\.(\d+)\.downConv\.", r"distil.\1.conv."),
        (r"^encoder\.conv_layers\.(\d+)\.norm\.", r"distil.\1.norm."),
    ),
    "flowformer": _ENCODER_DECODER,
    "transformer": _ENCODER_DECODER,
    "flowformer_classifier": (
        *_LAYERS,
        (r"^project_inp\.", "embedding."),
        (r"^pos_enc\.pe$", "positions"),
        (r"^encoder\.norm\.", "norm."),
        (r"^output_layer\.", "output."),
    ),
    "utde": (
        (r"^(linear|periodic)\.", r"time.\1."),
        (r"^time_attn_ts\.", "series_attention."),
        (r"^time_attn\.", "note_attention."),
        (r"\.linears\.0\.", ".query."),
        (r"\.linears\.1\.", ".key."),
        (r"\.linears\.2\.", ".out."),
        (r"^proj_ts\.", "imputed."),
        (r"^moe\.gate\.", "gate."),
        (r"^out_layer\.", "out."),
        (r"^trans_(self_cross_ts_txt|ts_mem)\.", ""),
        (r"^embed_positions_q(_1)?\.weight$", "positions"),
        (r"^layer_norm\.(weight|bias)$", r"norm.0.\1"),
        (r"^layer_norm\.", "norm."),
        (r"\.layer_norms\.0\.", ".self_norm.0."),
        (r"\.layer_norms\.1\.", ".ff_norm.0."),
        (r"\.self_attn\.", ".self_attention.0."),
        (r"\.self_attns\.", ".self_attention."),
        (r"\.cross_attn_([12])\.", lambda m: f".cross_attention.{int(m[1]) - 1}."),  # type: ignore[dict-item]
        (r"\.pre_self_attn_layer_norm\.", ".self_norm."),
        (r"\.pre_encoder_attn_layer_norm\.", ".cross_norm."),
        (r"\.pre_ffn_layer_norm\.", ".ff_norm."),
        (r"\.fc([12])\.(\d\.)?", lambda m: f".feed_forward.{m[2] or '0.'}{('up', 'down')[int(m[1]) - 1]}."),  # type: ignore[dict-item]
    ),
    "itransformer": (
        *_LAYERS,
        (r"^enc_embedding\.value_embedding\.", "embedding."),
        (r"^encoder\.norm\.", "norm."),
        (r"^projector\.", "projection."),
    ),
    "patchtst": (
        (r"^model\.revin_layer\.affine_weight$", "norm_window.scale"),
        (r"^model\.revin_layer\.affine_bias$", "norm_window.shift"),
        (r"^model\.backbone\.W_pos$", "positions"),
        (r"^model\.backbone\.W_P\.", "patch_embedding."),
        (r"^model\.backbone\.encoder\.layers\.(\d+)\.", r"encoder.\1."),
        (r"\.self_attn\.W_([QKV])\.", lambda m: f".attention.{m[1].lower()}_proj."),  # type: ignore[dict-item]
        (r"\.self_attn\.to_out\.0\.", ".attention.out_proj."),
        (r"\.norm_attn\.1\.", ".norm1."),
        (r"\.norm_ffn\.1\.", ".norm2."),
        (r"\.ff\.0\.", ".feed_forward.up."),
        (r"\.ff\.3\.", ".feed_forward.down."),
        (r"^model\.head\.linears?\.", "head."),
    ),
    "dlinear": ((r"^Linear_Seasonal\.", "seasonal."), (r"^Linear_Trend\.", "trend.")),
}

# Not parameters here: tables that are computed, a fixed scale, and a bias that cancels (see SeasonalNorm).
DROPPED = (
    r"\.embed_positions_q\.\d|^bertrep\.|\.post_\w+_layer_norm\."  # used twice, not held here, and not used
    r"|\.position_embedding\.pe$|\.sdp_attn\.scale$|\.norm\.layernorm\.bias$"
)

# Where the same numbers are held in another order.
RESHAPES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    (r"\.feed_forward\.(up|down)\.weight$", lambda w: w.flatten(1)),  # convolution of one step = linear
    (r"^positions$", lambda w: w.flatten(0, 1) if w.dim() == 3 else w),  # (L, 1, D)
    (r"(\.token|^distil\.\d+\.conv)\.weight$", lambda w: w.permute(0, 2, 1).flatten(1)),  # (D, C, 3) -> (D, 3 C)
    (r"\.trend\.weight$", lambda w: w.permute(2, 0, 1).flatten(0, 1) if w.dim() == 3 else w),  # (C, D, 3) -> (3 C, D)
)


def from_official(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an official model as the state_dict of ours with the same sizes.

    Sources: Autoformer, iTransformer (with its Flowformer and Transformer) and Informer from their authors'
    repositories, PatchTST from PatchTST_supervised, UTDE from MultimodalMIMIC, DLinear from LTSF-Linear. It is linear
    in the weights, so gradients can be converted by it too.

    Args:
        name: a trainable model of `attn_timeseries.config.MODELS`.
        weights: the official parameters and buffers by their official names.

    Returns:
        dict: for `load_state_dict`.

    Raises:
        UnknownNameError: a model without an official counterpart.
    """
    if name not in RENAMES:
        raise unknown("model with official weights", name, RENAMES)
    ours: dict[str, Tensor] = {}
    for official, tensor in weights.items():
        if re.search(DROPPED, official):
            continue
        key = official
        for pattern, replacement in RENAMES[name]:
            key = re.sub(pattern, replacement, key)
        for pattern, reshape in RESHAPES:
            if re.search(pattern, key):
                tensor = reshape(tensor)
        ours[key] = tensor
    if name in ("dlinear", "patchtst"):
        ours = _gather_channels(ours)
    if name == "utde":
        ours = _split_projections(ours)
    if name == "patchtst" and "head.weight" in ours:
        width = ours["positions"].shape[1]  # the official head reads (D, N) tokens, ours (N, D)
        ours["head.weight"] = ours["head.weight"].unflatten(2, (width, -1)).transpose(2, 3).flatten(2)
    return ours


def _gather_channels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One linear layer a channel ("head.0.weight", "head.1.weight" …), or one shared, -> `ChannelLinear`'s tensors."""
    ours: dict[str, Tensor] = {}
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in weights.items():
        match = re.fullmatch(r"(seasonal|trend|head)\.(?:\d+\.)?(weight|bias)", key)
        if match is None:
            ours[key] = tensor
        else:
            groups.setdefault(f"{match[1]}.{match[2]}", []).append(tensor)
    return ours | {key: torch.stack(tensors) for key, tensors in groups.items()}


def _split_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The "in_proj_weight" of queries, keys and values, one below the other, -> a layer each."""
    ours: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        stem, found, kind = key.partition(".in_proj_")
        if found:
            ours |= {f"{stem}.{part}_proj.{kind}": one for part, one in zip("qkv", tensor.chunk(3))}
        else:
            ours[key] = tensor
    return ours
