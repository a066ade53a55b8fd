"""Attention U-Net: against MONAI's with the same weights, any size, its gates."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.attentionunet import AttentionLayer, AttentionUnet

from attn_medseg.config import AttentionUNetConfig
from attn_medseg.models.attention_unet import AttentionUNet
from attn_medseg.models.base import ImageShape

CHANNELS = (4, 6, 8)
# MONAI's names within a gate and ours.
NAMES = {
    "W_g.0.conv": "signal",
    "W_g.1": "signal_norm",
    "W_x.0.conv": "input",
    "W_x.1": "input_norm",
    "psi.0.conv": "psi",
    "psi.1": "psi_norm",
}


def _pair(ndim: int, dtype: torch.dtype) -> tuple[AttentionUNet, AttentionUnet]:
    torch.manual_seed(0)
    shape = ImageShape(ndim=ndim, channels=2, classes=3, size=(16,) * ndim)
    ours = AttentionUNet(AttentionUNetConfig(channels=CHANNELS), shape).to(dtype)
    monai = AttentionUnet(ndim, 2, 3, CHANNELS, (2, 2)).to(dtype)
    weights = {}
    for key, value in monai.state_dict().items():
        if value.dtype.is_floating_point:
            value = value + 0.1 * torch.rand_like(value)
        weights[key] = value
    monai.load_state_dict(weights)
    renamed = {}
    for key, value in weights.items():
        for theirs, own in NAMES.items():
            key = key.replace(f"attention.{theirs}.", f"attention.gate.{own}.")
        renamed[key] = value
    ours.network.load_state_dict(renamed)
    return ours, monai


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("training", [False, True])
def test_monais_numbers(ndim: int, dtype: torch.dtype, tolerance: float, training: bool) -> None:
    ours, monai = _pair(ndim, dtype)
    x = torch.randn(2, 2, *(16, 12, 8)[:ndim], dtype=dtype)
    found, expected = ours.train(training)(x), monai.train(training)(x)
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_any_size_and_gates() -> None:
    ours, monai = _pair(2, torch.float32)
    for size in ((1, 1), (9, 13), (16, 16)):
        x = torch.randn(2, 2, *size)
        found = ours(x)
        assert found.shape == (2, 3, *size)
        found.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.network.parameters())
    torch.manual_seed(1)
    x = torch.randn(1, 2, 16, 16)
    taken: list[torch.Tensor] = []
    layers = [part for part in monai.modules() if isinstance(part, AttentionLayer)]
    for layer in layers:
        layer.attention.psi.register_forward_hook(lambda _, __, out: taken.append(out))
    ours, _ = _pair(2, torch.float32)  # what trained above has other running statistics
    ours.eval()
    monai.eval()(x)
    maps = ours.attention(x)
    assert list(maps) == ["gate of level 2", "gate of level 1"]
    assert torch.allclose(maps["gate of level 1"], taken[1][:, 0], atol=1e-6)
    assert maps["gate of level 1"].std() > 1e-4
    assert torch.allclose(ours.attention(x)["gate of level 1"], maps["gate of level 1"])
    assert ours.attention(torch.randn(1, 2, 9, 13))["gate of level 2"].shape == (1, 9, 13)


@pytest.mark.parametrize(("options", "message"), [({"channels": (4,)}, "two levels"), ({"channels": (1, 4)}, "gates")])
def test_options_are_checked(options: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionUNet(
            AttentionUNetConfig(channels=options["channels"]), ImageShape(ndim=2, channels=1, classes=2, size=(8, 8))
        )
