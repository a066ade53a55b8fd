"""Mechanisms with only a causal form, such as the memory of Titans (S127), where tokens lie in order of time."""

from __future__ import annotations

import pytest
import torch

import core_attn
from attn_shared.app import load
from attn_timeseries.classification.cards import ClassifyTaskConfig
from attn_timeseries.config import MODELS, FlowformerConfig
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.classifier import ClassifyShape, FlowformerClassifier
from attn_timeseries.models.layers import fitting_mixers, self_mixer

SHAPE = SeriesShape(seq_len=24, label_len=12, pred_len=6, channels=2, marks=3)
IN_TIME = [name for name, card in MODELS.items() if card.mixer_alternatives]
ONLY_CAUSAL = [name for name in fitting_mixers(causal=True) if name not in fitting_mixers()]
SIZES = {"d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 2, "d_layers": 1, "patch_len": 6, "stride": 3}


def build(name: str, mixer: str) -> torch.nn.Module:
    card = MODELS[name]
    known = card.config.__dataclass_fields__
    torch.manual_seed(0)
    return load(card.target)(
        card.config(**{k: v for k, v in SIZES.items() if k in known}, dropout=0.0), SHAPE, mixer=mixer
    )


def test_who_takes_them():
    assert set(IN_TIME) == {"transformer", "flowformer", "patchtst"}
    assert {"titans", "retention", "gla"} <= set(ONLY_CAUSAL)


@pytest.mark.parametrize("mixer", ONLY_CAUSAL)
@pytest.mark.parametrize("name", IN_TIME)
def test_every_causal_mechanism_trains(name, mixer):
    model = build(name, mixer)
    draw = torch.Generator().manual_seed(1)
    x, x_mark, y_mark = (
        torch.randn(3, steps, width, generator=draw)
        for steps, width in ((24, SHAPE.channels), (24, SHAPE.marks), (18, SHAPE.marks))
    )
    y = model(x, x_mark, y_mark)
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    mixers = [m for m in model.modules() if isinstance(m, core_attn.TokenMixer) and m.info.name == mixer]
    assert len(mixers) >= 2
    assert all(m.causal for m in mixers)


def test_the_encoder_then_looks_only_back():
    model = build("transformer", "titans").eval()
    tokens = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(2))
    later = tokens.clone()
    later[:, 15:] += 1
    assert torch.allclose(model.encode(tokens)[:, :15], model.encode(later)[:, :15], atol=1e-6)
    assert not torch.allclose(model.encode(tokens)[:, 15:], model.encode(later)[:, 15:], atol=1e-3)


def test_classification_of_ragged_series():
    shape = ClassifyShape(length=11, channels=2, classes=3)
    model = FlowformerClassifier(
        FlowformerConfig(d_model=16, d_ff=16, n_heads=2), shape, ClassifyTaskConfig(), mixer="titans"
    ).eval()
    x = torch.randn(2, 11, 2, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(11) < torch.tensor([[11], [4]])
    y = model(x, mask)
    assert torch.equal(model(torch.where(mask.unsqueeze(-1), x, 9.0), mask), y)


def test_unordered_tokens_refuse_them():
    assert not MODELS["itransformer"].takes(("causal_self",))
    with pytest.raises(ValueError, match="titans cannot compute noncausal self attention"):
        self_mixer("titans", 16, 2, options={})
