"""Scribbles and unpaired masks: a U-Net whose gates are segmentations, and a discriminator that looks at all of them.

"Learning to Segment from Scribbles using Multi-scale Adversarial Attention Gates" (S195). Of the paper the
abstract was at hand; equations and constants are those of its official code,
gvalvano/multiscale-adversarial-attention-gates.

Segmentor, level i of the decoder, skip s_i:  u = norm(conv(nearest(y_{i+1}))), f = block([u, s_i]), g = block(f),
                                              m_i = softmax(conv f), y_i = g · Σ_{k > 0} m_i[k]
Discriminator D, of masks p_0 … p_n without background, each half as fine as the one before:
    z = leaky(conv(p_0 + noise)), z = tanh(conv_sn([σ(conv z), p_i])) for i = 1 … n, D = ⟨w, z⟩ + b
Real masks are given at full size and resized; of the segmentor's, p_0 is its output and p_i the gates' m_i.

    L_D = ½ (D(real) - 1)² + ½ (D(fake) + 1)²       L_G = ½ (D(fake) - 1)²
    L   = w L_S + λ L_G,  w = |L_G / L_S| held fixed,  λ = 0.1

L_S is the task's loss on drawn voxels; the official one is the cross-entropy with classes weighted by their rarity
(`--task_args.loss ce --task_args.class_weights true`, which differs by a factor that w takes away). Both sides are
lowered in one step of one optimiser: L_D reads masks whose gradient stops, L_G reads a discriminator whose weights are
held, so that neither side's gradient reaches the other.

The official code alternates: on scribbles it lowers w L_S + 0.1 L_D, with w = |L_D / L_S|, in the segmentor too, which
so is moved to where its masks are told from drawn ones; on other images 0.2 L_G. That is `push` "both". Its flips turn
answers but not their gradients, so that they do not confuse the discriminator: `flip_form` "sign".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from attn_medseg.config import GatedUNetConfig, MAAGConfig
from attn_medseg.models.base import IGNORE, Criterion, ImageShape, Segmenter
from attn_medseg.models.convolutions import CONVOLUTIONS, TRANSPOSED, check, levels, normalisation
from attn_medseg.models.pad import crop, pad
from core_attn.mechanisms.channel.adversarial_gate import AdversarialGate

UPSAMPLERS = ("nearest", "deconv")
FLIPS = ("label", "sign")
PUSHES = ("real", "both")

_EPSILON = 1e-3  # of the norms: TensorFlow's
_SLOPE = 0.2
_MODES = {2: "bilinear", 3: "trilinear"}
_TINY = 1e-12


class _Level(nn.Module):
    def __init__(self, config: GatedUNetConfig, shape: ImageShape, below: int, channels: int) -> None:
        super().__init__()
        ndim = shape.ndim
        self.up: nn.Module
        if config.upsample == "deconv":
            self.up = TRANSPOSED[ndim](below, channels, 2, stride=2)
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2.0), CONVOLUTIONS[ndim](below, channels, 3, padding=1))
        self.norm = normalisation(config.norm, ndim, channels, eps=_EPSILON)
        self.first = _block(ndim, 2 * channels, channels, config.norm)
        self.second = _block(ndim, channels, channels, config.norm)
        self.gate = AdversarialGate(channels, shape.classes, axes=ndim) if config.gates else None

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        read = self.first(torch.cat([self.norm(self.up(x)), skip], dim=1))
        found = self.second(read)
        return (found, None) if self.gate is None else self.gate(found, read)


class Discriminator(nn.Module):
    """Says of masks at several scales whether they were drawn (1) or made (-1).

    Args:
        ndim: 2 or 3.
        structures: channels of a mask: its classes without the background.
        size: of the finest mask; every further one is half as fine.
        scales: how many masks there are.
        channels: of the first convolution; the convolution of scale i has channels · 2^(i + 1).
        squeeze: channels to which a scale's features are brought before the next mask joins them.
        noise: deviation of what is added to the finest mask in training.
        flip: how often in training all answers of a call are turned.
        flip_form: "label" turns what is asked for, -1 for 1 and 1 for -1; "sign" turns the answer and leaves its
            gradient as it is, as the official code does.
    """

    def __init__(
        self,
        ndim: int,
        structures: int,
        size: Sequence[int],
        scales: int,
        *,
        channels: int,
        squeeze: int = 13,
        noise: float = 0.2,
        flip: float = 0.1,
        flip_form: str = "label",
    ) -> None:
        super().__init__()
        self.ndim, self.size, self.scales = ndim, tuple(size), scales
        self.noise, self.flip, self.flip_form = noise, flip, flip_form
        convolution = CONVOLUTIONS[ndim]
        self.first = convolution(structures, channels, 4, stride=2)
        self.squeezes = nn.ModuleList()
        self.convolutions = nn.ModuleList()
        given, grid = channels, [-(-one // 2) for one in size]
        for scale in range(1, scales):
            last = scale == scales - 1
            wide = channels * 2 ** (scale + 1)
            self.squeezes.append(convolution(given, squeeze, 1))
            own = convolution(squeeze + structures, wide, 4, stride=1 if last else 2)
            self.convolutions.append(spectral_norm(own))
            grid = grid if last else [-(-one // 2) for one in grid]
            given = wide
        self.last = nn.Linear(given * math.prod(grid), 1)
        self._begin()

    def _begin(self) -> None:
        """Where the official code begins: He's initialisation, but Glorot's where norms or the output stand."""
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        part: Any
        for part in self.squeezes:
            nn.init.xavier_uniform_(part.weight)
        for part in self.convolutions:
            nn.init.xavier_uniform_(part.parametrizations.weight.original)
        nn.init.xavier_uniform_(self.last.weight)
        for part in (self.first, *self.squeezes, *self.convolutions, self.last):
            nn.init.zeros_(part.bias)

    def forward(self, masks: Sequence[Tensor]) -> Tensor:
        """Masks from fine to coarse, (B, structures, *S / 2^i) -> (B,) answers, without flips.

        A single mask stands for all: it is resized to the coarser scales.
        """
        if len(masks) == 1:
            masks = [*masks, *(self._smaller(masks[0], scale) for scale in range(1, self.scales))]
        if len(masks) != self.scales or tuple(masks[0].shape[2:]) != self.size:
            raise ValueError(
                f"the discriminator reads {self.scales} masks, the finest of size {self.size}, got "
                f"{[tuple(one.shape[2:]) for one in masks]}"
            )
        finest = masks[0]
        if self.training and self.noise:
            finest = finest + self.noise * torch.randn_like(finest)
        x = F.leaky_relu(self.first(_same(finest, 2)), _SLOPE)
        convolution: Any
        for number, (squeeze, convolution) in enumerate(zip(self.squeezes, self.convolutions), 1):
            x = torch.cat([torch.sigmoid(squeeze(x)), masks[number]], dim=1)
            x = torch.tanh(convolution(_same(x, convolution.stride[0])))
        found: Tensor = self.last(x.flatten(1))
        return found[:, 0]

    def _smaller(self, mask: Tensor, scale: int) -> Tensor:
        size = [one // 2**scale for one in mask.shape[2:]]
        return F.interpolate(mask, size, mode=_MODES[self.ndim], align_corners=True)

    def loss(self, masks: Sequence[Tensor], target: float) -> Tensor:
        """½ (D - target)², the mean over masks; in training turned now and then."""
        answer = self(masks)
        if self.training and self.flip and float(torch.rand(())) < self.flip:
            if self.flip_form == "label":
                target = -target
            else:
                answer = answer - 2 * answer.detach()
        return 0.5 * (answer - target).square().mean()


class GatedUNet(Segmenter):
    """The segmentor alone. Its loss is the task's own: on scribbles plain partial cross-entropy.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: not used; no tokens are mixed.
    """

    least: ClassVar[int] = 2  # pixels at the coarsest level: norms need more than one
    config: GatedUNetConfig

    def __init__(
        self,
        config: GatedUNetConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        check(config.channels, config.norm)
        if config.upsample not in UPSAMPLERS:
            raise ValueError(f"upsample is {config.upsample!r}; it may be {' or '.join(UPSAMPLERS)}")
        ndim, channels = shape.ndim, config.channels
        self.multiple = 2 ** (len(channels) - 1)
        given = (shape.channels, *channels[:-2])
        self.encoder = nn.ModuleList(
            nn.Sequential(_block(ndim, below, own, config.norm), _block(ndim, own, own, config.norm))
            for below, own in zip(given, channels)
        )
        # The coarsest level sees single pixels.
        self.bottom = nn.Sequential(
            _block(ndim, channels[-2], channels[-1], config.norm, kernel=1),
            _block(ndim, channels[-1], channels[-1], config.norm, kernel=1),
        )
        self.levels = nn.ModuleList(_Level(config, shape, below, own) for below, own in levels(channels))
        self.head = _convolution(ndim, channels[0], shape.classes, 1)
        self.pool = F.max_pool2d if ndim == 2 else F.max_pool3d

    def logits(self, x: Tensor) -> Tensor:
        return self.decoded(x)[0]

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """How much each gate lets through, from coarse to fine."""
        found = self.decoded(x)[1]
        return {f"gate of level {len(found) - i}": one[:, 1:].sum(dim=1) for i, one in enumerate(found)}

    def decoded(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the maps of classes (B, K, *s) of the gates from coarse to fine; sizes as in `logits`."""
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x, 2)
        x = self.bottom(x)
        found = []
        for level, skip in zip(self.levels, reversed(skips)):
            x, maps = level(x, skip)
            if maps is not None:
                found.append(maps)
        return self.head(x), found


