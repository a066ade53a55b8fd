"""Published weights -> ours: names, layouts, and buffers that must say what ours compute.

Nothing is left over: every published tensor is used, or compared with what it repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core_attn.mechanisms.conv.hyena import ImplicitFilter

_PLAIN = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "ffn.fc1.weight",
    "mlp.fc1.bias": "ffn.fc1.bias",
    "mlp.fc2.weight": "ffn.fc2.weight",
    "mlp.fc2.bias": "ffn.fc2.bias",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
    "mixer.short_filter.bias": "mixer.conv.bias",
    "mixer.filter_fn.implicit_filter.0.weight": "mixer.filter.layers.0.weight",
    "mixer.filter_fn.implicit_filter.0.bias": "mixer.filter.layers.0.bias",
    "mixer.filter_fn.implicit_filter.2.weight": "mixer.filter.layers.1.weight",
    "mixer.filter_fn.implicit_filter.2.bias": "mixer.filter.layers.1.bias",
    "mixer.filter_fn.implicit_filter.4.weight": "mixer.filter.layers.2.weight",
    "mixer.filter_fn.implicit_filter.4.bias": "mixer.filter.layers.2.bias",
    "mixer.filter_fn.implicit_filter.6.weight": "mixer.filter.out.weight",
}
_SINES = tuple(f"mixer.filter_fn.implicit_filter.{i}.freq" for i in (1, 3, 5))
# Positions and windows are computed here; published ones may differ by rounding and no more, or are trained.
_ROUNDING = 1e-5
_WHOLE = {
    "backbone.embeddings.word_embeddings.weight": "embeddings.weight",
    "backbone.ln_f.weight": "norm.weight",
    "backbone.ln_f.bias": "norm.bias",
}


def hyenadna(
    tensors: Mapping[str, Tensor], *, filters: Sequence[ImplicitFilter], ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The published state_dict of HyenaDNA (with or without "model." before its names, and the tied output layer).

    Args:
        tensors: published names -> tensors.
        filters: of each block here.
        ours: this model's state_dict, for shapes.

    Returns:
        Our state_dict. Trained positions become `offsets` of the filters, where they differ from the definition's.

    Raises:
        ValueError: a name left over or missing, another shape, or a buffer that is not what the definition says.
    """
    left = {name.removeprefix("model."): value for name, value in tensors.items()}
    found: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"the published weights lack {name}")
        return left.pop(name)

    for theirs, mine in _WHOLE.items():
        found[mine] = take(theirs)
    head = left.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found["embeddings.weight"]):
        raise ValueError("lm_head.weight is not tied to the embeddings, as that of HyenaDNA is")
    for index, written in enumerate(filters):
        theirs, mine = f"backbone.layers.{index}.", f"blocks.{index}."
        for one, other in _PLAIN.items():
            found[mine + other] = take(theirs + one)
        found[mine + "mixer.conv.weight"] = take(theirs + "mixer.short_filter.weight").squeeze(1).T
        found[mine + "mixer.skip"] = take(theirs + "mixer.filter_fn.bias").unflatten(
            0, (len(ours[mine + "mixer.skip"]), -1)
        )
        sines = [take(theirs + name) for name in _SINES]
        if not all(torch.equal(sines[0], other) for other in sines[1:]):
            raise ValueError(f"the sines of block {index} have different frequencies, and HyenaDNA's share theirs")
        found[mine + "mixer.filter.freq"] = sines[0].flatten()
        place = theirs + "mixer.filter_fn."
        _check(place + "pos_emb.t", take(place + "pos_emb.t").flatten(), _time(written))
        _check(place + "modulation.deltas", take(place + "modulation.deltas").flatten().abs(), _deltas(written))
        features = take(place + "pos_emb.z")[0]
        expected = _features(written)
        if features.shape != expected.shape:
            raise ValueError(
                f"published filters have {tuple(features.shape)} places and features, these {tuple(expected.shape)}: "
                f"set l_max={features.shape[0]} and emb_dim={features.shape[1]}"
            )
        offsets = features.double() - expected
        if offsets.abs().max() > _ROUNDING:
            found[mine + "mixer.filter.offsets"] = offsets.to(features.dtype)
    if left:
        raise ValueError(f"published weights that this model has no place for: {', '.join(sorted(left)[:5])}")
    for name, value in found.items():
        if name in ours and ours[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(ours[name].shape)} here and {tuple(value.shape)} in the published weights"
            )
    return found


def _check(name: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape or not torch.allclose(value.double(), expected, rtol=_ROUNDING, atol=_ROUNDING):
        raise ValueError(f"{name} is not what HyenaDNA defines for a filter of this size")


def _time(written: ImplicitFilter) -> Tensor:
    return torch.arange(written.l_max, dtype=torch.float64) / (written.l_max - 1)


def _features(written: ImplicitFilter) -> Tensor:
    """(l_max, A): time, cosines and sines of every position, as `ImplicitFilter.forward` computes them."""
    count = written.emb_dim // 2
    bands = torch.linspace(1e-4, count - 1, count, dtype=torch.float64)
    angle = bands * (2 * torch.pi / written.l_max * torch.arange(written.l_max, dtype=torch.float64)[:, None])
    return torch.cat([_time(written)[:, None], angle.cos(), -angle.sin()], dim=1)


def _deltas(written: ImplicitFilter) -> Tensor:
    from core_attn.mechanisms.conv import hyena

    target = -torch.log(torch.tensor(hyena._TARGET, dtype=torch.float64)).item()
    return torch.linspace(target / hyena._SLOW, target / hyena._FAST, written.channels, dtype=torch.float64)
