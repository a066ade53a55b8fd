"""Multi-scale self-guided attention: position and channel attention, refined twice under the eye of autoencoders.

"Multi-scale self-guided attention for medical image segmentation" (S71), in two axes and in three. Of the paper the
abstract was at hand; the formulas are those of its official code, sinAshish/Multi-Scale-Attention.

Maps of four scales, each brought to `width` channels and to the grid of the finest, 1/4 of the image: F_s. With
M = fuse([F_4, …, F_1]) and an autoencoder E, D for each of the two passes i, shared by the scales:

    X_1s = [F_s, M]            z_is = E_i(X_is),  R_is = D_i(z_is)
    A_is = mix((position(X_is) + channel(X_is)) · conv(R_is))
    X_2s = [F_s, A_1s · M]

Logits come of every F_s and every A_2s; the mean of those of A_2s is what the network says. All else is for training:

    loss = Σ_s (L(F_s) + L(A_2s)) + guided · Σ_s mean (z_1s - z_2s)² + reconstruction · Σ_is mean (X_is - R_is)²

where L is the task's loss, cross-entropy in the official training. Neither side of a squared difference is detached.
Channel attention reads the channels least like itself, as the official code has it (`core_attn`'s "inverse").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_medseg.config import DAFConfig
from attn_medseg.models.agunet import Positions
from attn_medseg.models.base import Criterion, ImageShape, Segmenter
from attn_medseg.models.convolutions import CONVOLUTIONS, TRANSPOSED, as_tokens, check, double, normalisation, resized
from attn_medseg.models.official import Rename, renamed
from attn_medseg.models.pad import crop, pad
from core_attn.api import build
from core_attn.mechanisms.channel.dual import ChannelAffinityGate, PositionAttention

BACKBONES = ("pyramid", "resnext101")
_STRIDE = 4
"""Voxels of the image in one of the grid on which attention reads."""


@dataclass(frozen=True)
class Found:
    """What a pass over all scales gives, from fine to coarse.

    Attributes:
        inputs, rebuilt: X_is and R_is, (B, 2 width, *s).
        latents: z_is, (B, 8 width, *s / 4).
        attended: A_is, (B, width, *s).
    """

    inputs: list[Tensor]
    rebuilt: list[Tensor]
    latents: list[Tensor]
    attended: list[Tensor]


class DAF(Segmenter):
    """The network of multi-scale self-guided attention on a backbone of choice.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: another mechanism in the place of position attention, inside its residual connection; the
            attention between channels stays.

    Raises:
        ValueError: an option out of its range; a mixer that cannot compute noncausal self-attention.
    """

    config: DAFConfig
    multiple = 4 * _STRIDE
    least = 3  # norms need more than one voxel on the backbone's coarsest grid

    def __init__(
        self,
        config: DAFConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, config.norm)
        if config.backbone not in BACKBONES:
            raise ValueError(f"backbone is {config.backbone!r}; it may be {' or '.join(BACKBONES)}")
        if config.width < 1 or config.guided < 0 or config.reconstruction < 0:
            raise ValueError(
                "width must be at least 1 and guided and reconstruction at least 0, got "
                f"{config.width}, {config.guided:g} and {config.reconstruction:g}"
            )
        ndim, width = shape.ndim, config.width
        own = mixer or "position"
        options = {**({} if own == "position" else {"heads": config.heads}), **(mixer_args or {})}
        if config.backbone == "pyramid":
            self.backbone: nn.Module = Pyramid(config, shape)
            given: Sequence[int] = config.channels
        else:
            self.backbone = ResNeXt(ndim, shape.channels, norm=config.norm)
            given = self.backbone.channels
        parts = _Parts(ndim, config.norm)
        self.reduce = nn.ModuleList(nn.Sequential(*parts.layer(channels, width, 1)) for channels in given)
        scales = len(given)
        self.fuse = nn.Sequential(
            *parts.layer(scales * width, width, 3), *parts.layer(width, width, 3), *parts.layer(width, width, 1)
        )
        self.passes = nn.ModuleList(
            Pass(parts, width, [Positions(build(own, dim=width, **options), ndim) for _ in range(scales)])
            for _ in range(2)
        )
        self.heads = nn.ModuleList(
            nn.ModuleList(parts.convolution(width, shape.classes, 1) for _ in range(scales)) for _ in range(2)
        )
        self.apply(_start)

    def scales(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> F_s from fine to coarse, each (B, width, *S / 4)."""
        found = [reduce(one) for reduce, one in zip(self.reduce, self.backbone(x))]
        return [resized(one, found[0].shape[2:]) for one in found]

    def refine(self, features: Sequence[Tensor]) -> tuple[Found, Found]:
        """F_s from fine to coarse -> what both passes find."""
        # The first layer's weights are in the official code's order, from coarse to fine.
        fused = self.fuse(torch.cat(list(reversed(features)), dim=1))
        first = self.passes[0]([torch.cat([one, fused], dim=1) for one in features])
        guided = [torch.cat([one, read * fused], dim=1) for one, read in zip(features, first.attended)]
        return first, self.passes[1](guided)

    def logits(self, x: Tensor) -> Tensor:
        _, second = self.refine(self.scales(x))
        each = [head(read) for head, read in zip(self._heads(1), second.attended)]
        # Linear interpolation of the mean is the mean of the interpolations.
        return resized(torch.stack(each).mean(dim=0), x.shape[2:])

    def loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> Tensor:
        terms = self.terms(batch, criterion)
        return (
            terms["segmentation"].sum()
            + self.config.guided * terms["guided"].sum()
            + self.config.reconstruction * terms["reconstruction"].sum()
        )

    def terms(self, batch: Mapping[str, Tensor], criterion: Criterion) -> dict[str, Tensor]:
        """Every term of the loss, without its weight.

        Returns:
            dict: with n scales, each from fine to coarse, "segmentation" (2n,): of F_s, then of A_2s; "guided" (n,);
            "reconstruction" (2n,): of the first pass, then of the second.
        """
        x, inside = pad(batch["image"], self.multiple, self.least)
        features = self.scales(x)
        found = self.refine(features)
        read = [*zip(self._heads(0), features), *zip(self._heads(1), found[1].attended)]
        outputs = [crop(resized(head(one), x.shape[2:]), inside) for head, one in read]
        return {
            "segmentation": torch.stack([criterion(one, batch["label"]) for one in outputs]),
            "guided": torch.stack([F.mse_loss(*pair) for pair in zip(found[0].latents, found[1].latents)]),
            "reconstruction": torch.stack(
                [F.mse_loss(*pair) for one in found for pair in zip(one.inputs, one.rebuilt)]
            ),
        }

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much each place is read by all, 1 where it is read evenly, by position attention of the second pass."""
        scales = cast(Pass, self.passes[1]).scales
        seen: dict[int, Tensor] = {}
        handles = [
            cast(Guided, one).position.attention.register_forward_pre_hook(
                lambda _, inputs, i=i: seen.update({i: inputs[0]})  # type: ignore[misc]
            )
            for i, one in enumerate(scales, 1)
            if isinstance(cast(Guided, one).position.attention.mixer, PositionAttention)
        ]
        try:
            self.logits(x)
        finally:
            for handle in handles:
                handle.remove()
        return {
            f"read by all, scale {i}": _read_by_all(
                cast(PositionAttention, cast(Guided, scales[i - 1]).position.attention.mixer), as_tokens(given)
            ).unflatten(1, given.shape[2:])
            for i, given in seen.items()
        }

    def _heads(self, which: int) -> nn.ModuleList:
        return cast(nn.ModuleList, self.heads[which])


class _Parts:
    """What the modules are made of: convolutions, the norm, PReLU."""

    def __init__(self, ndim: int, norm: str) -> None:
        self.ndim, self.norm = ndim, norm
        self.convolution = CONVOLUTIONS[ndim]

    def normalisation(self, channels: int) -> nn.Module:
        return normalisation(self.norm, self.ndim, channels)

    def layer(self, channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
        return [
            self.convolution(channels, out_channels, kernel, padding=kernel // 2),
            self.normalisation(out_channels),
            nn.PReLU(),
        ]


class Pass(nn.Module):
    """One pass over the scales: an autoencoder that they share, and guided attention of each."""

    def __init__(self, parts: _Parts, width: int, positions: Sequence[Positions]) -> None:
        super().__init__()
        self.semantic = Semantic(parts, 2 * width)
        self.scales = nn.ModuleList(Guided(parts, width, position) for position in positions)

    def forward(self, inputs: list[Tensor]) -> Found:
        """X_is from fine to coarse, (B, 2 width, *s) each."""
        latents, rebuilt = zip(*[self.semantic(x) for x in inputs])
        attended = [scale(x, guide) for scale, x, guide in zip(self.scales, inputs, rebuilt)]
        return Found(inputs=inputs, rebuilt=list(rebuilt), latents=list(latents), attended=attended)


class Semantic(nn.Module):
    """The autoencoder: two levels down, two up; what lies between says what the map is about."""

    def __init__(self, parts: _Parts, channels: int) -> None:
        super().__init__()
        self.pool = F.max_pool2d if parts.ndim == 2 else F.max_pool3d
        self.encoder = nn.ModuleList(
            double(parts.ndim, own, 2 * own, norm=parts.norm) for own in (channels, 2 * channels)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(
                *double(parts.ndim, 2 * own, own, norm=parts.norm), TRANSPOSED[parts.ndim](own, own, 2, stride=2)
            )
            for own in (2 * channels, channels)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, *s) -> (B, 4 C, *s / 4) and (B, C, *s); sizes are multiples of 4."""
        for block in self.encoder:
            x = self.pool(block(x), 2)
        latent = x
        for block in self.decoder:
            x = block(x)
        return latent, x


