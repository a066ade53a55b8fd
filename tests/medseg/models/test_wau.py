"""Window Attention Upsample: against a loop over pixels, its controls, any size, options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attn_medseg.config import WAUConfig
from attn_medseg.models.base import ImageShape
from attn_medseg.models.wau import UPSAMPLERS, WAUNet, WindowAttentionUpsample


def _shape(ndim: int) -> ImageShape:
    return ImageShape(ndim=ndim, channels=2, classes=3, size=(16,) * ndim)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_loop_over_pixels(ndim: int, shift: int) -> None:
    """Every pixel of the skip connection reads the coarse pixels of its window, by itself."""
    torch.manual_seed(0)
    up = WindowAttentionUpsample(ndim, 6, 4, heads=2, window=2, shift=shift).double()
    attention = up.attention
    with torch.no_grad():
        attention.rpb.zero_()
    coarse_size = (3, 5, 2)[:ndim]
    fine_size = tuple(2 * n for n in coarse_size)
    x = torch.randn(1, 6, *coarse_size).double()
    skip = torch.randn(1, 4, *fine_size).double()
    expected = F.interpolate(up.residual(x), fine_size, mode="bilinear" if ndim == 2 else "trilinear")
    # Cuts stand before every second coarse pixel, `shift` of them before the first.
    window = [[(i + (2 - shift) % 2) // 2 for i in range(n)] for n in coarse_size]
    places = list(itertools.product(*[range(n) for n in coarse_size]))
    for place in itertools.product(*[range(n) for n in fine_size]):
        own = [window[axis][i // 2] for axis, i in enumerate(place)]
        seen = [there for there in places if [window[axis][i] for axis, i in enumerate(there)] == own]
        context = torch.stack([x[(0, slice(None), *there)] for there in seen])
        q = attention.q_proj(skip[(0, slice(None), *place)]).reshape(2, 2)
        k = attention.k_proj(context).reshape(-1, 2, 2)
        v = attention.v_proj(context).reshape(-1, 2, 2)
        weights = (torch.einsum("hd,mhd->hm", q, k) / 2**0.5).softmax(dim=1)
        read = attention.out_proj(torch.einsum("hm,mhd->hd", weights, v).flatten())
        expected[(0, slice(None), *place)] += read
    assert torch.allclose(up(x, skip), expected, atol=1e-12)


def test_the_skip_says_what_is_read() -> None:
    torch.manual_seed(0)
    up = WindowAttentionUpsample(2, 6, 4, heads=2, window=2)
    x, skip = torch.randn(1, 6, 4, 4), torch.randn(1, 4, 8, 8)
    found = up(x, skip)
    other = skip.clone()
    other[..., 0, 0] += 1.0
    changed = (up(x, other) - found).abs().amax(dim=1)[0] > 0
    assert changed[0, 0]
    assert changed.sum() == 1
    other = x.clone()
    other[..., 0, 0] += 1.0
    # The whole window, four by four fine pixels, and nothing outside of it.
    changed = (up(other, skip) - found).abs().amax(dim=1)[0] > 0
    assert changed[:4, :4].all()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLERS)
def test_any_size(upsample: str, ndim: int) -> None:
    torch.manual_seed(0)
    net = WAUNet(WAUConfig(channels=(4, 6, 8), upsample=upsample, window=3), _shape(ndim))
    for size in ((1,) * ndim, (9, 13, 6)[:ndim], (16,) * ndim):
        x = torch.randn(2, 2, *size)
        assert net(x).shape == (2, 3, *size)
        value = net.loss({"image": x, "label": torch.randint(0, 3, (2, *size))}, F.cross_entropy)
        value.backward()
        assert torch.isfinite(value)
    for name, one in net.named_parameters():
        assert one.grad is not None, name
        assert torch.isfinite(one.grad).all(), name


def test_only_the_upsampler_differs() -> None:
    kept: list[set[tuple[str, Any]]] = []
    for upsample in UPSAMPLERS:
        net = WAUNet(WAUConfig(channels=(4, 6, 8), upsample=upsample), _shape(2))
        kept.append({(name, one.shape) for name, one in net.named_parameters() if not name.startswith("ups.")})
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (4,)}, "two levels"),
        ({"upsample": "nearest"}, "upsample is 'nearest'"),
        ({"heads": 0}, "heads and window"),
        ({"window": 0}, "heads and window"),
        ({"norm": "layer"}, "norm is 'layer'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WAUNet(WAUConfig(**options), _shape(2))
