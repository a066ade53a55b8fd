"""AGUNet and DAUNet: U-Nets with images of every scale, deep supervision, and attention gates or dual attention.

"Meningioma Segmentation in T1-Weighted MRI Leveraging Global Context and Attention Mechanisms" (S227), in two axes and
in three. The official code (dbouget/mri_brain_tumor_segmentation) is the source where the paper leaves something open.

Level i of the encoder, n levels, image I:  x_i = block(pool(x_{i-1})), or with images of every scale
                                            x_i = block([relu(conv(mean-pooled I)), pool(x_{i-1})])
AGUNet's decoder:                           u = relu(norm(deconv(y_{i+1}))), y_i = block([u, gate(x_i, u)])
DAUNet's:                                   y_i = block(relu(norm([guide(A), x_i, deconv(y_{i+1})])))
with A = norm(conv(drop(position(x_n) + channel(x_n)))), each branch followed by two convolutions.

Of training the published code holds the Dice loss alone, which divides the sum over all classes by their number less
one and cuts what falls below 0, so that it can be without a gradient; the task's loss stands in its place. Each level's
logits are compared with the labels of full size, and the losses summed, as Keras does with several outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from attn_medseg.config import AGUNetConfig, DAUNetConfig
from attn_medseg.models.base import Criterion, ImageShape, Segmenter
from attn_medseg.models.convolutions import (
    CONVOLUTIONS,
    Deconvolution,
    as_image,
    as_tokens,
    check,
    double,
    dropout,
    levels,
    normalisation,
    resized,
)
from attn_medseg.models.pad import crop, pad
from core_attn import maps
from core_attn.api import build
from core_attn.contract import TokenMixer
from core_attn.mechanisms.channel.attention_gate import AttentionGate
from core_attn.mechanisms.channel.dual import ChannelAffinityGate, PositionAttention

_EPSILON = 1e-3
"""Of the norms: Keras'."""

GUIDES = ("linear", "deconv", "none")


class _Encoder(nn.Module):
    """A level's features before they are pooled, from fine to coarse."""

    def __init__(self, config: AGUNetConfig, shape: ImageShape) -> None:
        super().__init__()
        given = (shape.channels, *config.channels[:-1])
        # The coarsest level has no image of its own.
        read = [
            channels if config.multiscale and 0 < i < len(given) - 1 else 0
            for i, channels in enumerate(config.channels)
        ]
        self.scaled = nn.ModuleList(
            CONVOLUTIONS[shape.ndim](shape.channels, own, 3, padding=1) if own else nn.Identity() for own in read
        )
        self.blocks = nn.ModuleList(
            double(shape.ndim, below + own, channels, norm=config.norm, share=config.dropout, eps=_EPSILON)
            for below, own, channels in zip(given, read, config.channels)
        )
        self.reads = [own > 0 for own in read]
        self.pool = F.max_pool2d if shape.ndim == 2 else F.max_pool3d
        self.mean = F.avg_pool2d if shape.ndim == 2 else F.avg_pool3d

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        image = x
        for i, (block, scaled) in enumerate(zip(self.blocks, self.scaled)):
            if i:
                x, image = self.pool(x, 2), self.mean(image, 2)
            if self.reads[i]:
                x = torch.cat([F.relu(scaled(image)), x], dim=1)
            x = block(x)
            found.append(x)
        return found


class _GatedLevel(nn.Module):
    def __init__(self, config: AGUNetConfig, ndim: int, below: int, channels: int) -> None:
        super().__init__()
        self.up = Deconvolution(ndim, below, channels, 2)
        norm = partial(normalisation, config.norm, ndim, eps=_EPSILON)
        self.norm = norm(channels)
        self.gate = AttentionGate(channels, channels, axes=ndim, form="concat", norm=norm)
        self.block = double(ndim, 2 * channels, channels, norm=config.norm, share=config.dropout, eps=_EPSILON)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        up = F.relu(self.norm(self.up(x)))
        amounts = self.gate.gate(skip, up)
        return self.block(torch.cat([up, skip * amounts], dim=1)), amounts[:, 0]


class _GuidedLevel(nn.Module):
    def __init__(self, config: DAUNetConfig, ndim: int, below: int, channels: int, stride: int) -> None:
        super().__init__()
        bottom = config.channels[-1]
        self.up = Deconvolution(ndim, below, channels, 2)
        self.guide: nn.Module | None = None
        if config.guide == "deconv":
            self.guide = Deconvolution(ndim, bottom, channels, stride)
        elif config.guide == "linear":
            self.guide = CONVOLUTIONS[ndim](bottom, channels, 3, padding=1)
        wide = channels * (2 if self.guide is None else 3)
        self.norm = normalisation(config.norm, ndim, wide, eps=_EPSILON)
        self.block = double(ndim, wide, channels, norm=config.norm, share=config.dropout, eps=_EPSILON)

    def forward(self, x: Tensor, skip: Tensor, bottom: Tensor) -> Tensor:
        parts = [skip, self.up(x)]
        if self.guide is not None:
            parts.insert(0, resized(self.guide(bottom), tuple(skip.shape[2:])))
        found: Tensor = self.block(F.relu(self.norm(torch.cat(parts, dim=1))))
        return found