class Guided(nn.Module):
    """mix((position(X) + channel(X)) · conv(R))."""

    def __init__(self, parts: _Parts, width: int, position: Positions) -> None:
        super().__init__()
        self.position = Branch(parts, width, position)
        self.channel = Branch(parts, width, ChannelAffinityGate(width))
        self.guide = parts.convolution(2 * width, width, 3, padding=1)
        self.mix = parts.convolution(width, width, 1)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """(B, 2 width, *s) twice -> (B, width, *s)."""
        found: Tensor = self.mix((self.channel(x) + self.position(x)) * self.guide(guide))
        return found


class Branch(nn.Module):
    """A convolution to half the channels, attention, a convolution."""

    def __init__(self, parts: _Parts, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Sequential(*parts.layer(2 * width, width, 3))
        self.attention = attention
        self.leave = nn.Sequential(*parts.layer(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2 width, *s) -> (B, width, *s)."""
        found: Tensor = self.leave(self.attention(self.enter(x)))
        return found


# -- backbones --------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A small encoder: a convolution of stride 2, then levels of two convolutions, each halving the grid."""

    def __init__(self, config: DAFConfig, shape: ImageShape) -> None:
        super().__init__()
        stem = max(1, config.channels[0] // 2)
        self.stem = nn.Sequential(
            CONVOLUTIONS[shape.ndim](shape.channels, stem, 3, stride=2, padding=1),
            normalisation(config.norm, shape.ndim, stem),
            nn.ReLU(),
        )
        given = (stem, *config.channels[:-1])
        self.levels = nn.ModuleList(
            double(shape.ndim, below, own, norm=config.norm) for below, own in zip(given, config.channels)
        )
        self.pool = F.max_pool2d if shape.ndim == 2 else F.max_pool3d

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> maps of 1/4, 1/8, …, rounded upwards."""
        x, found = self.stem(x), []
        for level in self.levels:
            x = level(self.pool(x, 2, ceil_mode=True))
            found.append(x)
        return found


class ResNeXt(nn.Module):
    """ResNeXt-101 (32 × 8d) without its classifier, its parameters under torchvision's names.

    "Aggregated Residual Transformations for Deep Neural Networks" (Xie et al., 2017), table 1, whose bottlenecks have
    grouped convolutions; the stride is at the convolution of 3.

    Args:
        ndim: 2 or 3.
        channels: of the images.
        norm: "batch" or "instance".
        blocks: bottlenecks of each stage.
        groups, group_width: of a bottleneck of the first stage.
    """

    def __init__(
        self,
        ndim: int,
        channels: int,
        *,
        norm: str = "batch",
        blocks: Sequence[int] = (3, 4, 23, 3),
        groups: int = 32,
        group_width: int = 8,
    ) -> None:
        super().__init__()
        self.conv1 = CONVOLUTIONS[ndim](channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = normalisation(norm, ndim, 64)
        self.pool = F.max_pool2d if ndim == 2 else F.max_pool3d
        self.channels = [256 * 2**i for i in range(len(blocks))]
        before = 64
        for i, (count, after) in enumerate(zip(blocks, self.channels), 1):
            inner = groups * group_width * 2 ** (i - 1)
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                stage.append(Bottleneck(ndim, before, inner, after, norm=norm, groups=groups, stride=stride))
                before = after
            self.add_module(f"layer{i}", stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *S) -> maps of 1/4, 1/8, 1/16 and 1/32, rounded upwards."""
        x, found = self.pool(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1), []
        for i in range(1, len(self.channels) + 1):
            x = getattr(self, f"layer{i}")(x)
            found.append(x)
        return found


class Bottleneck(nn.Module):
    """relu(x + conv1(relu(grouped conv3(relu(conv1 x))))), each convolution with a norm."""

    def __init__(
        self, ndim: int, channels: int, inner: int, out_channels: int, *, norm: str, groups: int, stride: int
    ) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[ndim]
        self.conv1 = convolution(channels, inner, 1, bias=False)
        self.bn1 = normalisation(norm, ndim, inner)
        self.conv2 = convolution(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = normalisation(norm, ndim, inner)
        self.conv3 = convolution(inner, out_channels, 1, bias=False)
        self.bn3 = normalisation(norm, ndim, out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out_channels:
            self.downsample = nn.Sequential(
                convolution(channels, out_channels, 1, stride=stride, bias=False),
                normalisation(norm, ndim, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *s) -> (B, C', *s / stride)."""
        read = F.relu(self.bn1(self.conv1(x)))
        read = F.relu(self.bn2(self.conv2(read)))
        return F.relu(self.bn3(self.conv3(read)) + self.downsample(x))


# -- helpers ----------------------------------------------------------------------------------------------------------

_ROWS = 1024
"""Queries whose weights are held at a time."""


def _read_by_all(attention: PositionAttention, tokens: Tensor) -> Tensor:
    """(B, L, C) -> (B, L): the sum over the queries of what each token is read by."""
    q, k = attention.q_proj(tokens), attention.k_proj(tokens)
    return torch.stack([(rows @ k.mT).softmax(dim=-1).sum(dim=1) for rows in q.split(_ROWS, dim=1)]).sum(dim=0)


def _start(module: nn.Module) -> None:
    """Weights as the official training draws them: convolutions Xavier-normal, scales of norms around 1."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PositionAttention):
        for one in (module.q_proj, module.k_proj, module.v_proj):
            nn.init.xavier_normal_(one.weight)


# -- official weights -------------------------------------------------------------------------------------------------


def _counted(template: str) -> Callable[[re.Match[str]], str]:
    """What is counted from 1 in the official names, counted from 0 in ours."""
    return lambda found: template.format(*(int(one) - 1 for one in found.groups()))


def _from_coarse(found: re.Match[str]) -> str:
    """conv_sem_1_1 … conv_sem_2_4, conv8_1 … conv8_4 and conv8_11 … conv8_14 are counted from the coarsest scale on."""
    step, scale = int(found[2] or found[3] or 0), 4 - int(found[4])
    if found[1] == "_sem_":
        return f"passes.{step - 1}.scales.{scale}.guide."
    return f"passes.{step}.scales.{scale}.mix."


def _semantic(found: re.Match[str]) -> str:
    """Ours have places for dropout that stay empty."""
    side, level, place = found[1], int(found[2]), int(found[3])
    if side == "enc":
        return f".semantic.encoder.{level - 1}.{place + (place > 2)}."
    return f".semantic.decoder.{2 - level}.{place + (place > 2) + (place > 5)}."


_UNUSED = re.compile(r"^(conv[67]_|attention\d\.|refine\d\.|resnext\.fc\.)")
_RENAMES: tuple[Rename, ...] = (
    (r"^resnext\.layer0\.0\.", "backbone.conv1."),
    (r"^resnext\.layer0\.1\.", "backbone.bn1."),
    (r"^resnext\.layer1\.1\.", "backbone.layer1."),
    (r"^resnext\.layer(\d)\.", r"backbone.layer\1."),
    (r"^down(\d)\.", _counted("reduce.{}.")),
    (r"^fuse1\.fuse_attn\.", "fuse."),
    (r"^predict(\d)\.", _counted("heads.0.{}.")),
    (r"^predict(\d)_2\.", _counted("heads.1.{}.")),
    (r"^conv(_sem_|8_)(?:(\d)_|(1)(?=\d))?(\d)\.", _from_coarse),
    (r"^semanticModule_(\d)_1\.", _counted("passes.{}.semantic.")),
    (r"^pam_attention_(\d)_(\d)\.", _counted("passes.{}.scales.{}.position.")),
    (r"^cam_attention_(\d)_(\d)\.", _counted("passes.{}.scales.{}.channel.")),
    (r"\.semantic\.(enc|dec)(\d)\.(?:encode|decode)\.(\d)\.", _semantic),
    (r"\.attn\.([012])\.", r".enter.\1."),
    (r"\.attn\.3\.(?:(query|key|value)_conv\.)?", lambda found: _mixer(found[1])),
    (r"\.attn\.([456])\.", lambda found: f".leave.{int(found[1]) - 4}."),
)
_OURS = re.compile(r"^(backbone|reduce|fuse|heads|passes)\.")


def _mixer(projection: str | None) -> str:
    return ".attention.mixer." + (f"{projection[0]}_proj." if projection else "")


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of an official DAF_stack as ours of width 64, batch norms and ResNeXt-101, two axes.

    Args:
        weights: parameters by the official names, "module." before them or not.

    Returns:
        dict: for `load_state_dict`; weights that the official code never uses are left out.

    Raises:
        UserError: a key that is none of DAF_stack's.
    """
    ours: dict[str, Tensor] = {}
    for key, tensor in renamed(weights, _RENAMES, ours=_OURS, unused=_UNUSED, network="DAF_stack"):
        ours[key] = tensor.flatten(1) if "_proj.weight" in key else tensor
    return ours
