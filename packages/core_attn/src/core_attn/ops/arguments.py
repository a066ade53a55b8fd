"""What operators on q, k and v share: the checks of their shapes, and what is done to them before any form runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> None:
    """Refuse q (B, H, L, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) and key_padding_mask (B, M) that do not fit.

    Raises:
        ValueError: what is wrong, in one sentence.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must have shape (B, H, L, D), got {_shapes(q, k, v)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, L, D), k (B, Hkv, M, D) and v (B, Hkv, M, Dv) do not fit: got {_shapes(q, k, v)}")
    if k.shape[1] != q.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"the {k.shape[1]} heads of k and v must divide the {q.shape[1]} heads of q")
    check_dtypes(q=q, k=k, v=v)
    if key_padding_mask is not None:
        if key_padding_mask.dtype is not torch.bool:
            raise ValueError(f"key_padding_mask must be boolean (True = real token), got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"key_padding_mask must have shape (B, M) = {(k.shape[0], k.shape[2])}, "
                f"got {tuple(key_padding_mask.shape)}"
            )


def check_dtypes(**tensors: Tensor) -> None:
    """Refuse tensors, by name, of several dtypes, or of one that is not floating point.

    Under autocast float32 and half precision may meet, as in PyTorch's own operators: a norm or an exponential before
    the operator gives float32 beside the halves of linear layers, and `autocast_dtype` brings them together.

    Raises:
        ValueError: which dtypes they have.
    """
    dtypes = [t.dtype for t in tensors.values()]
    if all(dtype.is_floating_point for dtype in dtypes):
        device = next(iter(tensors.values())).device.type
        if len(set(dtypes)) == 1 or (torch.is_autocast_enabled(device) and torch.float64 not in dtypes):
            return
    raise ValueError(f"{_listed(tensors)} must have one floating dtype, got {_listed(map(str, dtypes))}")


def autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on and one of them is float32; else as they are."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and any(t.dtype is torch.float32 for t in tensors):
        dtype = torch.get_autocast_dtype(device)
        return tuple(t.to(dtype) for t in tensors)
    return tensors


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"


def _shapes(*tensors: Tensor) -> str:
    # Not before it is needed: torch.compile cannot write down a shape that is not fixed.
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def prepare_qkv(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where autocast is on, with zeros in place of padding.

    Weights of exactly zero do not protect from NaN: 0 * NaN is NaN, forward and backward.
    """
    q, k, v = autocast_dtype(q, k, v)
    if key_padding_mask is not None:
        padding = ~key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    return q, k, v


def default_scale(q: Tensor, scale: float | None) -> float:
    """`scale`, or 1/√D where it is None."""
    if scale is not None:
        return scale
    return float(q.shape[-1] ** -0.5) if q.shape[-1] else 1.0
