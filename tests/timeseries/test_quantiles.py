"""The quantile head: ordered, around the model's own forecast, for every model; noise that depends on the input."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_shared.app import load
from attn_timeseries.config import MODELS
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.quantiles import QuantileModel, pinball

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
SHAPE = SeriesShape(seq_len=24, label_len=12, pred_len=8, channels=3, marks=4, season=4)
FORECASTERS = [name for name, card in MODELS.items() if card.trainable and "forecast" in (card.kinds or ("forecast",))]
SMALL = {"d_model": 16, "d_ff": 16, "n_heads": 2, "moving_avg": 5}


def build(name: str) -> nn.Module:
    kind = MODELS[name].config
    sizes = {key: value for key, value in SMALL.items() if key in kind.__dataclass_fields__}
    torch.manual_seed(0)
    try:
        return load(MODELS[name].target)(kind(**sizes), SHAPE)
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")


def inputs(batch: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    sizes = [(24, 3), (24, 4), (20, 4)]
    return tuple(torch.randn(batch, *size, generator=g).to(dtype) for size in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORECASTERS)
def test_every_model_gets_ordered_quantiles_around_its_own_forecast(name: str) -> None:
    base = build(name)
    model = QuantileModel(base, SHAPE, LEVELS)
    nn.init.normal_(model.out.weight, std=0.3)  # a trained head
    base.eval(), model.eval()
    x = inputs()
    torch.manual_seed(3)  # some mechanisms draw
    quantiles = model(*x)
    assert quantiles.shape == (5, 8, 3, 5)
    assert (quantiles.diff(dim=-1) > 0).all()
    torch.manual_seed(3)
    torch.testing.assert_close(quantiles[..., 2], base(*x), rtol=0, atol=0)


def test_all_of_it_learns() -> None:
    model = QuantileModel(build("dlinear"), SHAPE, LEVELS)
    pinball(model(*inputs()), torch.randn(5, 8, 3), torch.tensor(LEVELS)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bias.grad.abs().min() > 0
    assert model.out.weight.grad.abs().max() > 0


def test_at_first_the_quantiles_are_those_of_a_normal_distribution() -> None:
    model = QuantileModel(build("dlinear"), SHAPE, LEVELS).double()
    x, *marks = inputs(dtype=torch.float64)
    quantiles = model(x, *marks)
    expected = torch.tensor([0.5 * NormalDist().inv_cdf(level) for level in LEVELS], dtype=torch.float64)
    scale = x.std(dim=1, correction=0)[:, None, :, None] + nn.functional.softplus(torch.tensor(-2.25).double())
    torch.testing.assert_close(
        quantiles - quantiles[..., 2:3], (expected * scale).expand_as(quantiles), atol=1e-6, rtol=1e-6
    )


def test_a_flat_look_back_has_quantiles_still() -> None:
    model = QuantileModel(build("dlinear"), SHAPE, LEVELS)
    _, *marks = inputs()
    quantiles = model(torch.full((5, 24, 3), 2.0), *marks)
    assert quantiles.isfinite().all()
    assert (quantiles.diff(dim=-1) > 1e-3).all()


def test_pinball_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    q, y = rng.normal(size=(7, 4, 2, 5)), rng.normal(size=(7, 4, 2))
    found = pinball(torch.from_numpy(q), torch.from_numpy(y), torch.tensor(LEVELS, dtype=torch.float64))
    for k, level in enumerate(LEVELS):
        error = y - q[..., k]
        expected = 2 * np.where(error >= 0, level * error, (level - 1) * error)
        np.testing.assert_allclose(found[..., k], expected, rtol=1e-12)
    np.testing.assert_allclose(found[..., 2], np.abs(y - q[..., 2]), rtol=1e-12)


def test_it_learns_that_noise_grows_with_the_swing_of_the_window() -> None:
    """Targets are 0 plus noise of the look-back's deviation, and twice that at the last step."""
    shape = SeriesShape(seq_len=12, label_len=0, pred_len=2, channels=1, marks=0)

    class Zero(nn.Module):
        def forward(self, x: Tensor, *marks: Any) -> Tensor:
            return x.new_zeros(len(x), 2, 1)

    torch.manual_seed(0)
    model = QuantileModel(Zero(), shape, LEVELS)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        size = 0.2 + 3 * torch.rand(count, 1, 1, generator=g)
        noise = torch.tensor([1.0, 2.0])[:, None] * torch.randn(count, 2, 1, generator=g)
        return size * torch.randn(count, 12, 1, generator=g), size * noise

    for _ in range(400):
        x, y = draw(256)
        optimiser.zero_grad()
        pinball(model(x, x, x), y, torch.tensor(LEVELS)).mean().backward()
        optimiser.step()
    x, y = draw(4000)
    with torch.no_grad():
        below = (y.unsqueeze(-1) <= model(x, x, x)).float()
    torch.testing.assert_close(below.mean(dim=(0, 2)), torch.tensor(LEVELS).expand(2, 5), atol=0.03, rtol=0)
    calm = x.std(dim=1).flatten().argsort()[:1000]  # also of the calmest quarter
    torch.testing.assert_close(below[calm].mean(dim=(0, 2)), torch.tensor(LEVELS).expand(2, 5), atol=0.06, rtol=0)
