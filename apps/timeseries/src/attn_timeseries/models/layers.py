"""Parts that several of the models share.

Shapes: B batch, L tokens, M context tokens, D = d_model channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_shared.layers import Dropout
from core_attn import registry
from core_attn.api import build, parameters
from core_attn.contract import Pattern, TokenMixer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


# --- token mixers ---


def fitting_mixers(*, causal: bool = False, cross: bool = False) -> list[str]:
    """Names of the mechanisms of `core_attn` that mix a plain sequence of tokens in this pattern."""
    pattern = Pattern.of(causal=causal, cross=cross)
    return [
        name
        for name in registry.names()
        if issubclass(registry.get(name), TokenMixer) and pattern in registry.get(name).info.patterns
    ]


def self_mixer(
    name: str,
    dim: int,
    heads: int,
    *,
    causal: bool = False,
    ordered: bool = False,
    dropout: float = 0.0,
    options: Mapping[str, Any],
) -> TokenMixer:
    """The self-attention of a layer: the mechanism `name` with `options`.

    Args:
        name: a mechanism of `core_attn` for noncausal self-attention.
        dim: channels D.
        heads: used by mechanisms that have heads.
        causal: ask for the causal form, where the mechanism has one; otherwise the noncausal form is built.
        ordered: the tokens lie in order of time and may each read what came before alone: a mechanism that has only a
            causal form, such as a recurrent memory, will do.
        dropout: probability, used by mechanisms that have attention dropout.
        options: the mechanism's own; a `dropout` among them wins.

    Raises:
        ValueError: the mechanism does not exist, cannot mix a sequence with itself, or refuses an option.
    """
    mechanism = registry.get(name)
    forms = [form for form in (False, True) if mechanism.info.supports(causal=form, cross=False)]
    if not issubclass(mechanism, TokenMixer) or not forms or not (ordered or False in forms):
        able = dict.fromkeys([*fitting_mixers(), *(fitting_mixers(causal=True) if ordered else [])])
        raise ValueError(
            f"{name} cannot compute noncausal self attention over a sequence, which these models need; "
            f"mixers that can: {', '.join(able)}"
        )
    causal = True in forms and (causal or False not in forms)
    return _build(name, dim, heads, causal=causal, cross=False, dropout=dropout, options=options)


def cross_mixer(name: str, dim: int, heads: int, *, dropout: float = 0.0, options: Mapping[str, Any]) -> TokenMixer:
    """The cross-attention of a decoder layer: `name` where it has a cross pattern, otherwise softmax attention."""
    if not registry.get(name).info.supports(causal=False, cross=True):
        name, options = "softmax", {}
    return _build(name, dim, heads, causal=False, cross=True, dropout=dropout, options=options)


def _build(
    name: str, dim: int, heads: int, *, causal: bool, cross: bool, dropout: float, options: Mapping[str, Any]
) -> TokenMixer:
    if "dropout" in parameters(registry.get(name)):
        options = {"dropout": dropout, **options}
    return build(name, dim=dim, heads=heads, causal=causal, cross=cross, **options)


# --- decomposition into trend and remainder (Autoformer, Equation 1; DLinear) ---


class SeriesDecomposition(nn.Module):
    """Trend = moving average over `kernel` steps, both ends extended by copies of the end value; remainder = x - trend.

    Pooling along time costs O(L) and serves every length. For the lengths given, up to `MATRIX_STEPS`, the product with
    an L x L banded matrix is used instead: the same mean, about twice as fast there, as it needs no transposed copies.

    Args:
        kernel: steps averaged; odd, so that the average is centred.
        lengths: lengths L that will come.

    Raises:
        ValueError: an even kernel, or one below 1.
    """

    MATRIX_STEPS = 256

    def __init__(self, kernel: int, *lengths: int) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"moving_avg must be a positive odd number of steps, got {kernel}")
        self.kernel = kernel
        for steps in {n for n in lengths if n <= self.MATRIX_STEPS}:
            self.register_buffer(f"counts_{steps}", self._window_counts(steps), persistent=False)

    def allow_lengths(self, longest: int) -> None:
        """Pool at every length from now on: the matrices are each of one length."""
        for name in [name for name, _ in self.named_buffers(recurse=False)]:
            delattr(self, name)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> remainder, trend, both (B, L, C)."""
        remainder = self.remainder(x)
        return remainder, x - remainder

    def remainder(self, x: Tensor) -> Tensor:
        """(B, L, C) -> x minus its moving average, (B, L, C)."""
        counts = getattr(self, f"counts_{x.shape[1]}", None)
        if counts is not None:
            return torch.baddbmm(x, counts.expand(x.shape[0], -1, -1), x, alpha=-1 / self.kernel)
        half = (self.kernel - 1) // 2
        extended = F.pad(x.transpose(1, 2), (half, half), mode="replicate")
        return x - F.avg_pool1d(extended, self.kernel, stride=1).transpose(1, 2)

    def _window_counts(self, steps: int) -> Tensor:
        """(L, L): how often step j is in the window around step i. Integers, so exact in every dtype."""
        half = (self.kernel - 1) // 2
        read = (torch.arange(steps).unsqueeze(1) + torch.arange(-half, half + 1)).clamp(0, steps - 1)
        return torch.zeros(steps, steps).scatter_add_(1, read, torch.ones(read.shape))