class MAAG(GatedUNet):
    """The segmentor and the discriminator, which training alone uses.

    Args:
        config, shape: see `Segmenter`.
        mixer, mixer_args: not used; no tokens are mixed.
    """

    wants_masks: ClassVar[bool] = True
    config: MAAGConfig

    def __init__(
        self,
        config: MAAGConfig,
        shape: ImageShape,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, shape, mixer=mixer, mixer_args=mixer_args)
        _check(config)
        self.discriminator: Discriminator | None = None
        if config.adversary:
            self.discriminator = Discriminator(
                shape.ndim,
                shape.classes - 1,
                [max(self.least, -(-one // self.multiple)) * self.multiple for one in shape.size],
                len(config.channels) - 1,
                channels=config.discriminator_channels,
                squeeze=config.squeeze,
                noise=config.noise,
                flip=config.flip,
                flip_form=config.flip_form,
            )

    def judged(self, logits: Tensor, gates: Sequence[Tensor]) -> list[Tensor]:
        """What the discriminator sees of the segmentor, from fine to coarse: probabilities without the background.

        The finest gate is as fine as the output and is not shown.
        """
        return [logits.softmax(dim=1)[:, 1:], *(one[:, 1:] for one in reversed(gates[:-1]))]

    def loss(self, batch: Mapping[str, Tensor], criterion: Criterion) -> Tensor:
        if self.discriminator is None:
            return super().loss(batch, criterion)
        if "masks" not in batch:
            raise ValueError("the adversary needs masks of other images in the batch")
        parts = self.losses(batch, criterion)
        return parts["segmentor"] + parts["discriminator"]

    def losses(self, batch: Mapping[str, Tensor], criterion: Criterion) -> dict[str, Tensor]:
        """The terms of the loss: "supervised", "adversarial", "weight", "segmentor", "discriminator"."""
        discriminator = self.discriminator
        assert discriminator is not None
        x, inside = pad(batch["image"], self.multiple, self.least)
        logits, gates = self.decoded(x)
        supervised = criterion(crop(logits, inside), batch["label"])
        made = self.judged(logits, gates)
        real = _drawn(batch["masks"], self.shape.classes, made[0].dtype)
        real = F.pad(real, _sides(tuple(x.shape[2:]), inside))
        judgement = discriminator.loss([real], 1.0) + discriminator.loss([one.detach() for one in made], -1.0)
        with _held(discriminator):
            adversarial = discriminator.loss(made, 1.0)
            pushed = adversarial
            if self.config.push == "both":
                pushed = discriminator.loss([real], 1.0) + discriminator.loss(made, -1.0)
        weight = supervised.new_ones(())
        if self.config.dynamic:
            weight = (pushed / supervised.clamp_min(_TINY)).abs().detach()
        segmentor = weight * supervised + self.config.adversarial * pushed
        if self.config.push == "both":
            segmentor = segmentor + 2 * self.config.adversarial * adversarial
        return {
            "supervised": supervised,
            "adversarial": adversarial,
            "weight": weight,
            "segmentor": segmentor,
            "discriminator": judgement,
        }


def _check(config: MAAGConfig) -> None:
    if config.push not in PUSHES:
        raise ValueError(f"push is {config.push!r}; it may be {' or '.join(PUSHES)}")
    if config.flip_form not in FLIPS:
        raise ValueError(f"flip_form is {config.flip_form!r}; it may be {' or '.join(FLIPS)}")
    if min(config.discriminator_channels, config.squeeze) < 1:
        raise ValueError(
            f"discriminator_channels and squeeze must be at least 1, got {config.discriminator_channels} and "
            f"{config.squeeze}"
        )
    if config.noise < 0 or config.adversarial < 0:
        raise ValueError(f"noise and adversarial must be 0 or more, got {config.noise} and {config.adversarial}")
    if not 0 <= config.flip <= 1:
        raise ValueError(f"flip is a share from 0 to 1, got {config.flip}")


def _convolution(ndim: int, channels: int, out_channels: int, kernel: int) -> nn.Module:
    found = CONVOLUTIONS[ndim](channels, out_channels, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(found.weight, nonlinearity="relu")
    assert found.bias is not None
    nn.init.zeros_(found.bias)
    return found


def _block(ndim: int, channels: int, out_channels: int, norm: str, *, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        _convolution(ndim, channels, out_channels, kernel),
        normalisation(norm, ndim, out_channels, eps=_EPSILON),
        nn.ReLU(),
    )


def _same(x: Tensor, stride: int) -> Tensor:
    """Filled with 0 as TensorFlow's padding "same" fills for a convolution of 4."""
    sides: list[int] = []
    for size in reversed(x.shape[2:]):
        need = max(0, (-(-size // stride) - 1) * stride + 4 - size)
        sides += [need // 2, need - need // 2]
    return F.pad(x, sides)


def _drawn(masks: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(B, *S) labels -> (B, K - 1, *S) masks of the structures; what nobody drew is background."""
    known = torch.where(masks == IGNORE, 0, masks)
    return F.one_hot(known, classes).movedim(-1, 1)[:, 1:].to(dtype)


def _sides(size: Sequence[int], inside: Sequence[slice]) -> list[int]:
    """What `pad` added on each side, in the order of `F.pad`: around a mask is background."""
    sides: list[int] = []
    for wide, one in zip(reversed(size), reversed(inside)):
        sides += [one.start, wide - one.stop]
    return sides


@contextmanager
def _held(net: nn.Module) -> Iterator[None]:
    """What `net` computes meanwhile has no gradient for its weights, but has one for what it reads."""
    held = [one for one in net.parameters() if one.requires_grad]
    for one in held:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in held:
            one.requires_grad_(True)
