"""The control network, and images of any size."""

from __future__ import annotations

import pytest
import torch

from attn_medseg.config import UNetConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.pad import crop, pad
from attn_medseg.models.unet import UNet


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_any_size(ndim: int, norm: str) -> None:
    torch.manual_seed(0)
    shape = ImageShape(ndim=ndim, channels=2, classes=3, size=(16,) * ndim)
    net = UNet(UNetConfig(channels=(4, 8, 16), norm=norm), shape)
    for size in ((1,) * ndim, (7, 13, 5)[:ndim], (16,) * ndim):
        x = torch.randn(2, 2, *size)
        found = net(x)
        assert found.shape == (2, 3, *size)
        label = torch.randint(0, 3, (2, *size))
        value = net.loss({"image": x, "label": label}, torch.nn.functional.cross_entropy)
        value.backward()
        assert torch.isfinite(value)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_sizes_that_fit_are_monais_own() -> None:
    shape = ImageShape(ndim=2, channels=1, classes=2, size=(32, 32))
    net = UNet(UNetConfig(channels=(4, 8, 16)), shape).eval()
    x = torch.randn(1, 1, 32, 16)
    assert torch.equal(net(x), net.network(x))


def test_padding_is_undone() -> None:
    x = torch.randn(2, 3, 5, 9, 4)
    padded, inside = pad(x, (4, 3, 5), least=2)
    assert padded.shape == (2, 3, 8, 9, 10)
    assert torch.equal(crop(padded, inside), x)
    # What is around repeats the edge.
    assert torch.equal(padded[:, :, 0, :, 3:7], x[:, :, 0])
    same, inside = pad(x, 1)
    assert same is x
    assert torch.equal(crop(same, inside), x)
    with pytest.raises(ValueError, match="as many multiples"):
        pad(x, (2, 2))
    with pytest.raises(ValueError, match="a voxel along every axis"):
        pad(x[:, :, :0], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (4,)}, "two levels"),
        ({"residual_units": -1}, "residual_units"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    shape = ImageShape(ndim=2, channels=1, classes=2, size=(32, 32))
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**options), shape)  # type: ignore[arg-type]