# --- circular convolution over three steps ---


def neighbours(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, 3 C): the step before, the step and the step after, on a circle.

    A circular convolution of kernel 3 is then one linear layer, whose weight is (out, 3 C).
    """
    return torch.cat([x.roll(1, dims=1), x, x.roll(-1, dims=1)], dim=-1)


# --- linear maps along time, shared by the channels or one a channel (DLinear, PatchTST) ---


class ChannelLinear(nn.Module):
    """(B, I, C) -> (B, O, C): a linear layer along the middle axis.

    weight (maps, O, I) and bias (maps, O) start as `nn.Linear`'s.

    Args:
        maps: 1 (one for all channels) or C (one a channel).
        inputs: I.
        outputs: O.
    """

    def __init__(self, maps: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(maps, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(maps, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[0] == 1:
            return F.linear(x.transpose(1, 2), self.weight[0], self.bias[0]).transpose(1, 2)
        return torch.einsum("bic,coi->boc", x, self.weight) + self.bias.T


# --- normalisation of a window by its own statistics ---


class WindowNorm(nn.Module):
    """Standardise each window and channel by its own mean and deviation, and undo it in the forecast.

    "Reversible Instance Normalization for Accurate Time-Series Forecasting" (Kim et al., 2022), and without the affine
    map the normalisation of "Non-stationary Transformers" (Liu et al., 2022).

    Args:
        channels: C.
        affine: learn a scale and a shift a channel.
        subtract_last: subtract the last value instead of the mean.
    """

    EPS = 1e-5

    def __init__(self, channels: int, *, affine: bool = False, subtract_last: bool = False) -> None:
        super().__init__()
        self.subtract_last = subtract_last
        self.scale = nn.Parameter(torch.ones(channels)) if affine else None
        self.shift = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, C) -> the standardised window (B, L, C) and its (centre, deviation), each (B, 1, C)."""
        # Mean and deviation are constants of the window: no gradient flows through them, as in the official code.
        variance, mean = torch.var_mean(x.detach(), dim=1, keepdim=True, correction=0)
        deviation = (variance + self.EPS).sqrt()
        centre = x[:, -1:] if self.subtract_last else mean
        x = (x - centre) / deviation
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        return x, (centre, deviation)

    def undo(self, y: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, C) forecast of the standardised window -> forecast of the window."""
        centre, deviation = statistics
        if self.scale is not None and self.shift is not None:
            y = (y - self.shift) / (self.scale + self.EPS**2)
        return y * deviation + centre


# --- Transformer layers (Informer, Flowformer, iTransformer, Transformer) ---


class FeedForward(nn.Module):
    """Two linear layers, the same for every token: D -> d_ff -> D, with dropout after each."""

    def __init__(self, dim: int, hidden: int, *, dropout: float, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))


class EncoderLayer(nn.Module):
    """Attention, then feed-forward, each added to its input and layer-normalised after."""

    def __init__(self, attention: TokenMixer, hidden: int, *, dropout: float, activation: str) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(attention.dim)
        self.feed_forward = FeedForward(attention.dim, hidden, dropout=dropout, activation=activation)
        self.norm2 = nn.LayerNorm(attention.dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, D), (B, L) True = a real token -> (B, L, D)."""
        x = self.norm1(x + self.dropout(self.attention(x, key_padding_mask=key_padding_mask)))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the encoder's output, feed-forward, each added and layer-normalised after."""

    def __init__(
        self, attention: TokenMixer, cross_attention: TokenMixer, hidden: int, *, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(attention.dim)
        self.cross_attention = cross_attention
        self.norm2 = nn.LayerNorm(attention.dim)
        self.feed_forward = FeedForward(attention.dim, hidden, dropout=dropout, activation=activation)
        self.norm3 = nn.LayerNorm(attention.dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, *, drop: int = 0) -> Tensor:
        """(B, L, D), (B, M, D) -> (B, L - drop, D), without the first `drop` tokens, which nobody reads further on."""
        x = self.norm1(x + self.dropout(self.attention(x)))
        if self.cross_attention.info.name != "softmax":  # then a query's result may depend on the other queries
            return self._rest(x, context)[:, drop:]
        return self._rest(x[:, drop:], context)

    def _rest(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.norm2(x + self.dropout(self.cross_attention(x, context=context)))
        return self.norm3(x + self.feed_forward(x))
