"""Every EEG model: shapes, gradients, mixers, determinism, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import core_attn
from attn_eeg.config import MODELS
from attn_eeg.models.base import EegShape
from attn_shared.app import load
from attn_shared.compare import fitting

FEATURES = EegShape(channels=7, features=4, samples=0, classes=3)
RAW = EegShape(channels=7, features=0, samples=96, classes=3)
SIZES = {
    "rbtransformer": {"embed_dim": 16, "depth": 2, "heads": 3, "head_dim": 8, "mlp_hidden_dim": 24},
    "mlp": {"hidden": 16},
    "eegnet": {"F1": 4, "kernel_length": 16, "depthwise_kernel_length": 8},
}
ATTENTION = [name for name, card in MODELS.items() if card.mixer]


def shape_of(name: str) -> EegShape:
    return RAW if name == "eegnet" else FEATURES


def build(name: str, shape: EegShape | None = None, mixer: str | None = None, mixer_args=None, **options):
    card = MODELS[name]
    torch.manual_seed(0)
    config = card.config(**SIZES.get(name, {}) | options)
    return load(card.target)(config, shape or shape_of(name), mixer=mixer, mixer_args=mixer_args)


def batch(name: str, size: int = 5, shape: EegShape | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = shape or shape_of(name)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, shape.channels, shape.width, generator=generator, dtype=torch.float64).to(dtype)


# --- every model ---


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="plain"),
        pytest.param({"channels": 1}, id="one-electrode"),
        pytest.param({"channels": 62}, id="seed-electrodes"),
        pytest.param({"classes": 9}, id="nine-classes"),
        pytest.param({"width": 61}, id="odd-width"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_shapes(name, change):
    change = dict(change)
    if "width" in change:
        change["samples" if name == "eegnet" else "features"] = change.pop("width")
    shape = dataclasses.replace(shape_of(name), **change)
    y = build(name, shape)(batch(name, shape=shape))
    assert y.shape == (5, shape.classes)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    model(batch(name)).square().sum().backward() if name != "linear" else model(batch(name)).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss(name):
    options = {} if name == "linear" else {"dropout": 0.0}
    model, x = build(name, **options), batch(name, 24)
    target = torch.arange(24) % 3
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_deterministic_and_independent_of_the_batch(name):
    model, x = build(name).eval(), batch(name)
    with torch.no_grad():
        together = model(x)
        assert torch.equal(together, model(x))
        for i in range(len(x)):
            assert torch.allclose(model(x[i : i + 1]), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_decided_by_the_seed(name):
    model, x = build(name), batch(name)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name):
    model, x = build(name), batch(name)
    model(x)  # running statistics move
    other = load(MODELS[name].target)(model.config, shape_of(name))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_float64(name):
    model, x = build(name).eval(), batch(name, dtype=torch.float64)
    with torch.no_grad():
        single = model(x.float())
        double = model.double()(x)
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_wrong_shapes_are_refused_in_a_sentence(name):
    model, x = build(name), batch(name)
    for wrong in (x[:, 1:], x[..., 1:], x[0]):
        with pytest.raises(ValueError, match=r"was built for windows of shape \(B, 7, "):
            model(wrong)


# --- mixers ---


@pytest.mark.parametrize("mixer", fitting(MODELS["rbtransformer"]))
def test_every_fitting_mixer_trains(mixer):
    model, x = build("rbtransformer", mixer=mixer), batch("rbtransformer")
    y = model(x)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert {block.attention.info.name for block in model.blocks} == {mixer}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ATTENTION)
def test_the_papers_own_mixer_by_name_is_the_default(name):
    x = batch(name)
    assert torch.equal(build(name).eval()(x), build(name, mixer=MODELS[name].mixer).eval()(x))


def test_mixer_options_reach_the_mixer_and_unknown_ones_are_refused():
    model = build("rbtransformer", mixer_args={"kv_heads": 1, "dropout": 0.0})
    mixer = model.blocks[0].attention
    assert (mixer.kv_heads, mixer.dropout, mixer.k_proj.out_features) == (1, 0.0, 8)
    assert model(batch("rbtransformer")).shape == (5, 3)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        build("rbtransformer", mixer_args={"windw": 3})
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        build("rbtransformer", mixer="sofmax")


def test_the_configured_dropout_reaches_the_attention_weights():
    model = build("rbtransformer", dropout=0.25)
    assert {block.attention.dropout for block in model.blocks} == {0.25}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ATTENTION])
def test_models_without_attention_take_no_mixer(name):
    with pytest.raises(ValueError, match="takes no mixer"):
        build(name, mixer="softmax")


def test_attention_maps_are_electrode_by_electrode():
    model, x = build("rbtransformer").eval(), batch("rbtransformer")
    expected = model(x)
    with core_attn.capture(model) as maps:
        assert torch.equal(model(x), expected)
    assert len(maps) == 2
    for one in maps.values():
        assert one.shape == (5, 3, 7, 7)
        assert torch.allclose(one.sum(dim=-1), torch.ones(5, 3, 7), atol=1e-5)


# --- what single models promise ---


def test_rbtransformer_knows_which_electrode_is_which():
    model, x = build("rbtransformer").eval(), batch("rbtransformer")
    turned = x.roll(1, dims=1)
    assert not torch.allclose(model(x), model(turned), atol=1e-4)
    model.identity.data.zero_()
    assert torch.allclose(model(x), model(turned), atol=1e-5)


def test_eegnet_keeps_its_norms_and_the_length():
    model, x = build("eegnet", pool1=1, pool2=1).eval(), batch("eegnet")
    assert model.dense.in_features == 8 * 96
    limited = torch.renorm(model.spatial.weight.detach(), 2, 0, 1.0)
    before = model(x)
    model.spatial.weight.data = 5 * limited / limited.flatten(1).norm(dim=1)[:, None, None, None]
    after = model(x)
    model.spatial.weight.data *= 2
    assert torch.allclose(model(x), after, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-4)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "at least 1 electrode"),
        ({"classes": 1}, "at least 2 classes"),
        ({"samples": 5}, "either features or samples"),
        ({"features": 0}, "either features or samples"),
        ({"channel_names": ("Cz",)}, "1 names were given for 7 electrodes"),
    ],
)
def test_impossible_problems(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FEATURES, **change)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("rbtransformer", None, {"depth": 0}, "depth must be at least 1"),
        ("rbtransformer", None, {"dropout": 1.0}, "dropout must lie in"),
        ("rbtransformer", RAW, {}, "set data_args.features to bde"),
        ("mlp", None, {"depth": 0}, "must be at least 1"),
        ("mlp", None, {"dropout": -0.1}, "dropout must lie in"),
        ("eegnet", None, {"F1": 0}, "F1 must be at least 1"),
        ("eegnet", None, {"max_norm": 0.0}, "above 0"),
        ("eegnet", None, {"pool1": 50}, "is too short for poolings of 50 and 8"),
        ("eegnet", FEATURES, {}, "set data_args.features to raw"),
    ],
)
def test_impossible_options(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, shape, **options)


def test_the_list_of_models_imports_no_torch():
    code = "import sys, attn_eeg.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_cards_name_what_exists(name):
    card = MODELS[name]
    assert callable(load(card.target))
    assert card.mixer is None or card.mixer in fitting(card)
    assert card.config() == card.config()
