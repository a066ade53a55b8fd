"""Hyena operator: gates around convolutions as long as the sequence, whose kernels a small network writes.

HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution (S55), section 3; the operator is that of
"Hyena Hierarchy" (Poli et al., ICML 2023), sections 3.2 to 3.4.

Shapes: B batch, L tokens, C channels, O order, F channels of the filter network, A features of a position.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.mechanisms.conv.short import ShortConvolution
from core_attn.ops.fftconv.spectral import fast_size
from core_attn.registry import register
from core_attn.state import FullCache

# Of the windows: the slowest and the fastest channel fall to _TARGET at these parts of the longest length.
_SLOW, _FAST, _TARGET = 1.5, 0.3, 1e-2
_INNER = 2  # hidden layers of the filter network behind the first
# So many tokens or more of one step are convolved by transforms of all tokens so far.
_MANY = 16


class ImplicitFilter(nn.Module):
    """Kernel of every channel as a function of the position: h_t = MLP(features of t) · (e^(-δ_c t) + shift).

    The features of position n, t = n / (l_max - 1), are t and the cosines and sines of bands of frequencies. All of it
    is computed in float32 at least: neighbouring positions are the same number in 16 bits.

    Args:
        channels: number of kernels.
        l_max: the longest length; positions are parts of it.
        filter_order: width F of the network.
        emb_dim: features A of a position, odd and at least 3.
        w: frequency that the sines begin with.
        shift: what the window never falls below.
        learn_positions: train what is added to the features, (l_max, A), zeros at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        l_max: int,
        filter_order: int,
        emb_dim: int,
        w: float,
        shift: float = 0.05,
        learn_positions: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.l_max, self.emb_dim, self.shift = channels, l_max, emb_dim, shift
        # One frequency a channel for the sines of all layers, as in the official code.
        self.freq = nn.Parameter(torch.full((filter_order,), float(w)))
        widths = [emb_dim] + [filter_order] * (_INNER + 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(filter_order, channels, bias=False)
        self.offsets = nn.Parameter(torch.zeros(l_max, emb_dim)) if learn_positions else None

    def forward(self, length: int) -> Tensor:
        """The first `length` taps: (length, channels), float32 or float64."""
        dtype = torch.float64 if self.freq.dtype is torch.float64 else torch.float32
        device = self.freq.device
        with torch.autocast(device.type, enabled=False):
            place = torch.arange(length, dtype=dtype, device=device)[:, None]
            time = place / (self.l_max - 1)
            bands = torch.linspace(1e-4, self.emb_dim // 2 - 1, self.emb_dim // 2, dtype=dtype, device=device)
            angle = bands * (2 * math.pi / self.l_max * place)
            h = torch.cat([time, angle.cos(), -angle.sin()], dim=1)
            if self.offsets is not None:
                h = h + self.offsets[:length].to(dtype)
            freq = self.freq.to(dtype)
            layer: Any
            for layer in self.layers:
                h = torch.sin(freq * F.linear(h, layer.weight.to(dtype), layer.bias.to(dtype)))
            slow, fast = -math.log(_TARGET) / _SLOW, -math.log(_TARGET) / _FAST
            deltas = torch.linspace(slow, fast, self.channels, dtype=dtype, device=device)
            return F.linear(h, self.out.weight.to(dtype)) * (torch.exp(-time * deltas) + self.shift)


class HyenaState(NamedTuple):
    """What decoding remembers: what every convolution has read so far, as its next output is a sum over all of it.

    Attributes:
        past: (B, K - 1, (O + 1) C) the last projections, which the next short convolution reads.
        read: for each of the O - 1 long convolutions its inputs, (B, 1, tokens so far, C); changed in place by a step.
        kernels: (O - 1, l_max, C) all taps, last one first, so that no step runs the filter network.
    """

    past: Tensor
    read: tuple[FullCache, ...]
    kernels: Tensor

    def select(self, rows: Tensor) -> HyenaState:
        """A new state with the samples `rows` (int64) of this one, in that order."""
        return HyenaState(self.past.index_select(0, rows), tuple(c.select(rows) for c in self.read), self.kernels)


@register(
    name="hyena",
    title="HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution",
    source="S55",
    year=2023,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    time=Growth.LOGLINEAR,
    memory=Growth.LINEAR,
    decodes=True,
    padding=True,
    double_backward=False,
    operator="fft_conv",
    cascade=Cascade(
        einsums=(
            "U[b,l,s,c] = short[s,c,j] * (in[s,c,d] * X[b,l-j,d])",
            "Z[b,l,c] = U[b,l,1,c] * U[b,l,2,c]",
            "h[l,c] = (out[c,f] * network[l,f]) * window[l,c]",
            "Y[b,l,c] = h[j,c] * Z[b,l-j,c] + skip[c] * Z[b,l,c]",
            "O[b,l,c] = U[b,l,0,c] * Y[b,l,c]",
        ),
        passes=1,
        flops="2*(R + 2)*B*L*C**2 + 2*L*(A*F + 2*F**2 + (R - 1)*F*C) + 2.5*(R - 1)*(2*B + 1)*C*N*T",
        bytes="E*(2*B*L*C + (R + 2)*C**2 + A*F + 2*F**2 + (R - 1)*F*C)",
        symbols={
            "R": "order",
            "F": "width of the filter network",
            "A": "features of a position",
            "N": "points of a transform",
            "T": "log2 of N: a real transform of N points takes 2.5 N log2 N",
        },
    ),
)
class Hyena(TokenMixer):
    """z ← h_o * (x_o ⊙ z) + skip_o ⊙ x_o ⊙ z for o = O - 1 … 1 from z = v, then y = x_0 ⊙ z.

    x_0 … x_(O-1) and v come from one projection and a short convolution. Padded tokens are read by nobody, but keep
    their place.

    Decoding is exact and therefore not of constant cost: a token reads the inputs of every convolution so far, O·L·C
    operations, and the state grows by (O - 1) C numbers a token, beside all taps up to `l_max`. Steps of several
    tokens use transforms.

    Args:
        dim: channels C.
        causal: must be True.
        order: number of gates O, at least 2; there are O - 1 long convolutions. HyenaDNA has 2.
        l_max: the longest sequence; the kernel's positions are parts of it, so it is part of the definition.
        filter_order: width F of the filter network.
        emb_dim: features A of a position in it, odd and at least 3.
        w: frequency its sines begin with.
        learn_positions: train an offset of the features of all positions. The official code trains the features with a
            learning rate of 1e-5, far below that of the rest.
        short_size: taps of the short convolution.
        backend: see `core_attn.ops.fft_conv`. Gradients of gradients need "reference".

    Raises:
        ValueError: an option out of its range; in forward and step, more than `l_max` tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        order: int = 2,
        l_max: int = 8192,
        filter_order: int = 64,
        emb_dim: int = 5,
        w: float = 10.0,
        learn_positions: bool = False,
        short_size: int = 3,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, causal=causal)
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if l_max < 2:
            raise ValueError(f"l_max must be at least 2, got {l_max}")
        if filter_order < 1:
            raise ValueError(f"filter_order must be at least 1, got {filter_order}")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3 (time, cosines and sines), got {emb_dim}")
        self.order = order
        self.l_max = l_max
        self.backend = backend
        self.in_proj = nn.Linear(dim, (order + 1) * dim)
        self.conv = ShortConvolution((order + 1) * dim, short_size, bias=True)
        self.filter = ImplicitFilter(
            (order - 1) * dim,
            l_max=l_max,
            filter_order=filter_order,
            emb_dim=emb_dim,
            w=w,
            learn_positions=learn_positions,
        )
        self.skip = nn.Parameter(torch.randn(order - 1, dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        self.check_inputs(x, context=context, key_padding_mask=key_padding_mask, grid=grid, generator=generator)
        length = x.shape[1]
        self._check_length(length)
        padding = None if key_padding_mask is None else ~key_padding_mask.unsqueeze(-1)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        mixed, _ = self.conv(self.in_proj(x))
        first, *gates, z = mixed.transpose(1, 2).chunk(self.order + 1, dim=1)
        kernels = self.filter(length).transpose(0, 1).chunk(self.order - 1)
        for gate, kernel, skip in zip(reversed(gates), kernels, self.skip.unbind(), strict=True):
            z = z * gate
            if padding is not None:
                # Biases have made something of nothing.
                z = z.masked_fill(padding.transpose(1, 2), 0.0)
            z = ops.fft_conv(z, kernel, skip=skip, backend=self.backend)
        return self.out_proj((z * first).transpose(1, 2))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> HyenaState:
        weight = self.out_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        kernels = self.filter(self.l_max).flip(0).unflatten(1, (self.order - 1, self.dim)).transpose(0, 1)
        read = tuple(
            FullCache(batch, 1, self.dim, value_dim=0, device=device, dtype=dtype) for _ in range(self.order - 1)
        )
        past = self.conv.init_past(batch, device=device, dtype=dtype)
        return HyenaState(past, read, kernels.contiguous().to(device))

    def step(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        """The next T tokens (B, T, C) -> their outputs (B, T, C); what `state` has read is updated in place."""
        self.check_inputs(x)
        self._check_length(state.read[0].seen + x.shape[1])
        mixed, past = self.conv(self.in_proj(x), state.past)
        first, *gates, z = mixed.chunk(self.order + 1, dim=2)
        for gate, cache, kernel, skip in zip(
            reversed(gates), state.read, state.kernels.unbind(), self.skip.unbind(), strict=True
        ):
            z = (z * gate).unsqueeze(1)
            z = self._last_outputs(cache.append(z, z[..., :0])[0].squeeze(1), x.shape[1], kernel, skip)
        return self.out_proj(z * first), HyenaState(past, state.read, state.kernels)

    def _last_outputs(self, z: Tensor, count: int, kernel: Tensor, skip: Tensor) -> Tensor:
        """(B, N, C) read so far, all taps from the last -> the last `count` outputs (B, count, C)."""
        total = z.shape[1]
        if count >= _MANY:
            taps = kernel[self.l_max - total :].flip(0).transpose(0, 1)
            out = ops.fft_conv(z.transpose(1, 2), taps, skip=skip, backend=self.backend)
            return out[..., total - count :].transpose(1, 2)
        outs = []
        for n in range(total - count + 1, total + 1):
            # In the dtype of the taps, as float32 holds the sum of 16-bit tokens.
            own = torch.einsum("bnc,nc->bc", z[:, :n].to(kernel.dtype), kernel[self.l_max - n :])
            outs.append(own + skip.to(kernel.dtype) * z[:, n - 1].to(kernel.dtype))
        return torch.stack(outs, dim=1).to(z.dtype) if outs else z[:, :0]

    def _check_length(self, length: int) -> None:
        if length > self.l_max:
            raise ValueError(f"hyena was built for at most l_max={self.l_max} tokens, got {length}")

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        points = fast_size(2 * length - 1)
        return {
            **super().sizes(batch=batch, length=length, context=context, grid=grid),
            "R": self.order,
            "F": self.filter.freq.shape[0],
            "A": self.filter.emb_dim,
            "N": points,
            "T": math.log2(max(points, 2)),
        }

    def extra_repr(self) -> str:
        return f"order={self.order}, l_max={self.l_max}"
