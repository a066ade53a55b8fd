"""Long convolution by real Fourier transforms, with a backward that takes the spectra from forward.

Forward takes three transforms (of x, of the kernel, and back), backward three more: of the output's gradient, and back
to the gradients of x and of the kernel, for the spectra of x and of the kernel are kept. No convolution by transforms
can do with fewer. Groups of channels go through all steps one after another, so that what lies between two transforms
stays in the cache, and no more than one group's is alive besides the spectra.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.ops.fftconv.reference import sum_dtype

# Elements of the real side of a group's transforms.
_AT_ONCE = 1 << 21


def fast_size(least: int) -> int:
    """The smallest number of at least `least` whose only prime factors are 2, 3 and 5: FFTs of such sizes are fast."""
    best, fives = 1 << max(least - 1, 0).bit_length(), 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes << max(-(-least // threes) - 1, 0).bit_length()
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best


def _plan(x: Tensor, kernel: Tensor) -> tuple[torch.dtype, int, list[slice]]:
    """What is summed in, the points of the transforms, and the groups of channels."""
    # So many points that what is behind the last token does not come around to the first.
    size = fast_size(max(int(x.shape[2]) + int(kernel.shape[1]) - 1, 1))
    # Without a sample there is nothing to transform, which not every library of transforms accepts.
    channels = int(x.shape[1]) if x.shape[0] else 0
    many = max(1, _AT_ONCE // (max(1, x.shape[0]) * size))
    groups = [slice(first, min(first + many, channels)) for first in range(0, channels, many)]
    return sum_dtype(x, kernel), size, groups


class _Padded:
    """A buffer with room for `size` points a row, zeros behind the `taps` that are written: no padding of every group.

    Args:
        like: a tensor on the device.
        rows: rows of the largest group, such as (B, channels).
        taps: how many points of a row are written, at its front.
        size: points of a row.
        dtype: what the points are.
        behind: how many are written at its end, those that stand before point 0 on the circle.
        shared: another whose memory will do where as many points are written there; they take turns.
    """

    def __init__(
        self,
        like: Tensor,
        rows: tuple[int, ...],
        taps: int,
        size: int,
        dtype: torch.dtype,
        *,
        behind: int = 0,
        shared: _Padded | None = None,
    ) -> None:
        self.taps, self.behind = taps, behind
        self.buffer: Tensor
        if shared is not None and (shared.taps, shared.behind) == (taps, behind) and len(shared.buffer):
            self.buffer = shared.buffer[0]
            return
        self.buffer = like.new_empty(*rows, size, dtype=dtype)
        self.buffer[..., taps : size - behind] = 0.0

    def spectrum(self, part: Tensor, behind: Tensor | None = None) -> Tensor:
        """Of the rows `part`, and of `behind` from the same point 0 in the other direction."""
        here = self.buffer[..., : part.shape[-2], :]
        taps = part.shape[-1]
        here[..., :taps] = part
        if behind is not None:
            here[..., :1] += behind[..., :1]
            here[..., here.shape[-1] - taps + 1 :] = behind[..., 1:].flip(-1)
        return torch.fft.rfft(here)


def _forward(x: Tensor, kernel: Tensor, reverse: Tensor | None, keep: bool) -> tuple[Tensor, list[Tensor]]:
    dtype, size, groups = _plan(x, kernel)
    (batch, _, length), count = x.shape, kernel.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    spectra = []
    with torch.autocast(x.device.type, enabled=False):
        many = groups[0].stop if groups else 0
        tokens = _Padded(x, (batch, many), length, size, dtype)
        before = 0 if reverse is None else max(count - 1, 0)
        taps = _Padded(x, (many,), count, size, dtype, behind=before, shared=tokens)
        products = None
        for group in groups:
            of_x = tokens.spectrum(x[:, group])
            of_kernel = taps.spectrum(kernel[group], None if reverse is None else reverse[group])
            products = torch.empty_like(of_x) if products is None else products[:, : of_x.shape[1]]
            torch.mul(of_x, of_kernel, out=products)
            if keep:
                # Backward needs them conjugate.
                spectra += [torch.conj_physical_(of_x), torch.conj_physical_(of_kernel)]
            out[:, group] = torch.fft.irfft(products, n=size)[..., :length]
    return out, spectra


def _backward(
    dout: Tensor, x: Tensor, kernel: Tensor, reverse: Tensor | None, spectra: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, size, groups = _plan(x, kernel)
    (batch, _, length), count = x.shape, kernel.shape[1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dkernel = kernel.new_empty(kernel.shape) if groups else kernel.new_zeros(kernel.shape)
    dreverse = kernel.new_empty(0) if reverse is None else dkernel.to(reverse.dtype, copy=True)
    with torch.autocast(x.device.type, enabled=False):
        many = groups[0].stop if groups else 0
        tokens = _Padded(dout, (batch, many), length, size, dtype)
        products = None
        for group, of_x, of_kernel in zip(groups, spectra[::2], spectra[1::2], strict=True):
            of_d = tokens.spectrum(dout[:, group])
            products = torch.empty_like(of_x) if products is None else products[:, : of_x.shape[1]]
            torch.mul(of_x, of_d, out=products)
            circle = torch.fft.irfft(products[0] if batch == 1 else products.sum(0), n=size)
            dkernel[group] = circle[:, :count]
            if reverse is not None:
                dreverse[group, :1] = circle[:, :1]
                dreverse[group, 1:] = circle[:, size - count + 1 :].flip(1)
            dx[:, group] = torch.fft.irfft(of_d.mul_(of_kernel), n=size)[..., :length]
    return dx, dkernel, dreverse


_op = torch.library.custom_op(
    "core_attn::fft_conv",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor kernel, Tensor? reverse, bool keep) -> (Tensor, Tensor[])",
)
_backward_op = torch.library.custom_op(
    "core_attn::fft_conv_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor kernel, Tensor? reverse, Tensor[] spectra) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(x: Tensor, kernel: Tensor, reverse: Tensor | None, keep: bool) -> tuple[Tensor, list[Tensor]]:
    dtype, size, groups = _plan(x, kernel)
    dtype = torch.complex128 if dtype is torch.float64 else torch.complex64
    spectra = []
    for group in groups if keep else ():
        shape = (group.stop - group.start, size // 2 + 1)
        spectra += [x.new_empty(x.shape[0], *shape, dtype=dtype), x.new_empty(shape, dtype=dtype)]
    return x.new_empty(x.shape), spectra


@_backward_op.register_fake
def _(
    dout: Tensor, x: Tensor, kernel: Tensor, reverse: Tensor | None, spectra: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    dreverse = kernel.new_empty(0) if reverse is None else reverse.new_empty(reverse.shape)
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape), dreverse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, kernel, reverse, _ = inputs
    ctx.save_for_backward(x, kernel, reverse, *output[1])
    ctx.mark_non_differentiable(*output[1])


def _differentiate(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Any, ...]:
    x, kernel, reverse, *spectra = ctx.saved_tensors
    dx, dkernel, dreverse = _backward_op(dout, x, kernel, reverse, spectra)
    return dx, dkernel, None if reverse is None else dreverse, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the convolution by Fourier transforms has no second derivative; use backend='reference' for gradients of "
        "gradients"
    )


_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_no_second_derivative)


def run(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    """Arguments as `core_attn.ops.fft_conv` hands them on -> (B, C, L)."""
    given = [x, kernel] if reverse is None else [x, kernel, reverse]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    out: Tensor = _op(x, kernel, reverse, keep)[0]
    return out
