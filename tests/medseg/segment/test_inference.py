"""Windows against MONAI's own inference, flips, slices, and results that lie in a file."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from attn_medseg.segment.inference import probabilities


class Net(nn.Module):
    """Convolutions, with every window it was given."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.conv = make(2, 3, 3, padding=1)
        self.seen: list[torch.Size] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape)
        return self.conv(x)


@pytest.mark.parametrize(
    ("size", "window", "overlap"),
    [
        ((20, 17, 12), (8, 8, 8), 0.25),
        ((20, 17, 12), (8, 16, 12), 0.5),
        ((9, 8, 8), (8, 8, 8), 0.0),
        ((31, 23), (16, 8), 0.25),
        ((8, 40), (8, 16), 0.6),
        ((7, 20, 5), (8, 8, 10), 0.25),
        ((5, 6), (12, 9), 0.0),
    ],
)
def test_windows_are_monais(size: tuple[int, ...], window: tuple[int, ...], overlap: float) -> None:
    from monai.inferers import sliding_window_inference

    net, x = Net(len(size)), torch.randn(2, *size)
    right = sliding_window_inference(
        x[None], window, 3, lambda part: net(part).softmax(1), overlap=overlap, mode="gaussian"
    )
    found = probabilities(net, x, classes=3, window=window, overlap=overlap, batch=3)
    assert found.shape == (3, *size)
    assert (found - right[0].detach()).abs().max() < 1e-5
    assert (found.sum(0) - 1).abs().max() < 1e-5


def test_windows_bound_what_the_network_reads() -> None:
    net = Net(3)
    probabilities(net, torch.randn(2, 40, 30, 20), classes=3, window=(16, 16, 16), batch=2)
    assert all(shape == (2, 2, 16, 16, 16) or shape == (1, 2, 16, 16, 16) for shape in net.seen)
    net.seen.clear()
    probabilities(net, torch.randn(2, 5, 4, 3), classes=3, window=(16, 16, 16))
    assert net.seen == [(1, 2, 16, 16, 16)]


def test_large_results_lie_in_a_file() -> None:
    net, x = Net(3), torch.randn(2, 20, 17, 12)
    options = {"classes": 3, "window": (8, 8, 8)}
    inside = probabilities(net, x, **options)  # type: ignore[arg-type]
    outside = probabilities(net, x, **options, in_memory=0)  # type: ignore[arg-type]
    assert torch.equal(inside, outside)
    assert torch.equal(inside.argmax(0), outside.argmax(0))


def test_flips_are_the_mean() -> None:
    net, x = Net(3), torch.randn(2, 8, 9, 7)
    axes = (0, 2)
    right = torch.zeros(3, 8, 9, 7)
    for chosen in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(3)):
        dims = [1 + axis for axis in chosen]
        right += net(x.flip(dims)[None]).softmax(1)[0].detach().flip(dims) / 4
    found = probabilities(net, x, classes=3, window=(16, 16, 16), flips=axes)
    assert (found - right).abs().max() < 1e-6
    turned = probabilities(net, x.flip(1), classes=3, window=(16, 16, 16), flips=axes).flip(1)
    assert (found - turned).abs().max() < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_one_by_one(axis: int) -> None:
    net, x = Net(2), torch.randn(2, 9, 11, 10)
    found = probabilities(net, x, classes=3, window=(8, 8), slices=axis, batch=4)
    for number in range(x.shape[1 + axis]):
        own = probabilities(net, x.select(1 + axis, number), classes=3, window=(8, 8))
        assert (found.select(1 + axis, number) - own).abs().max() < 1e-6


def test_options_are_checked() -> None:
    net, x = Net(2), torch.randn(2, 8, 8)
    with pytest.raises(ValueError, match="overlap"):
        probabilities(net, x, classes=3, window=(8, 8), overlap=1.0)
    with pytest.raises(ValueError, match="does not fit"):
        probabilities(net, x, classes=3, window=(8, 8, 8))
