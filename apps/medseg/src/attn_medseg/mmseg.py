"""Our encoders and decoders as backbones and heads of mmsegmentation, in two axes.

Importing this module enters them in mmseg's registry, so that a config names them:

    custom_imports = dict(imports=["attn_medseg.mmseg"], allow_failed_imports=False)
    model = dict(
        type="EncoderDecoder",
        backbone=dict(type="DAEFormerBackbone", mixer="softmax"),
        decode_head=dict(type="DAEFormerHead", in_channels=[32, 80, 128], num_classes=2),
    )

Any of mmseg's heads takes our backbones, and our heads take any backbone whose maps halve from level to level. Images
may have any size; where it is no multiple of what the levels halve, logits cover the last cells whole and mmseg
stretches them to the image, as it does with its own networks (`size_divisor` of the data preprocessor avoids it).

Shapes: B images, C_i channels and S_i = (H_i, W_i) of level i, from fine to coarse, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from attn_medseg.config import DAEFormerConfig, TransDAEConfig, WAUConfig
from attn_medseg.models.agunet import Positions
from attn_medseg.models.base import ImageShape
from attn_medseg.models.convolutions import as_image, as_tokens
from attn_medseg.models.daeformer import DAEFormer, HierarchicalSegmenter
from attn_medseg.models.transdae import TransDAE
from attn_medseg.models.wau import WAUNet
from core_attn.api import build
from core_attn.mechanisms.channel.dual import ChannelAffinityGate

try:
    from mmengine.model import BaseModule
    from mmseg.models.decode_heads.da_head import DAHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import MODELS
except ImportError as error:
    raise ImportError(
        f"attn_medseg.mmseg needs mmsegmentation ({error}); install it with "
        "`MMCV_WITH_OPS=0 pip install 'attn-medseg[mmseg]'`"
    ) from None


# -- backbones --------------------------------------------------------------------------------------------------------


@MODELS.register_module()
class DAEFormerBackbone(BaseModule):
    """The encoder of DAE-Former and of TransDAE: maps of 1/patch, half of that, …

    Args:
        in_channels: channels of the images.
        mixer: name of the `core_attn` mechanism that mixes tokens; None = efficient attention.
        mixer_args: its options.
        init_cfg: see `mmengine.model.BaseModule`.
        options: the fields of `DAEFormerConfig`, such as channels=(32, 80, 128).

    Raises:
        ValueError: an option out of its range; a mixer that cannot compute noncausal self-attention.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(init_cfg)
        config = DAEFormerConfig(**options)
        self.encoder = HierarchicalSegmenter(config, _shape(in_channels), mixer=mixer, mixer_args=mixer_args)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) -> (B, C_i, *S_i) of each level."""
        return tuple(as_image(tokens, grid) for tokens, grid in self.encoder.encode(x))


@MODELS.register_module()
class UNetEncoder(BaseModule):
    """The encoder of a U-Net of double convolutions: maps of the image's own size, half of it, …

    Args:
        in_channels: channels of the images.
        init_cfg: see `mmengine.model.BaseModule`.
        options: channels, norm and dropout of `WAUConfig`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(self, in_channels: int = 3, *, init_cfg: Any = None, **options: Any) -> None:
        super().__init__(init_cfg)
        self.network = WAUNet(WAUConfig(**options), _shape(in_channels))
        del self.network.ups, self.network.decoder, self.network.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) -> (B, C_i, *S_i) of each level."""
        return tuple(self.network.encode(x))


# -- heads ------------------------------------------------------------------------------------------------------------


class _PyramidHead(BaseDecodeHead):
    """A decoder that reads maps of several levels, each half as large as the one before.

    Args:
        in_channels: C_i of each level, from fine to coarse.
        in_index: which of the backbone's maps; None = the first ones.
        options: the fields of the config but `channels`; what `BaseDecodeHead` takes, such as num_classes, loss_decode
            and dropout_ratio. Its conv_cfg, norm_cfg and act_cfg change nothing here.
    """

    config: ClassVar[type]

    def __init__(self, in_channels: Sequence[int], *, in_index: Sequence[int] | None = None, **options: Any) -> None:
        own = {field.name: options.pop(field.name) for field in fields(self.config) if field.name in options}
        if "channels" in own:
            raise ValueError(f"{type(self).__name__} takes in_channels, a number for each level, and no channels")
        super().__init__(
            in_channels=list(in_channels),
            channels=in_channels[0],
            in_index=list(range(len(in_channels)) if in_index is None else in_index),
            input_transform="multiple_select",
            **options,
        )
        self.settings = self.config(channels=tuple(in_channels), **own)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_i, *S_i), each twice the size of the next -> (B, C_0, H, W)."""
        raise NotImplementedError

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps -> (B, K, H, W)."""
        maps = self._transform_inputs(inputs)
        filled = _filled(maps)
        found = self.decode(filled)
        factor = found.shape[-1] // filled[0].shape[-1]
        height, width = maps[0].shape[2:]
        out: Tensor = self.cls_seg(found[..., : factor * height, : factor * width])
        return out


class _HierarchicalHead(_PyramidHead):
    """The decoder of a `HierarchicalSegmenter`."""

    network: ClassVar[type[HierarchicalSegmenter]]

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        mixer: str | None = None,
        mixer_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, **options)
        self.decoder = self.network(self.settings, _shape(), mixer=mixer, mixer_args=mixer_args)
        del self.decoder.stages, self.decoder.head

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        return as_image(*self.decoder.decode([(as_tokens(one), tuple(one.shape[2:])) for one in maps]))


@MODELS.register_module()
class DAEFormerHead(_HierarchicalHead):
    """The decoder of DAE-Former: skips by cross attention, blocks of attention between tokens and between channels.

    Args:
        in_channels, in_index: C_i of each level, from fine to coarse, and which of the backbone's maps they are; even
            numbers and multiples of `heads`.
        mixer, mixer_args: see `DAEFormerBackbone`.
        options: patch (the finest map is 1/patch of the image), blocks, heads and expansion of `DAEFormerConfig`; what
            mmseg's `BaseDecodeHead` takes.

    Raises:
        ValueError: see `DAEFormerBackbone`.
    """

    config = DAEFormerConfig
    network = DAEFormer


@MODELS.register_module()
class TransDAEHead(_HierarchicalHead):
    """The decoder of TransDAE (S29): in its skips all scales meet under a large kernel.

    Args:
        in_channels, in_index, mixer, mixer_args: see `DAEFormerHead`.
        options: those of `DAEFormerHead`, and kernel and dilation of `TransDAEConfig`.

    Raises:
        ValueError: see `DAEFormerHead`; a kernel no larger than its dilation.
    """

    config = TransDAEConfig
    network = TransDAE


@MODELS.register_module()
class WAUHead(_PyramidHead):
    """The decoder of a U-Net with Window Attention Upsample (S86), or with its controls.

    Args:
        in_channels, in_index: C_i of each level, from fine to coarse, and which of the backbone's maps they are.
        options: upsample, window, heads, norm and dropout of `WAUConfig`; what mmseg's `BaseDecodeHead` takes.

    Raises:
        ValueError: an option out of its range.
    """

    config = WAUConfig

    def __init__(self, in_channels: Sequence[int], **options: Any) -> None:
        super().__init__(in_channels, **options)
        self.decoder = WAUNet(self.settings, _shape())
        del self.decoder.encoder, self.decoder.head

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        return self.decoder.decode(maps)


@MODELS.register_module()
class DualAttentionHead(DAHead):
    """mmseg's head of DANet with our attention: between positions without a map of N × N, and between channels.

    Its three losses, its convolutions and its options are those of mmseg's `DAHead`.

    Args:
        mixer: name of the `core_attn` mechanism between positions, inside a residual connection whose weight is learned
            from 0; "position" is DANet's, with an eighth of the channels for queries and keys.
        mixer_args: its options.
        channel_form: of channel attention: "inverse" (DANet's code), "plain" (its equation) or "transposed".
        options: in_channels, channels, num_classes and what else `BaseDecodeHead` takes.

    Raises:
        ValueError: a mixer that cannot compute noncausal self-attention.
        UnknownNameError: no such mixer, option or form.
    """

    def __init__(
        self,
        *,
        mixer: str = "position",
        mixer_args: Mapping[str, Any] | None = None,
        channel_form: str = "inverse",
        **options: Any,
    ) -> None:
        super().__init__(pam_channels=1, **options)
        self.pam = Positions(build(mixer, dim=self.channels, **{"heads": 4, **(mixer_args or {})}), 2)
        self.cam = ChannelAffinityGate(self.channels, form=channel_form)


def _shape(channels: int = 1) -> ImageShape:
    """Of a network of which only the encoder or the decoder is used; classes and size change nothing in them."""
    return ImageShape(ndim=2, channels=channels, classes=2, size=(1, 1))


def _filled(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps with their last rows and columns repeated, so that each is exactly twice the size of the next.

    Raises:
        ValueError: they do not halve from level to level.
    """
    found = [maps[-1]]
    for below, own in zip(maps[:0:-1], maps[-2::-1]):
        if any(-(-size // 2) != half for size, half in zip(own.shape[2:], below.shape[2:])):
            sizes = [" x ".join(map(str, one.shape[2:])) for one in maps]
            raise ValueError(
                f"each map must be half as large as the one before, got {', '.join(sizes)}; choose others by in_index"
            )
        height, width = (2 * goal - size for goal, size in zip(found[0].shape[2:], own.shape[2:]))
        found.insert(0, F.pad(own, (0, width, 0, height), mode="replicate"))
    return found
