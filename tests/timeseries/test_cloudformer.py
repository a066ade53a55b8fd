"""CloudFormer against a plain implementation written apart from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_timeseries.config import CloudFormerConfig
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.cloudformer import CloudFormer

SHAPE = SeriesShape(seq_len=13, label_len=0, pred_len=5, channels=3, marks=2)
SIZES = {"d_model": 8, "n_heads": 2, "e_layers": 2, "d_ff": 12, "dropout": 0.0}


def plain(weights: dict[str, Tensor], x: Tensor, heads: int, layers: int, use_norm: bool) -> Tensor:
    """Written out for one window at a time from the formulas alone."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(value: Tensor) -> Tensor:
        return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))

    def attention(name: str, tokens: Tensor) -> Tensor:
        q, k, v = (linear(f"{name}.{part}_proj", tokens) for part in "qkv")
        width = tokens.shape[1] // heads
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            scores = (q[:, own] @ k[:, own].T / math.sqrt(width)).exp()
            parts.append(scores / scores.sum(1, keepdim=True) @ v[:, own])
        return linear(f"{name}.out_proj", torch.cat(parts, dim=1))

    def encoder(name: str, tokens: Tensor) -> Tensor:
        for i in range(layers):
            tokens = norm(f"{name}.{i}.norm1", tokens + attention(f"{name}.{i}.attention", tokens))
            inner = linear(f"{name}.{i}.feed_forward.down", gelu(linear(f"{name}.{i}.feed_forward.up", tokens)))
            tokens = norm(f"{name}.{i}.norm2", tokens + inner)
        return tokens

    rows = []
    for window in x:
        # The statistics are constants of the window.
        mean, sd = window.detach().mean(0), (window.detach().var(0, correction=0) + 1e-5).sqrt()
        values = (window - mean) / sd if use_norm else window
        size = weights["time_embedding.weight"].shape[0]
        place = torch.zeros(len(window), size, dtype=x.dtype)
        for t in range(len(window)):
            for i in range(0, size, 2):
                angle = t / 10000 ** (i / size)
                place[t, i], place[t, i + 1] = math.sin(angle), math.cos(angle)
        steps = encoder("time_branch", linear("time_embedding", values) + place)
        metrics = encoder("metric_branch", linear("metric_embedding", values.T))
        columns = []
        for c in range(values.shape[1]):
            joint = gelu(linear("join", torch.cat([metrics[c], steps.mean(0)])))
            column = linear("projection", joint)
            columns.append(column * sd[c] + mean[c] if use_norm else column)
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_forecast_and_gradients_equal_the_plain_form(dtype, tolerance, use_norm):
    torch.manual_seed(0)
    model = CloudFormer(CloudFormerConfig(**SIZES, use_norm=use_norm), SHAPE).to(dtype)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4, SHAPE.seq_len, SHAPE.channels, generator=draw, dtype=torch.float64).to(dtype)
    marks = torch.zeros(4, 13, 2, dtype=dtype), torch.zeros(4, 5, 2, dtype=dtype)
    weights = dict(model.named_parameters())
    table = torch.zeros(13, 8, dtype=torch.float64)
    for i in range(0, 8, 2):
        angle = torch.arange(13, dtype=torch.float64) / 10000 ** (i / 8)
        table[:, i], table[:, i + 1] = angle.sin(), angle.cos()
    model.positions = table.to(dtype)  # the model makes its table in float32
    found = []
    for compute in (lambda x: model(x, *marks), lambda x: plain(weights, x, 2, 2, use_norm)):
        model.zero_grad()
        own = x.clone().requires_grad_()
        y = compute(own)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        found.append([y, own.grad, *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def test_positions_are_the_sines_of_the_plain_form():
    model = CloudFormer(CloudFormerConfig(**SIZES), SHAPE)
    assert model.positions[3, 2].item() == pytest.approx(math.sin(3 / 10000 ** (2 / 8)), abs=1e-6)


def test_metrics_in_another_order_give_forecasts_in_that_order_where_steps_are_not_read():
    """The branch over metrics has no order; the one over time reads columns by their weights."""
    torch.manual_seed(0)
    model = CloudFormer(CloudFormerConfig(**SIZES), SHAPE).eval()
    with torch.no_grad():
        model.time_embedding.weight[:] = model.time_embedding.weight[:, :1]
    x, order = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(4)), [2, 0, 1]
    marks = torch.zeros(2, 13, 2), torch.zeros(2, 5, 2)
    assert torch.allclose(model(x, *marks)[..., order], model(x[..., order], *marks), atol=1e-5)


def test_both_branches_matter():
    torch.manual_seed(0)
    model = CloudFormer(CloudFormerConfig(**SIZES), SHAPE)
    x = torch.randn(2, 13, 3)
    model(x, torch.zeros(2, 13, 2), torch.zeros(2, 5, 2)).square().sum().backward()
    for branch in (model.time_branch, model.metric_branch):
        assert all(p.grad.abs().sum() > 0 for name, p in branch.named_parameters() if "k_proj.bias" not in name)


def test_refuses_no_layer():
    with pytest.raises(ValueError, match="e_layers"):
        CloudFormer(CloudFormerConfig(e_layers=0), SHAPE)
