"""Every forecasting model: shapes, gradients, mixers, determinism, what it may see, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import core_attn
from attn_shared.app import load
from attn_timeseries.config import MODELS, PatchTSTConfig
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.layers import (
    ChannelLinear,
    SeriesDecomposition,
    WindowNorm,
    fitting_mixers,
    neighbours,
)
from core_attn import registry

SHAPE = SeriesShape(seq_len=24, label_len=12, pred_len=12, channels=3, marks=4, season=6)
SIZES = {
    "d_model": 16,
    "d_ff": 24,
    "n_heads": 2,
    "e_layers": 2,
    "d_layers": 1,
    "moving_avg": 7,
    "patch_len": 8,
    "stride": 4,
}
FORECASTERS = {name: card for name, card in MODELS.items() if "forecast" in (card.kinds or ("forecast",))}
ATTENTION = [name for name, card in FORECASTERS.items() if card.mixer]
TRAINABLE = [name for name, card in FORECASTERS.items() if card.trainable]
NAIVE = [name for name, card in FORECASTERS.items() if not card.trainable]


def build(name: str, shape: SeriesShape = SHAPE, mixer: str | None = None, **options) -> torch.nn.Module:
    card = MODELS[name]
    known = {field.name for field in dataclasses.fields(card.config)}
    config = card.config(**{key: value for key, value in (SIZES | options).items() if key in known})
    torch.manual_seed(0)
    return load(card.target)(config, shape, mixer=mixer)


def batch(shape: SeriesShape = SHAPE, size: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.rand(*sizes, generator=generator, dtype=torch.float64).to(dtype) - 0.5

    return (
        draw(size, shape.seq_len, shape.channels).cumsum(dim=1),
        draw(size, shape.seq_len, shape.marks),
        draw(size, shape.label_len + shape.pred_len, shape.marks),
    )


# --- every model ---


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="even"),
        pytest.param({"seq_len": 29, "label_len": 13, "pred_len": 17}, id="odd"),
        pytest.param({"channels": 1}, id="one-channel"),
        pytest.param({"pred_len": 53}, id="longer-than-look-back"),
        pytest.param({"label_len": 0}, id="no-decoder-start"),
        pytest.param({"marks": 0}, id="no-calendar"),
        pytest.param({"pred_len": 1}, id="one-step"),
    ],
)
@pytest.mark.parametrize("name", FORECASTERS)
def test_shapes(name, shape):
    shape = dataclasses.replace(SHAPE, **shape)
    y = build(name, shape)(*batch(shape))
    assert y.shape == (2, shape.pred_len, shape.channels)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    model(*batch()).square().sum().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of the keys shifts all scores of a query alike, which a softmax does not see.
    assert [key for key in silent if not key.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_lowers_the_loss(name):
    model, inputs = build(name, dropout=0.0), batch(size=8)
    target = inputs[0][:, -SHAPE.pred_len :] * 0.5
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.mse_loss(model(*inputs), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", FORECASTERS)
def test_evaluation_is_deterministic_and_independent_of_the_batch(name):
    model = build(name).eval()
    inputs = batch(size=5)
    with torch.no_grad():
        together = model(*inputs)
        assert torch.equal(together, model(*inputs))
        for i in range(5):
            assert torch.allclose(model(*(t[i : i + 1] for t in inputs)), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_is_decided_by_the_seed(name):
    model, inputs = build(name), batch()
    torch.manual_seed(3)
    first = model(*inputs)
    torch.manual_seed(3)
    assert torch.equal(first, model(*inputs))


@pytest.mark.parametrize("name", TRAINABLE)
def test_state_dict_round_trip(name):
    model, inputs = build(name), batch()
    model(*inputs)  # running statistics move
    other = load(MODELS[name].target)(model.config, SHAPE)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(*inputs), other.eval()(*inputs))


@pytest.mark.parametrize("name", TRAINABLE)
def test_float64(name):
    model = build(name, dropout=0.0).eval()
    with torch.no_grad():
        single = model(*batch())
        double = model.double()(*batch(dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)


@pytest.mark.parametrize("name", TRAINABLE)
def test_works_in_inference_mode_and_trains_afterwards(name):
    model, inputs = build(name), batch()
    with torch.inference_mode():
        model.eval()(*inputs)
    model.train()(*inputs).sum().backward()


@pytest.mark.parametrize("name", FORECASTERS)
def test_wrong_shapes_are_refused_in_a_sentence(name):
    model, (x, x_mark, y_mark) = build(name), batch()
    with pytest.raises(ValueError, match=r"built for x of shape \(B, 24, 3\), got \(2, 23, 3\)"):
        model(x[:, 1:], x_mark, y_mark)
    with pytest.raises(ValueError, match="built for x_mark"):
        model(x, x_mark[..., 1:], y_mark)
    with pytest.raises(ValueError, match="built for y_mark"):
        model(x, x_mark, y_mark[:, 1:])


# --- mixers ---


@pytest.mark.parametrize("mixer", fitting_mixers())
@pytest.mark.parametrize("name", ATTENTION)
def test_every_fitting_mixer_trains_in_every_model(name, mixer):
    model, inputs = build(name, mixer=mixer), batch()
    y = model(*inputs)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    mixers = [m for m in model.modules() if isinstance(m, core_attn.TokenMixer)]
    assert any(m.info.name.removeprefix("residual_") == mixer for m in mixers)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(model.eval()(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ATTENTION)
def test_the_papers_own_mixer_by_name_is_the_default(name):
    inputs = batch()
    default, named = build(name).eval(), build(name, mixer=MODELS[name].mixer).eval()
    assert torch.equal(default(*inputs), named(*inputs))


@pytest.mark.parametrize("name", ["transformer", "informer"])
def test_decoder_self_attention_is_causal_where_the_mixer_can_be(name):
    for mixer in fitting_mixers():
        attention = build(name, mixer=mixer).decoder[0].attention
        assert attention.causal == registry.get(mixer).info.supports(causal=True, cross=False)


def test_cross_attention_follows_the_mixer_where_it_has_a_cross_pattern():
    for mixer in fitting_mixers():
        expected = mixer if mixer in fitting_mixers(cross=True) else "softmax"
        assert build("transformer", mixer=mixer).decoder[0].cross_attention.info.name == expected
        assert build("autoformer", mixer=mixer).decoder[0].cross_attention.info.name == expected
        assert build("informer", mixer=mixer).decoder[0].cross_attention.info.name == "softmax"


def test_mixer_options_reach_the_mixer():
    card = MODELS["autoformer"]
    model = load(card.target)(card.config(d_model=16, d_ff=16), SHAPE, mixer_args={"factor": 2})
    assert {m.factor for m in model.modules() if isinstance(m, core_attn.TokenMixer)} == {2}


def test_unknown_and_unfit_mixers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        build("autoformer", mixer="sofmax")
    flow = registry.get("flow")
    causal_only = dataclasses.replace(flow.info, patterns=frozenset({core_attn.Pattern.CAUSAL_SELF}))
    monkeypatch.setattr(flow, "info", causal_only)
    with pytest.raises(ValueError, match=r"flow cannot compute noncausal self attention.*auto_correlation.*softmax"):
        build("itransformer", mixer="flow")  # its tokens are variates, in no order of time


@pytest.mark.parametrize("name", [name for name in FORECASTERS if name not in ATTENTION])
def test_models_without_attention_take_no_mixer(name):
    with pytest.raises(ValueError, match="takes no mixer"):
        build(name, mixer="softmax")


def test_patchtst_without_residual_scores_is_plain_softmax():
    plain = build("patchtst", res_attention=False)
    assert {type(layer.attention).__name__ for layer in plain.encoder} == {"SoftmaxAttention"}
    first = build("patchtst", e_layers=1)
    plain = build("patchtst", e_layers=1, res_attention=False)
    plain.load_state_dict(first.state_dict())  # the first layer has no scores before it
    assert torch.allclose(plain.eval()(*batch()), first.eval()(*batch()), atol=1e-6)
    with pytest.raises(ValueError, match="set res_attention to false"):
        load(MODELS["patchtst"].target)(PatchTSTConfig(), SHAPE, mixer_args={"window": 3})


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_maps_can_be_read(name):
    model, inputs = build(name).eval(), batch()
    expected = model(*inputs)
    with core_attn.capture(model) as maps:
        assert torch.equal(model(*inputs), expected)
    assert len(maps) >= 2
    # Rows of these mechanisms' maps are averages or cumulated values, so none is all zero.
    assert all((m.abs().sum(dim=-1) > 0).all() for m in maps.values())


def test_captured_maps_of_patchtst_hold_the_residual_scores():
    model, inputs = build("patchtst").eval(), batch()
    with core_attn.capture(model) as maps, torch.no_grad():
        model(*inputs)
        x, _ = model.norm_window(inputs[0])
        patches = torch.cat([x, x[:, -1:].repeat(1, 4, 1)], dim=1).transpose(1, 2).flatten(0, 1).unfold(-1, 8, 4)
        tokens = model.patch_embedding(patches) + model.positions
        scores = None
        for i, layer in enumerate(model.encoder):
            q, k = (layer.attention.split_heads(p(tokens)) for p in (layer.attention.q_proj, layer.attention.k_proj))
            before, scores = scores, q @ k.transpose(-2, -1) / 8**0.5 + (0 if scores is None else scores)
            assert torch.allclose(maps.calls[f"encoder.{i}.attention"][0], scores.softmax(dim=-1), atol=1e-5)
            tokens, _ = layer(tokens, before)


# --- what single models promise ---


def test_naive_forecasts():
    x, x_mark, y_mark = batch()
    assert torch.equal(build("naive")(x, x_mark, y_mark), x[:, -1:].expand(-1, 12, -1))
    y = build("seasonal_naive")(x, x_mark, y_mark)
    assert torch.equal(y, torch.cat([x[:, -6:], x[:, -6:]], dim=1))
    y = build("seasonal_naive", season=5)(x, x_mark, y_mark)
    assert torch.equal(y, torch.cat([x[:, -5:], x[:, -5:], x[:, -5:-3]], dim=1))
    too_long = build("seasonal_naive", season=25)(x, x_mark, y_mark)
    assert torch.equal(too_long, x[:, -1:].expand(-1, 12, -1))


@pytest.mark.parametrize("individual", [False, True])
def test_dlinear_is_linear_in_the_window(individual):
    model = build("dlinear", individual=individual).double()
    x, x_mark, y_mark = batch(dtype=torch.float64)
    z = x.flip(1)
    bias = model(torch.zeros_like(x), x_mark, y_mark)
    mixed = model(2 * x - 3 * z, x_mark, y_mark) - bias
    assert torch.allclose(mixed, 2 * (model(x, x_mark, y_mark) - bias) - 3 * (model(z, x_mark, y_mark) - bias))
    if individual:
        changed = x.clone()
        changed[..., 0] += 1
        assert torch.equal(model(changed, x_mark, y_mark)[..., 1:], model(x, x_mark, y_mark)[..., 1:])


@pytest.mark.parametrize("name", ["itransformer", "patchtst", "naive", "seasonal_naive"])
def test_forecasts_follow_the_level_and_scale_of_the_window(name):
    model = build(name).eval().double()
    x, x_mark, y_mark = batch(dtype=torch.float64)
    expected = 7 * model(x, x_mark, y_mark) + 100
    assert torch.allclose(model(7 * x + 100, x_mark, y_mark), expected, rtol=1e-4)


def test_autoformer_trend_follows_the_level():
    """The level of the look-back is in the trend stream alone, which is added to the forecast as it is."""
    model = build("autoformer").eval().double()
    x, x_mark, y_mark = batch(dtype=torch.float64)
    for embedding in (model.encoder_embedding, model.decoder_embedding):
        embedding.token.weight.data.zero_()
    moved = model(x + 5, x_mark, y_mark) - model(x, x_mark, y_mark)
    assert torch.allclose(moved, torch.full_like(moved, 5.0))


def test_autoformer_delays_come_from_the_batch_in_training_only():
    model = build("autoformer", dropout=0.0)
    inputs = batch(size=4)
    alone = [t[:1] for t in inputs]
    assert torch.allclose(model.eval()(*inputs)[:1], model(*alone), atol=1e-6)
    assert not torch.allclose(model.train()(*inputs)[:1], model(*alone), atol=1e-4)


@pytest.mark.parametrize(("steps", "left"), [(24, 12), (25, 13), (2, 1), (1, 1)])
def test_informer_distilling_halves_the_sequence(steps, left):
    distil = build("informer").distil[0].eval().double()
    x = torch.randn(2, steps, 16, dtype=torch.float64)
    weight = distil.conv.weight.unflatten(1, (3, 16)).transpose(1, 2)
    conv = F.conv1d(F.pad(x.transpose(1, 2), (1, 1), mode="circular"), weight, distil.conv.bias)
    expected = F.max_pool1d(F.elu(distil.norm(conv)), kernel_size=3, stride=2, padding=1).transpose(1, 2)
    assert distil(x).shape == (2, left, 16)
    assert torch.allclose(distil(x), expected)


def test_the_decoder_sees_only_its_start_and_the_calendar():
    for name in ("autoformer", "informer", "transformer", "flowformer"):
        model, x = build(name), batch()[0]
        decoder = model.decoder_values(x)
        assert torch.equal(decoder[:, :12], x[:, 12:])
        assert torch.equal(decoder[:, 12:], torch.zeros(2, 12, 3))


# --- shared parts ---


@pytest.mark.parametrize("kernel", [1, 7, 25])
@pytest.mark.parametrize("steps", [1, 24, 61, 257])
def test_decomposition_is_a_moving_average_with_extended_ends(steps, kernel):
    x = torch.randn(2, steps, 3, dtype=torch.float64)
    half = kernel // 2
    extended = torch.cat([x[:, :1].expand(-1, half, -1), x, x[:, -1:].expand(-1, half, -1)], dim=1)
    expected = torch.stack([extended[:, i : i + kernel].mean(dim=1) for i in range(steps)], dim=1)
    for decomposition in (SeriesDecomposition(kernel), SeriesDecomposition(kernel, steps)):
        remainder, trend = decomposition.double()(x)
        assert torch.allclose(trend, expected, atol=1e-12)
        assert torch.allclose(remainder, x - expected, atol=1e-12)


def test_decomposition_is_accurate_in_float32_far_from_zero():
    x = 1e4 + torch.randn(2, 4096, 3, dtype=torch.float64)
    for decomposition in (SeriesDecomposition(25), SeriesDecomposition(25, 4096)):
        error = decomposition(x.float())[0].double() - decomposition(x)[0]
        assert error.abs().max() < 5e-3  # float32 resolves 1e4 to 1e-3


def test_neighbours_wrap_around():
    x = torch.arange(4.0).view(1, 4, 1)
    assert neighbours(x).squeeze(0).tolist() == [[3, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 0]]


def test_window_norm_undoes_itself():
    x = torch.randn(2, 24, 3) * 5 + 7
    for norm in (WindowNorm(3), WindowNorm(3, affine=True), WindowNorm(3, subtract_last=True)):
        normed, statistics = norm(x)
        assert torch.allclose(norm.undo(normed, statistics), x, atol=1e-4)
    assert torch.isfinite(WindowNorm(3)(torch.ones(2, 24, 3))[0]).all()


def test_channel_linear_one_map_a_channel():
    layer, x = ChannelLinear(3, 5, 4), torch.randn(2, 5, 3)
    for c in range(3):
        assert torch.allclose(layer(x)[..., c], F.linear(x[..., c], layer.weight[c], layer.bias[c]), atol=1e-6)


# --- what is refused ---


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"pred_len": 0}, "pred_len must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"season": 0}, "season must be at least 1"),
        ({"label_len": 25}, "cannot exceed seq_len"),
    ],
)
def test_impossible_problems(shape, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **shape)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("autoformer", {"moving_avg": 24}, "odd number"),
        ("dlinear", {"moving_avg": 0}, "odd number"),
        ("informer", {"n_heads": 3}, "heads must divide dim"),
        ("transformer", {"d_layers": 0}, "d_layers must be at least 1"),
        ("patchtst", {"patch_len": 25}, "patch_len must lie between"),
        ("patchtst", {"stride": 0}, "stride be at least 1"),
        ("itransformer", {"dropout": 1.5}, "dropout must lie in"),
        ("seasonal_naive", {"season": -1}, "season must be 0"),
    ],
)
def test_impossible_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_the_list_of_models_imports_no_torch():
    code = "import sys, attn_timeseries.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", FORECASTERS)
def test_cards_name_what_exists(name):
    card = MODELS[name]
    assert callable(load(card.target))
    assert card.mixer is None or card.mixer in fitting_mixers()
    assert card.config() == card.config()
