"""Long convolution: every channel with a kernel of its own, as long as the sequence, in O(L log L).

"Hyena Hierarchy: Towards Larger Convolutional Language Models" (Poli et al., ICML 2023), section 2.1, as in "HyenaDNA"
(S55). Shapes: B batch, C channels, L tokens, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator
from core_attn.naming import unknown
from core_attn.ops.fftconv import reference, spectral


class _Convolution(Operator):
    """`Operator` for two tensors that are no q, k and v."""

    def __call__(self, *args: Any, backend: str = "auto", **options: Any) -> Tensor:
        named = {b.name: b for b in self.backends}
        if backend != "auto" and backend not in named:
            raise unknown(f"backend of {self.name}", backend, ["auto", *named])
        out: Tensor = named["torch" if backend == "auto" else backend].run(*args, **options)
        return out


OPERATOR = _Convolution("fft_conv", [Backend("torch", spectral.run), Backend("reference", reference.run)])


def fft_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    reverse_kernel: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = Σ_{j>=0} kernel_j x_(t-j) + skip · x_t in every channel, with zeros before the first token.

    Taps behind the length of x have nothing to meet. Transforms and sums are float32 for 16-bit inputs.

    Args:
        x: (B, C, L), floating point.
        kernel: (C, K), any floating dtype, K >= 1.
        skip: (C,) factor of the token itself, added to tap 0.
        reverse_kernel: (C, K) makes it bidirectional: adds Σ_{j>=0} reverse_kernel_j x_(t+j).
        backend: "auto", "torch" (Fourier transforms of at least L + K - 1 points) or "reference" (O(L²)).

    Returns:
        (B, C, L), dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        UnknownNameError: no such backend.
    """
    if x.dim() != 3 or kernel.dim() != 2 or kernel.shape[0] != x.shape[1] or kernel.shape[1] < 1:
        raise ValueError(
            f"fft_conv takes x (B, C, L) and kernel (C, K) with K >= 1, got {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    if reverse_kernel is not None and reverse_kernel.shape != kernel.shape:
        raise ValueError(
            f"reverse_kernel must have the shape of kernel, {tuple(kernel.shape)}, got {tuple(reverse_kernel.shape)}"
        )
    if skip is not None and skip.shape != kernel.shape[:1]:
        raise ValueError(f"skip must have shape (C,) = {tuple(kernel.shape[:1])}, got {tuple(skip.shape)}")
    for name, tensor in (("x", x), ("kernel", kernel), ("skip", skip), ("reverse_kernel", reverse_kernel)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"fft_conv takes floating point, got {name} of {tensor.dtype}")
    taps = max(1, min(kernel.shape[1], x.shape[2]))
    kernel = kernel[:, :taps]
    if skip is not None:
        kernel = torch.cat([kernel[:, :1] + skip.unsqueeze(1), kernel[:, 1:]], dim=1)
    return OPERATOR(x, kernel, None if reverse_kernel is None else reverse_kernel[:, :taps], backend=backend)
