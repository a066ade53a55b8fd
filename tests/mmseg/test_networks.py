"""Our backbones and heads in mmseg: the networks they were taken from, among mmseg's own, any size, any mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_medseg.config import DAEFormerConfig, TransDAEConfig, WAUConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.daeformer import DAEFormer
from attn_medseg.models.transdae import TransDAE
from attn_medseg.models.wau import WAUNet
from core_attn.naming import UnknownNameError

CLASSES = 3
CHANNELS = [8, 16, 24]
SHAPE = ImageShape(ndim=2, channels=3, classes=CLASSES, size=(32, 32))
DAE = {"blocks": 1, "expansion": 2}
BATCH_NORM = {"type": "BN"}
RESNET = {
    "type": "ResNet",
    "depth": 18,
    "base_channels": 8,
    "stem_channels": 8,
    "norm_cfg": BATCH_NORM,
    "num_stages": 3,
    "strides": (1, 2, 2),
    "dilations": (1, 1, 1),
    "out_indices": (0, 1, 2),
}


def segmentor(registry: Any, backbone: Mapping[str, Any], head: Mapping[str, Any]) -> nn.Module:
    from mmengine.config import ConfigDict

    torch.manual_seed(0)
    decode = {"num_classes": CLASSES, "dropout_ratio": 0.0, **head}
    net: nn.Module = registry.build(
        {"type": "EncoderDecoder", "backbone": backbone, "decode_head": decode, "test_cfg": ConfigDict(mode="whole")}
    )
    return net


def renamed(weights: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of one of our networks by the names they have in mmseg."""
    found = {}
    for name, value in weights.items():
        if name.startswith("head."):
            key = name.replace("head.", "decode_head.conv_seg.")
            found[key] = value[:, :, None, None] if value.dim() == 2 else value
        else:
            part = name.partition(".")[0]
            found[f"{parts[part]}.{name}"] = value
    return found


HIERARCHY = {"stages": "backbone.encoder", "expand": "decode_head.decoder", "levels": "decode_head.decoder"}
UNET = {"encoder": "backbone.network", "ups": "decode_head.decoder", "decoder": "decode_head.decoder"}


def hierarchical(network: type[DAEFormer] | type[TransDAE], config: type[DAEFormerConfig]) -> nn.Module:
    return network(config(channels=(8, 16, 24), **DAE), SHAPE)


def unet(upsample: str) -> nn.Module:
    return WAUNet(WAUConfig(channels=(8, 16, 24), upsample=upsample), SHAPE)