class Positions(nn.Module):
    """A token mixer over the voxels of the coarsest level; one without a residual of its own gets that of position
    attention, with a weight that is learned from 0."""

    def __init__(self, mixer: TokenMixer, ndim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.use_grid = ndim in mixer.info.grid_ranks
        self.gamma = None if isinstance(mixer, PositionAttention) else nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = as_tokens(x)
        mixed = self.mixer(tokens, grid=tuple(x.shape[2:]) if self.use_grid else None)
        if self.gamma is not None:
            mixed = tokens + self.gamma * mixed
        return as_image(mixed, x.shape[2:])


class _DualAttention(nn.Module):
    """Position and channel attention side by side, each with two convolutions after it, summed and joined."""

    def __init__(self, config: DAUNetConfig, ndim: int, mixer: TokenMixer) -> None:
        super().__init__()
        channels = config.channels[-1]
        convolution = CONVOLUTIONS[ndim]

        def after() -> nn.Sequential:
            return nn.Sequential(
                convolution(channels, channels, 3, padding=1),
                normalisation(config.norm, ndim, channels, eps=_EPSILON),
                nn.ReLU(),
                dropout(ndim, config.attention_dropout),
                convolution(channels, channels, 3, padding=1),
            )

        self.position = Positions(mixer, ndim)
        self.after_position = after()
        self.channel = ChannelAffinityGate(channels, form=config.channel_form)
        self.after_channel = after()
        self.dropout = dropout(ndim, config.attention_dropout)
        self.join = convolution(channels, channels, 1)
        self.norm = normalisation(config.norm, ndim, channels, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        both = self.after_position(self.position(x)) + self.after_channel(self.channel(x))
        found: Tensor = self.norm(self.join(self.dropout(both)))
        return found


class _Supervised(Segmenter):
    """What both networks have: the encoder, a head at each level of the decoder, their losses."""

    levels: nn.ModuleList
    least = 2  # norms need more than one voxel

    def __init__(self, config: AGUNetConfig, shape: ImageShape, *, mixer: str | None, mixer_args: Any) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, config.norm, dropout=config.dropout)
        self.multiple = 2 ** (len(config.channels) - 1)
        self.encoder = _Encoder(config, shape)
        # From coarse to fine, as the levels of the decoder; without deep supervision the finest alone.
        supervised = config.channels[-2::-1] if config.supervision else config.channels[:1]
        self.heads = nn.ModuleList(CONVOLUTIONS[shape.ndim](channels, shape.classes, 1) for channels in supervised)

    def decode(self, features: list[Tensor]) -> list[Tensor]:
        """The decoder's features, from coarse to fine."""
        raise NotImplementedError

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The logits of every supervised level on the image's own grid, from coarse to fine: each (B, K, *S)."""
        padded, inside = pad(x, self.multiple, self.least)
        found = self.decode(self.encoder(padded))
        grid = tuple(padded.shape[2:])
        return [crop(resized(head(one), grid), inside) for head, one in zip(self.heads, found[-len(self.heads) :])]

    def logits(self, x: Tensor) -> Tensor:
        found: Tensor = self.heads[-1](self.decode(self.encoder(x))[-1])
        return found

    def loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> Tensor:
        return torch.stack([criterion(one, batch["label"]) for one in self.outputs(batch["image"])]).sum()


class AGUNet(_Supervised):
    """The attention-gated U-Net.

    A gate multiplies what the encoder sends with σ(norm(conv(relu([norm(conv g), norm(conv x)])))), one number a voxel:
    the two maps are joined, not added as in Attention U-Net, and the signal g is that of the same level.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: not used; no tokens are mixed.
    """

    config: AGUNetConfig

    def __init__(
        self,
        config: AGUNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        self.levels = nn.ModuleList(
            _GatedLevel(config, shape.ndim, below, own) for below, own in levels(config.channels)
        )

    def decode(self, features: list[Tensor]) -> list[Tensor]:
        return [found for found, _ in self._decoded(features)]

    def _decoded(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        x, found = features[-1], []
        for level, skip in zip(self.levels, reversed(features[:-1])):
            x, amounts = level(x, skip)
            found.append((x, amounts))
        return found

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much of the skip connection each gate lets through, from coarse to fine."""
        found = self._decoded(self.encoder(x))
        return {f"gate of level {len(found) - i}": amounts for i, (_, amounts) in enumerate(found)}


class DAUNet(_Supervised):
    """The dual attention U-Net: the coarsest level reads itself by position and by channel, and what it found goes to
    every level of the decoder.

    The official code brings it there by a transposed convolution of 3 with a stride of 2, 4, 8, …: from stride 4 on
    most voxels get a constant. `guide` "linear" has a convolution of the same size on the coarse grid and interpolates,
    so that all voxels get it; "deconv" is the official form. In channel attention `channel_form` "plain" normalises
    over what a channel reads, as DANet's equation does; "transposed" is the official code's.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: another mechanism in the place of position attention, inside its residual connection.
    """

    config: DAUNetConfig

    def __init__(
        self,
        config: DAUNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, config.norm, attention_dropout=config.attention_dropout)
        if config.guide not in GUIDES:
            raise ValueError(f"guide is {config.guide!r}; it may be {', '.join(GUIDES)}")
        own = mixer or "position"
        options: dict[str, Any] = {"bias": False} if own == "position" else {"heads": config.heads}
        built = build(own, dim=config.channels[-1], **{**options, **(mixer_args or {})})
        self.bottom = _DualAttention(config, shape.ndim, built)
        self.levels = nn.ModuleList(
            _GuidedLevel(config, shape.ndim, below, own, 2**i)
            for i, (below, own) in enumerate(levels(config.channels), 1)
        )

    def decode(self, features: list[Tensor]) -> list[Tensor]:
        bottom = x = self.bottom(features[-1])
        found = []
        for level, skip in zip(self.levels, reversed(features[:-1])):
            x = level(x, skip, bottom)
            found.append(x)
        return found

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much each voxel of the coarsest level is read by all, 1 where it is read evenly."""
        mixer = self.bottom.position.mixer
        if not mixer.info.maps:
            return {}
        coarse = self.encoder(x)[-1]
        with maps.capture(self.bottom.position) as taken:
            self.bottom.position(coarse)
        weights = next(iter(taken.values()))
        if weights.shape[-1] != coarse[0, 0].numel():
            return {}
        return {"read by all": weights.sum(dim=-2).mean(dim=1).unflatten(1, coarse.shape[2:])}


# --- weights of the official code -------------------------------------------------------------------------------------


def load_official(model: AGUNet | DAUNet, arrays: Sequence[NDArray[Any]]) -> None:
    """Copy the official networks' variables, in the order in which their code makes them.

    Saved files of the official DAUNet lack the three projections of position attention, which its layer does not own.

    Args:
        model: DAUNet with `guide` "deconv", `channel_form` "transposed" and position attention; batch norms.
        arrays: kernels as Keras has them, with the channels last.

    Raises:
        ValueError: another number of variables, another shape, or a model that the official code cannot make.
    """
    if isinstance(model, DAUNet) and not isinstance(model.bottom.position.mixer, PositionAttention):
        raise ValueError("the official DAUNet has position attention; build the model without another mixer")
    slots = [slot for part in _official_parts(model) for slot in _slots(part)]
    if len(slots) != len(arrays):
        raise ValueError(f"the model has {len(slots)} variables, got {len(arrays)}")
    with torch.no_grad():
        for i, (slot, given) in enumerate(zip(slots, arrays)):
            array = np.asarray(given)
            if array.ndim > 2:
                array = np.moveaxis(array, (-1, -2), (0, 1))
            value = torch.from_numpy(np.ascontiguousarray(array))
            if slot.dim() == 2:
                value = value.flatten(1)
            if value.shape != slot.shape:
                raise ValueError(f"variable {i} should have shape {tuple(slot.shape)}, got {tuple(value.shape)}")
            slot.copy_(value)


def _official_parts(model: AGUNet | DAUNet) -> list[Any]:
    found: list[Any] = []
    scaled: Any
    block: Any
    for scaled, block in zip(model.encoder.scaled, model.encoder.blocks):
        found += [scaled, *block]
    if isinstance(model, DAUNet):
        dual = model.bottom
        position: Any = dual.position.mixer
        found += [position.gamma, position.k_proj, position.q_proj, position.v_proj, *dual.after_position]
        found += [dual.channel.mixer.gamma, *dual.after_channel, dual.join, dual.norm]
    level: Any
    for level in model.levels:
        found.append(level.up.convolution)
        if isinstance(level, _GuidedLevel):
            found += [getattr(level.guide, "convolution", level.guide), level.norm]
        else:
            gate = level.gate
            found += [level.norm, gate.signal, gate.signal_norm, gate.input, gate.input_norm, gate.psi, gate.psi_norm]
        found += [*level.block]
    return [*found, *model.heads]


def _slots(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    names = ("weight", "bias", "running_mean", "running_var")
    return [slot for name in names if isinstance(slot := getattr(part, name, None), Tensor)]
