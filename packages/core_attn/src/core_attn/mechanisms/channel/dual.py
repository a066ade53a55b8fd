"""Position attention, channel attention and their sum, on tokens and on feature maps.

"Dual Attention Network for Scene Segmentation" (2019), sections 3.2 and 3.3, as "Multi-scale self-guided attention for
medical image segmentation" (S71) and "Meningioma segmentation in T1-weighted MRI leveraging global context and
attention mechanisms" (S227) use them.

Shapes: B batch, L tokens (the pixels or voxels of a map), C channels, R channels of queries and keys.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core_attn import ops
from core_attn.contract import FeatureGate, Growth, Pattern, TokenMixer
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown
from core_attn.ops.softmax import reference
from core_attn.registry import register

FORMS = ("inverse", "plain", "transposed")
_TITLE = "Dual Attention Network for Scene Segmentation"


@register(
    name="position",
    title=_TITLE,
    source="",
    year=2019,
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    padding=True,
    maps=True,
    operator="softmax_attention",
    double_backward=False,
    cascade=Cascade(
        einsums=(
            "S[b,l,m] = Q[b,l,r] * K[b,m,r]",
            "top[b,l] = max[m] S[b,l,m]",
            "W[b,l,m] = exp(S[b,l,m] - top[b,l])",
            "sum[b,l] = W[b,l,m]",
            "Y[b,l,c] = W[b,l,m] * V[b,m,c] / sum[b,l]",
            "O[b,l,c] = gamma * Y[b,l,c] + X[b,l,c]",
        ),
        passes=1,
        flops="2*B*(L + M)*C*R + 2*B*M*C**2 + 2*B*P*(R + C)",
        bytes="E*(B*(2*L + X)*C + 2*C*R + C**2)",
        symbols={"R": "channels of queries and keys"},
    ),
)
class PositionAttention(MultiHeadMixer):
    """γ softmax(q kᵀ) v + x: every token reads all tokens by one head with few channels for queries and keys, eq. 1-2.

    γ is learned and 0 at the start, when the mixer changes nothing. The scores are not divided by √R. There is no
    projection of the output. The map of L × L is never written down, in the gradient neither.

    Args:
        dim: channels C.
        reduction: C / R, at most C; 8 in the paper. R is at least 1.
        bias: whether the three projections have a bias.
        backend: see `core_attn.ops.softmax_attention`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(self, dim: int, *, reduction: int = 8, bias: bool = True, backend: str = "auto") -> None:
        super().__init__(dim, heads=1, bias=bias)
        if reduction < 1:
            raise ValueError(f"reduction must be a positive integer, got {reduction}")
        self.reduced = max(1, dim // reduction)
        self.backend = backend
        self.q_proj = nn.Linear(dim, self.reduced, bias=bias)
        self.k_proj = nn.Linear(dim, self.reduced, bias=bias)
        self.out_proj = nn.Identity()  # type: ignore[assignment]
        self.gamma = nn.Parameter(torch.zeros(1))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return ops.softmax_attention(  # type: ignore[no-any-return]
            q, k, v, key_padding_mask=key_padding_mask, scale=1.0, backend=self.backend
        )

    def attention_scores(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None) -> Tensor:
        return reference.scores(
            q, k, causal=False, mask=None, bias=None, key_padding_mask=key_padding_mask, window=None, scale=1.0
        )

    def attention_map(self, q: Tensor, k: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        return reference.weights(self.attention_scores(q, k, key_padding_mask=key_padding_mask))

    def finish(self, out: Tensor, *, x: Tensor, v: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        return self.gamma * out + x

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        return super().sizes(batch=batch, length=length, context=context, grid=grid) | {"R": self.reduced}

    def extra_repr(self) -> str:
        return f"reduced={self.reduced}"


@register(
    name="channel_affinity",
    title=_TITLE,
    source="",
    year=2019,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    time=Growth.LINEAR,
    memory=Growth.LINEAR,
    padding=True,
    cascade=Cascade(
        einsums=(
            "S[b,c,e] = X[b,l,c] * X[b,l,e]",
            "Y[b,l,c] = softmax[e] (max[e] S[b,c,e] - S[b,c,e]) * X[b,l,e]",
            "O[b,l,c] = gamma * Y[b,l,c] + X[b,l,c]",
        ),
        passes=2,
        flops="4*B*L*C**2",
        bytes="E*2*B*L*C",
    ),
)
class ChannelAffinityAttention(TokenMixer):
    """γ softmax(max S - S) x + x with S = xᵀ x over the channels: a channel reads those least like itself, eq. 3-4.

    The code of DANet and of S71 subtracts S from the largest of its row; the paper's eq. 3 has softmax(S). There are no
    projections; γ is learned, and 0 at the start. Products over tokens are large, so they are float32 at least.

    Args:
        dim: channels C.
        form: "inverse" for the above; "plain" for softmax(S), as eq. 3 has it; "transposed" for the latter from the
            other side, as the code of S227 has it, where what a channel reads has weights of any sum.

    Raises:
        UnknownNameError: no such form.
    """

    def __init__(self, dim: int, *, form: str = "inverse") -> None:
        super().__init__(dim)
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        self.form = form
        self.gamma = nn.Parameter(torch.zeros(1))

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
        if key_padding_mask is not None:
            x = x.masked_fill(~key_padding_mask.unsqueeze(-1), 0.0)
        with torch.autocast(x.device.type, enabled=False):
            precise = x.to(torch.promote_types(x.dtype, torch.float32))
            products = precise.mT @ precise
            # What is constant in a row, its largest product, drops out of the softmax.
            weights = torch.softmax(-products if self.form == "inverse" else products, dim=-1)
            read = precise @ (weights if self.form == "transposed" else weights.mT)
            return (self.gamma * read + precise).to(x.dtype)

    def extra_repr(self) -> str:
        return f"form={self.form}"


@register(
    name="position_channel",
    title=_TITLE,
    source="",
    year=2019,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    time=Growth.QUADRATIC,
    memory=Growth.LINEAR,
    padding=True,
    operator="softmax_attention",
    double_backward=False,
    cascade=Cascade(
        einsums=(
            "W[b,l,m] = softmax[m] (Q[b,l,r] * K[b,m,r])",
            "Y[b,l,c] = W[b,l,m] * V[b,m,c]",
            "S[b,c,e] = X[b,l,c] * X[b,l,e]",
            "Z[b,l,c] = softmax[e] (max[e] S[b,c,e] - S[b,c,e]) * X[b,l,e]",
            "O[b,l,c] = gamma * Y[b,l,c] + delta * Z[b,l,c] + 2 * X[b,l,c]",
        ),
        passes=2,
        flops="4*B*L*C*R + 6*B*L*C**2 + 2*B*P*(R + C)",
        bytes="E*(2*B*L*C + 2*C*R + C**2)",
        symbols={"R": "channels of queries and keys"},
    ),
)
class PositionChannelAttention(TokenMixer):
    """The sum of position and channel attention, both of x with their residuals: DANet's fusion of its two branches.

    Networks put convolutions before and after each branch; those belong to the networks.

    Args:
        dim, reduction, bias, backend: see `PositionAttention`.
        form: see `ChannelAffinityAttention`.

    Raises:
        ValueError: an option out of its range.
        UnknownNameError: no such form.
    """

    def __init__(
        self, dim: int, *, reduction: int = 8, bias: bool = True, form: str = "inverse", backend: str = "auto"
    ) -> None:
        super().__init__(dim)
        self.position = PositionAttention(dim, reduction=reduction, bias=bias, backend=backend)
        self.channel = ChannelAffinityAttention(dim, form=form)

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
        position: Tensor = self.position(x, key_padding_mask=key_padding_mask)
        return position + self.channel(x, key_padding_mask=key_padding_mask)

    def sizes(
        self, *, batch: int, length: int, context: int | None = None, grid: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        sizes = super().sizes(batch=batch, length=length, context=context, grid=grid)
        return sizes | {"R": self.position.reduced}


class _MapGate(FeatureGate):
    """A token mixer on feature maps (B, C, *spatial), in 1-D, 2-D or 3-D: their pixels or voxels are its tokens.

    Args:
        channels: C.
        options: those of the mixer.
    """

    mixes: ClassVar[type[TokenMixer]]

    def __init_subclass__(cls) -> None:
        cls.info = cls.mixes.info

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels)
        self.mixer = self.mixes(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} takes (B, C, *spatial) with C = {self.channels}, got {tuple(x.shape)}"
            )
        out: Tensor = self.mixer(x.flatten(2).mT)
        return out.mT.unflatten(2, x.shape[2:])


class PositionGate(_MapGate):
    """`PositionAttention` on feature maps."""

    mixes = PositionAttention


class ChannelAffinityGate(_MapGate):
    """`ChannelAffinityAttention` on feature maps."""

    mixes = ChannelAffinityAttention


class PositionChannelGate(_MapGate):
    """`PositionChannelAttention` on feature maps."""

    mixes = PositionChannelAttention