@pytest.mark.parametrize(
    ("net", "backbone", "head"),
    [
        (partial(hierarchical, DAEFormer, DAEFormerConfig), "DAEFormerBackbone", {"type": "DAEFormerHead", **DAE}),
        (partial(hierarchical, TransDAE, TransDAEConfig), "DAEFormerBackbone", {"type": "TransDAEHead", **DAE}),
        (partial(unet, "wau"), "UNetEncoder", {"type": "WAUHead"}),
        (partial(unet, "deconv"), "UNetEncoder", {"type": "WAUHead", "upsample": "deconv"}),
    ],
    ids=["daeformer", "transdae", "wau", "deconv"],
)
def test_backbone_and_head_are_the_network(
    registry: Any, net: Callable[[], nn.Module], backbone: str, head: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    ours = net().eval()
    encoder, parts = ({"type": backbone}, UNET) if backbone == "UNetEncoder" else ({"type": backbone, **DAE}, HIERARCHY)
    theirs = segmentor(registry, {"channels": CHANNELS, **encoder}, {"in_channels": CHANNELS, **head}).eval()
    weights = renamed(ours.state_dict(), parts)
    assert set(weights) == set(theirs.state_dict())
    theirs.load_state_dict(weights)
    x = torch.randn(2, 3, 48, 32)
    assert torch.allclose(theirs(x), ours(x), atol=1e-6)


@pytest.mark.parametrize("pad", ["whole", "odd"])
@pytest.mark.parametrize("head", ["DAEFormerHead", "TransDAEHead", "WAUHead", "DualAttentionHead"])
@pytest.mark.parametrize("backbone", ["DAEFormerBackbone", "UNetEncoder", "ResNet"])
def test_any_of_ours_beside_any_of_ours_and_theirs(registry: Any, backbone: str, head: str, pad: str) -> None:
    """Loss and gradients of every parameter, and logits as large as the image after mmseg's own resizing."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    channels = [8, 16, 32]
    encoder = RESNET if backbone == "ResNet" else {"type": backbone, "channels": channels}
    own: dict[str, Any] = {"in_channels": channels, "patch": {"UNetEncoder": 1}.get(backbone, 4), **DAE}
    if head == "WAUHead":
        own = {"in_channels": channels, "window": 2}
    if head == "DualAttentionHead":
        own = {"in_channels": channels[-1], "in_index": 2, "channels": 8, "norm_cfg": BATCH_NORM}
    net = segmentor(registry, encoder, {"type": head, **own}).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    size = (32, 48) if pad == "whole" else (37, 45)
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=torch.randint(CLASSES, (1, *size))), metainfo={"img_shape": size})
        for _ in range(2)
    ]
    x = torch.randn(2, 3, *size)
    losses = net.loss(x, samples)
    total = torch.stack([value for name, value in losses.items() if "loss" in name]).sum()
    total.backward()
    assert total.isfinite()
    blind = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not blind
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    net.eval()
    assert net.predict(x)[0].pred_sem_seg.data.shape == (1, *size)


def test_mmsegs_own_head_on_our_backbone(registry: Any) -> None:
    net = segmentor(
        registry,
        {"type": "DAEFormerBackbone", "channels": CHANNELS, **DAE},
        {
            "type": "SegformerHead",
            "in_channels": CHANNELS,
            "in_index": [0, 1, 2],
            "channels": 8,
            "norm_cfg": BATCH_NORM,
        },
    ).eval()
    assert net(torch.randn(2, 3, 37, 45)).shape == (2, CLASSES, 10, 12)


def test_the_dual_attention_head_is_mmsegs(registry: Any) -> None:
    options = {"in_channels": 6, "channels": 16, "num_classes": CLASSES, "norm_cfg": BATCH_NORM}
    torch.manual_seed(0)
    theirs = registry.build({"type": "DAHead", "pam_channels": 2, **options}).double().eval()
    ours = registry.build({"type": "DualAttentionHead", **options}).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            own, right = getattr(ours.pam.mixer, f"{name[0]}_proj"), getattr(theirs.pam, f"{name}_project")
            own.weight.copy_(right.weight.flatten(1))
            own.bias.copy_(right.bias)
        for head in (theirs.pam.gamma.scale, theirs.cam.gamma.scale, ours.pam.mixer.gamma, ours.cam.mixer.gamma):
            head.fill_(0.7)
    x = [torch.randn(2, 6, 9, 7, dtype=torch.float64)]
    for got, right in zip(ours(x), theirs(x), strict=True):
        assert (got - right).abs().max() <= 1e-10 * right.abs().max()


@pytest.mark.parametrize("mixer", ["softmax", "gna", "agent", "flow"])
def test_any_mixer(registry: Any, mixer: str) -> None:
    backbone = {"type": "DAEFormerBackbone", "channels": CHANNELS, "mixer": mixer, **DAE}
    for head in (
        {"type": "DAEFormerHead", "in_channels": CHANNELS, "mixer": mixer, **DAE},
        {"type": "DualAttentionHead", "in_channels": 24, "channels": 8, "mixer": mixer, "mixer_args": {"heads": 2}},
    ):
        net = segmentor(registry, backbone, head).eval()
        found = net(torch.randn(1, 3, 32, 48))
        assert (found[0] if isinstance(found, tuple) else found).isfinite().all()
        kinds = {type(module).info.name for module in net.modules() if hasattr(type(module), "info")}
        assert mixer in kinds
        assert "efficient" not in kinds
        assert "position" not in kinds


def test_what_cannot_be_is_said(registry: Any) -> None:
    def build(**config: Any) -> Any:
        return registry.build({"num_classes": CLASSES, **config})

    with pytest.raises(UnknownNameError, match=r"unknown mechanism 'softmx'; did you mean 'softmax'"):
        registry.build({"type": "DAEFormerBackbone", "mixer": "softmx"})
    with pytest.raises(ValueError, match="gla cannot compute noncausal self attention"):
        registry.build({"type": "DAEFormerBackbone", "mixer": "gla"})
    with pytest.raises(ValueError, match="each of channels must be even and a multiple of heads = 8, got 12"):
        build(type="DAEFormerHead", in_channels=[8, 12])
    with pytest.raises(ValueError, match="DAEFormerHead takes in_channels, a number for each level, and no channels"):
        build(type="DAEFormerHead", in_channels=[8, 16], channels=8)
    with pytest.raises(TypeError, match="hedas"):
        build(type="WAUHead", in_channels=[8, 16], hedas=2)
    head = build(type="WAUHead", in_channels=[8, 16])
    with pytest.raises(ValueError, match=r"each map must be half as large as the one before, got 8 x 8, 8 x 8; choose"):
        head([torch.randn(1, 8, 8, 8), torch.randn(1, 16, 8, 8)])
