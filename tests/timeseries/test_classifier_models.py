"""The classifiers: the official code's numbers, padding, mixers, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from attn_timeseries.classification.cards import ClassifyTaskConfig
from attn_timeseries.config import FlowformerConfig, TransformerConfig
from attn_timeseries.models.classifier import (
    ClassifyShape,
    FlowformerClassifier,
    SeriesClassifier,
    TransformerClassifier,
)
from attn_timeseries.models.convert import from_official
from attn_timeseries.models.layers import fitting_mixers
from core_attn import registry

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SIZES = {"d_model": 16, "n_heads": 2, "d_ff": 24, "e_layers": 2, "dropout": 0.0}
SHAPE = ClassifyShape(length=13, channels=3, classes=4)


def build(
    cls: type[SeriesClassifier] = FlowformerClassifier, *, mixer: str | None = None, shape=SHAPE, sizes=None, **task
):
    torch.manual_seed(0)
    config = {FlowformerClassifier: FlowformerConfig}.get(cls, TransformerConfig)
    return cls(config(**(SIZES | (sizes or {}))), shape, ClassifyTaskConfig(**task), mixer=mixer)


def batch(size: int = 5, shape: ClassifyShape = SHAPE, *, ragged: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, shape.length, shape.channels, generator=generator)
    lengths = torch.randint(1, shape.length + 1, (size,), generator=generator) if ragged else shape.length
    mask = torch.arange(shape.length) < torch.as_tensor(lengths).reshape(-1, 1).expand(size, 1)
    return x * mask.unsqueeze(-1), mask


# --- the official code ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", ["padded", "full"])
def test_official_logits_and_gradients(case, dtype):
    tensors = load_file(GOLDEN / "timeseries_flowformer_classifier.safetensors")
    note = json.loads((GOLDEN / "timeseries_flowformer_classifier.json").read_text(encoding="utf-8"))["cases"][case]
    own = {key.split(":", 1)[1]: t for key, t in tensors.items() if key.startswith(f"{case}:")}

    def part(prefix):
        return from_official(
            "flowformer_classifier", {k.removeprefix(prefix): t for k, t in own.items() if k.startswith(prefix)}
        )

    model = FlowformerClassifier(
        FlowformerConfig(**note["config"], dropout=0.0),
        ClassifyShape(**note["shape"]),
        ClassifyTaskConfig(**note["task"]),
    )
    model.load_state_dict(part("weight/"))
    model.to(dtype)
    x = own["x"].to(dtype).requires_grad_()
    y = model(x, own["mask"])
    (y * own["w"].to(dtype)).sum().backward()

    def close(ours, official, what):
        assert ours.shape == official.shape, what
        error = (ours.double() - official.double()).abs().max() / official.double().abs().max().clamp(min=1.0)
        assert error <= TOLERANCE[dtype], f"{what}: {error:.1e}"

    close(y, own["eval/y"], "logits")
    if dtype == torch.float32:
        close(y, own["eval/y32"], "logits of the official float32 run")
    close(x.grad, own["eval/grad/x"], "gradient of the series")
    official = part("eval/grad/weight/")
    ours = {key: p.grad for key, p in model.named_parameters()}
    assert set(ours) == set(official)
    for key, grad in ours.items():
        close(grad, official[key], key)


def test_official_padding_changes_the_outcome_and_masked_padding_does_not():
    """The same series padded further: the official code's answer moves, ours with masks stays."""
    longer = ClassifyShape(length=20, channels=3, classes=4)
    x, mask = batch()
    further, more = F.pad(x, (0, 0, 0, 7)), F.pad(mask, (0, 7))
    for padding, same in (("mask", True), ("official", False)):
        short = build(padding=padding, positions="fixed", readout="mean").eval()
        long = build(padding=padding, positions="fixed", readout="mean", shape=longer).eval()
        long.load_state_dict(short.state_dict())
        assert torch.allclose(short(x, mask), long(further, more), atol=1e-5) is same


# --- padding and batches ---


@pytest.mark.parametrize("readout", ["flatten", "mean"])
@pytest.mark.parametrize("cls", [FlowformerClassifier, TransformerClassifier])
def test_what_lies_under_the_padding_changes_nothing(cls, readout):
    model = build(cls, readout=readout).eval()
    x, mask = batch()
    y = model(x, mask)
    for value in (1e3, float("nan")):
        assert torch.equal(model(torch.where(mask.unsqueeze(-1), x, value), mask), y)


@pytest.mark.parametrize("cls", [FlowformerClassifier, TransformerClassifier])
def test_independent_of_the_batch(cls):
    model = build(cls).eval()
    x, mask = batch()
    together = model(x, mask)
    for i in range(len(x)):
        assert torch.allclose(model(x[i : i + 1], mask[i : i + 1]), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("task", [{}, {"positions": "fixed"}, {"readout": "mean"}, {"padding": "official"}])
@pytest.mark.parametrize("cls", [FlowformerClassifier, TransformerClassifier])
def test_every_parameter_gets_a_gradient(cls, task):
    model = build(cls, **task)
    x, mask = batch()
    model(x, mask).square().sum().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of the keys shifts all scores of a query alike, which a softmax does not see.
    assert [key for key in silent if not key.endswith("k_proj.bias")] == []


def test_training_lowers_the_loss():
    model = build()
    x, mask = batch(16)
    y = torch.arange(16) % 4
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x, mask), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --- mixers ---


@pytest.mark.parametrize("mixer", fitting_mixers())
def test_every_mixer_that_fits(mixer):
    heads = {"n_heads": 2}
    full = ClassifyShape(length=13, channels=3, classes=4, ragged=False)
    if registry.get(mixer).info.padding:
        model, inputs = build(mixer=mixer, sizes=heads), batch()
    else:
        with pytest.raises(ValueError, match="padding official"):
            build(mixer=mixer, sizes=heads)
        model, inputs = build(mixer=mixer, sizes=heads, shape=full), batch(ragged=False)
    y = model(*inputs)
    assert y.shape == (5, 4)
    assert torch.isfinite(y).all()
    y.sum().backward()


def test_short_series_with_a_mixer_that_cannot_leave_padding_out():
    mixer = next(name for name in fitting_mixers() if not registry.get(name).info.padding)
    model = build(mixer=mixer, shape=ClassifyShape(length=13, channels=3, classes=4, ragged=False))
    with pytest.raises(ValueError, match="cannot leave padding out"):
        model(*batch())


# --- refusals ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
    ],
)
def test_shape_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ClassifyShape(**({"length": 5, "channels": 1, "classes": 2} | wrong))


def test_refuses_other_shapes_and_no_layer():
    x, mask = batch()
    with pytest.raises(ValueError, match=r"built for series of shape \(B, 13, 3\)"):
        build()(x[:, :12], mask[:, :12])
    with pytest.raises(ValueError, match="e_layers"):
        build(sizes={"e_layers": 0})
