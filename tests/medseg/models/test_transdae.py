"""TransDAE: its skips by their equations, images of any size, volumes, other mixers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_medseg.config import TransDAEConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.convolutions import as_image, as_tokens
from attn_medseg.models.transdae import Interaction, LargeKernelAttention, TransDAE


def make(ndim: int = 2, *, mixer: str | None = None, **config: Any) -> TransDAE:
    torch.manual_seed(0)
    settings = TransDAEConfig(**({"channels": (8, 16, 24), "blocks": 1, "expansion": 2} | config))
    return TransDAE(settings, ImageShape(ndim=ndim, channels=2, classes=3, size=(16,) * ndim), mixer=mixer).eval()


@pytest.mark.parametrize("ndim", [2, 3])
def test_any_size(ndim: int) -> None:
    net = make(ndim)
    for size in ((1,) * ndim, (7, 21, 5)[:ndim], (16, 32, 16)[:ndim]):
        x = torch.randn(2, 2, *size)
        assert net(x).shape == (2, 3, *size)
        net.zero_grad()
        value = net.loss({"image": x, "label": torch.randint(0, 3, (2, *size))}, F.cross_entropy)
        value.backward()
        assert torch.isfinite(value)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(("kernel", "dilation", "near", "far"), [(21, 3, 5, 7), (7, 2, 3, 5), (5, 1, 1, 5)])
def test_a_large_kernel_taken_apart(kernel: int, dilation: int, near: int, far: int) -> None:
    """Away from the edges, both convolutions are one of the kernel that they make together."""
    torch.manual_seed(0)
    layer = LargeKernelAttention(2, 3, kernel=kernel, dilation=dilation).double()
    assert layer.near.weight.shape[-1] == near
    assert layer.far.weight.shape[-1] == far
    reach = (near - 1) // 2 + (far - 1) // 2 * dilation
    width = 2 * reach + 1
    assert width >= kernel
    whole = torch.zeros(3, 1, width, width, dtype=torch.float64)
    for i in range(far):
        for j in range(far):
            at = slice(i * dilation, i * dilation + near), slice(j * dilation, j * dilation + near)
            whole[(slice(None), slice(None), *at)] += layer.far.weight[:, :, i, j][..., None, None] * layer.near.weight
    constant = layer.far.bias + layer.near.bias * layer.far.weight.sum(dim=(1, 2, 3))
    x = torch.randn(2, 3, width + 4, width + 6, dtype=torch.float64)
    inside = (slice(None), slice(None), slice(reach, -reach), slice(reach, -reach))
    around = F.conv2d(x, whole, constant, groups=3)
    weights = torch.einsum("oc,bchw->bohw", layer.mix.weight[..., 0, 0], around) + layer.mix.bias.view(1, -1, 1, 1)
    assert torch.allclose(layer(x)[inside], x[inside] * weights, rtol=0, atol=1e-12)


def finer_by_hand(x: Tensor, size: int, axis: int) -> Tensor:
    """Linear interpolation along an axis, centres on centres, edge values beyond the last ones."""
    old = x.shape[axis]
    at = ((torch.arange(size, dtype=x.dtype) + 0.5) * old / size - 0.5).clamp(0, old - 1)
    left = at.floor().long()
    right = (left + 1).clamp(max=old - 1)
    share = (at - left).view(*[-1 if i == axis else 1 for i in range(x.dim())])
    return x.index_select(axis, left) * (1 - share) + x.index_select(axis, right) * share


def test_scales_meet_by_the_equations() -> None:
    torch.manual_seed(0)
    layer = Interaction(2, 6, (5, 3, 4, 7), kernel=7, dilation=2).double()
    grids = ((4, 6), (8, 12), (4, 6), (2, 3))
    sources = [
        (torch.randn(2, rows * columns, width, dtype=torch.float64), (rows, columns))
        for (rows, columns), width in zip(grids, (5, 3, 4, 7))
    ]
    below, fine, own, coarse = (tokens.unflatten(1, grid) for tokens, grid in sources)
    fine = fine.view(2, 4, 2, 6, 2, 3).mean(dim=(2, 4))
    coarse = finer_by_hand(finer_by_hand(coarse, 4, 1), 6, 2)
    joined = torch.cat((below, fine, own, coarse), dim=-1)
    x = joined @ torch.cat([one.weight for one in layer.sources], dim=1).mT + layer.sources[0].bias
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    read = normed @ layer.enter.weight.mT + layer.enter.bias
    read = read * (1 + torch.erf(read / 2**0.5)) / 2
    weighed = layer.large(read.movedim(-1, 1)).movedim(1, -1)
    right = x + weighed @ layer.leave.weight.mT + layer.leave.bias
    assert torch.allclose(layer(sources, (4, 6)), right.flatten(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_scale_reaches_every_skip(stage: int) -> None:
    net = make()
    x = torch.randn(1, 2, 32, 32)
    before = net(x)
    for level in net.levels:
        kept = level.interaction.sources[1 + stage].weight.detach().clone()
        with torch.no_grad():
            level.interaction.sources[1 + stage].weight.zero_()
            assert (net(x) - before).abs().max() > 1e-3
            level.interaction.sources[1 + stage].weight.copy_(kept)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("mixer", ["softmax", "swin"])
def test_other_mixers(mixer: str) -> None:
    net = make(3, mixer=mixer)
    assert {type(b.attention).info.name for b in net.modules() if hasattr(b, "use_grid")} == {mixer}
    x = torch.randn(1, 2, 16, 16, 16)
    assert net(x).shape == (1, 3, 16, 16, 16)
    assert net.attention(x) == {}
    assert [tuple(found.shape) for found in make(3).attention(x).values()] == [(1, 16, 16, 16)]


def test_tokens_and_images_are_the_same() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(as_image(as_tokens(x), (4, 5, 6)), x)


@pytest.mark.parametrize("options", [{"kernel": 3}, {"dilation": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kernel must be larger than dilation"):
        make(**options)


def test_the_dilated_convolution_stays_out_of_autocast() -> None:
    """Its gradient in bfloat16 has held NaN; around it mixed precision goes on."""
    torch.manual_seed(0)
    layer = LargeKernelAttention(2, 8, kernel=21, dilation=3)
    x = torch.randn(2, 8, 12, 10)
    dtypes = {}
    for name, module in layer.named_children():
        module.register_forward_hook(lambda _, seen, out, name=name: dtypes.update({name: (seen[0].dtype, out.dtype)}))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert dtypes["near"][1] is dtypes["mix"][1] is torch.bfloat16
    assert dtypes["far"] == (torch.float32, torch.float32)
    right = layer(x)
    assert (low.float() - right).abs().max() < 3e-2 * right.abs().max()
