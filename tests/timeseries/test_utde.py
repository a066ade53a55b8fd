"""UTDE (S198): the official code's numbers, its parts against their definitions, and what it must not depend on.

`tests/golden/timeseries_utde.safetensors` holds what the official code gave; the `.json` beside it names repository,
commit, sizes, and the parameters that stand flat in `weights` and `weight_grads`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attn_timeseries.config import MODELS, UTDEConfig
from attn_timeseries.models.convert import from_official
from attn_timeseries.models.layers import fitting_mixers
from attn_timeseries.models.utde import UTDE, RecordsShape, TimeAttention

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "timeseries_utde.json").read_text(encoding="utf-8"))["cases"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
INPUTS = ("x", "observed", "time", "regular", "notes", "note_time", "note_mask")


class Golden:
    """Our model with the official weights, and what the official code gave."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        note = CASES[case]
        tensors = load_file(GOLDEN / "timeseries_utde.safetensors")
        self.tensors = {key.split(":", 1)[1]: t for key, t in tensors.items() if key.startswith(f"{case}:")}
        self.shapes = note["parameters"]
        self.model = UTDE(UTDEConfig(**note["config"], dropout=0.0), RecordsShape(**note["shape"])).to(dtype)
        self.model.load_state_dict(from_official("utde", self.named("weights")))
        self.inputs = {
            name: self.tensors[name].to(dtype).requires_grad_() if self.tensors[name].is_floating_point() else t
            for name, t in self.tensors.items()
            if name in INPUTS
        }
        self.y = self.model(**self.inputs)
        (self.y * self.tensors["w"].to(dtype)).sum().backward()

    def named(self, flat: str) -> dict[str, Tensor]:
        parts = self.tensors[flat].split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items())}


def assert_close(ours: Tensor, official: Tensor, what: str) -> None:
    assert ours.shape == official.shape, what
    error = (ours.double() - official.double()).abs().max() / official.double().abs().max().clamp(min=1.0)
    assert error <= TOLERANCE[ours.dtype], f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_official_code(case: str, dtype: torch.dtype) -> None:
    golden = Golden(case, dtype)
    assert_close(golden.y, golden.tensors["y"], "logits")
    if dtype == torch.float32:
        assert_close(golden.y, golden.tensors["y32"], "logits of the official float32 run")
    compared = [name.removeprefix("grad/") for name in golden.tensors if name.startswith("grad/")]
    assert ("regular" in compared) == ("utde" in golden.model.config.series or case == "imputation")
    for name in compared:
        ours, official = golden.inputs[name].grad, golden.tensors[f"grad/{name}"]
        assert ours is not None
        if name == "x":  # the official softmax over nothing is even, and reads what stands where nothing was observed
            assert not ours[~golden.tensors["observed"]].any()
            official = official * golden.tensors["observed"]
        assert_close(ours, official, f"gradient of {name}")
    official = from_official("utde", golden.named("weight_grads"))
    ours = {name: p.grad for name, p in golden.model.named_parameters()}
    assert set(ours) == set(official)
    for name, grad in ours.items():
        assert grad is not None
        first = 1 if name == "positions" else 0  # the official embedding never trains the first position
        assert_close(grad[first:], official[name][first:], f"gradient of {name}")


# -- time attention ---------------------------------------------------------------------------------------------------


def attention_case(seed: int = 0, big: float = 1.0) -> tuple[TimeAttention, tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.manual_seed(seed)
    layer = TimeAttention(3, 5, 8, 2, 0.0).double()
    query, key = big * torch.randn(1, 4, 8).double(), big * torch.randn(2, 6, 8).double()
    observed = torch.rand(2, 6, 3) < 0.5
    observed[1, :, 2] = False
    return layer, (query, key, torch.randn(2, 6, 3).double(), observed)


def by_definition(layer: TimeAttention, query: Tensor, key: Tensor, value: Tensor, observed: Tensor) -> Tensor:
    """Equation 3: one softmax for every head, query and variable, over the times at which it was observed."""
    q, k = layer.query(query), layer.key(key)
    width = q.shape[-1] // layer.heads
    rows = []
    for b in range(len(value)):
        for t in range(q.shape[1]):
            found = []
            for h in range(layer.heads):
                part = slice(h * width, (h + 1) * width)
                for v in range(value.shape[2]):
                    times = observed[b, :, v].nonzero()[:, 0]
                    scores = k[b, times, part] @ q[0, t, part] / width**0.5
                    found.append((scores.softmax(0) * value[b, times, v]).sum())
            rows.append(torch.stack(found))
    return layer.out(torch.stack(rows).view(len(value), q.shape[1], -1))


@pytest.mark.parametrize("big", [1.0, 60.0], ids=["usual", "weights that differ by more than floats can hold"])
def test_time_attention_by_definition(big: float) -> None:
    layer, given = attention_case(big=big)
    for scale in (torch.float64, torch.float32):
        layer.to(scale)
        inputs = [t.to(scale) if t.is_floating_point() else t for t in given]
        ours, theirs = layer(*inputs), by_definition(layer, *inputs)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 if scale == torch.float64 else 2e-5)
        weights = torch.randn_like(ours)
        pairs = [torch.autograd.grad((y * weights).sum(), list(layer.parameters())) for y in (ours, theirs)]
        for a, b in zip(*pairs):
            size = b.abs().max().clamp(min=1.0)
            assert (a - b).abs().max() / size <= (1e-11 if scale == torch.float64 else 1e-4)


def test_time_attention_takes_the_exact_path_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    whole = TimeAttention._mean_of_each
    monkeypatch.setattr(TimeAttention, "_mean_of_each", lambda self, *a: called.append(1) or whole(self, *a))
    layer, given = attention_case()
    layer(*given)
    assert not called
    layer, given = attention_case(big=60.0)
    layer(*given)
    assert called


def test_what_is_not_observed_never_matters() -> None:
    layer, (query, key, value, observed) = attention_case()
    base = layer(query, key, value, observed)
    spoilt = value.masked_fill(~observed, float("nan"))
    assert torch.equal(layer(query, key, spoilt, observed), base)
    nothing = torch.zeros_like(observed)
    assert torch.equal(layer(query, key, value, nothing), layer.out.bias.expand_as(base))
    assert layer(query, key[:, :0], value[:, :0], observed[:, :0]).shape == base.shape


# -- the network ------------------------------------------------------------------------------------------------------


def batch(shape: RecordsShape, stays: int = 3, points: int = 7, notes: int = 2, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    observed = torch.rand(stays, points, shape.variables) < 0.5
    found = {
        "x": torch.randn(stays, points, shape.variables) * observed,
        "observed": observed,
        "time": torch.rand(stays, points).sort(dim=1).values,
        "regular": torch.cat(
            [
                torch.randn(stays, shape.steps, shape.variables),
                (torch.rand(stays, shape.steps, shape.variables) < 0.5).float(),
            ],
            dim=-1,
        ),
    }
    if shape.text:
        found |= {
            "notes": torch.randn(stays, notes, shape.text),
            "note_time": torch.rand(stays, notes),
            "note_mask": torch.rand(stays, notes) < 0.7,
        }
    return found


SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 2, "layers": 1, "embed_time": 8, "time_heads": 2, "dropout": 0.0}
SHAPE = RecordsShape(variables=3, steps=9, text=6, labels=2)


def build(name: str = "utde", shape: RecordsShape = SHAPE, mixer: str | None = None, **config: Any) -> UTDE:
    torch.manual_seed(1)
    return UTDE(MODELS[name].config(**{**SMALL, **config}), shape, mixer=mixer).eval()


@pytest.mark.parametrize("name", ["utde", "utde_blind", "imputation", "mtand"])
@pytest.mark.parametrize("text", [0, 6])
def test_every_model_runs_and_learns_in_all_parts(name: str, text: int) -> None:
    shape = RecordsShape(variables=3, steps=9, text=text, labels=2)
    model = build(name, shape)
    y = model(**batch(shape))
    assert y.shape == (3, 2)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_control_has_the_same_weights_and_sees_no_missingness() -> None:
    model, blind = build(), build("utde_blind")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in blind.named_parameters()}
    given = batch(SHAPE)
    other = {**given, "observed": ~given["observed"], "x": given["x"] + 1, "time": given["time"] / 2}
    other["regular"] = torch.cat([given["regular"][..., :3], 1 - given["regular"][..., 3:]], dim=-1)
    for name in ("utde_blind", "imputation"):
        model = build(name)
        assert torch.equal(model(**given), model(**other))
    assert not torch.allclose(build()(**given), build()(**other))
    assert not torch.allclose(build("mtand")(**given), build("mtand")(**other))


@pytest.mark.parametrize("gate", ["stay", "step", "channel"])
def test_gate_mixes_both_embeddings(gate: str) -> None:
    model, given = build(gate=gate), batch(SHAPE)
    series = {k: given[k] for k in ("x", "observed", "time", "regular")}
    _, share = model.embed_series(**series)
    assert share.shape == {"stay": (3, 1, 1), "step": (3, 9, 1), "channel": (3, 9, 16)}[gate]
    assert ((share > 0) & (share < 1)).all()
    with torch.no_grad():
        for bias, alone in ((50.0, "mtand"), (-50.0, "imputation")):
            model.gate[3].weight.zero_()
            model.gate[3].bias.fill_(bias)
            model.config.series = "utde"
            one = build(alone, hide_missingness=False)
            state = {k: v for k, v in model.state_dict().items() if k in one.state_dict()}
            one.load_state_dict(state)
            assert torch.allclose(model.embed_series(**series)[0], one.embed_series(**series)[0], atol=1e-6)


def test_filling_up_changes_nothing() -> None:
    """Rows and notes that fill a stay up, whatever they hold, and the other stays of a batch."""
    model, given = build(), batch(SHAPE)
    longer = dict(given)
    for name, value in (("x", 9.0), ("observed", False), ("time", 0.3), ("notes", 7.0), ("note_time", 0.9),
                        ("note_mask", False)):  # fmt: skip
        one = given[name]
        extra = torch.full((3, 4, *one.shape[2:]), value, dtype=one.dtype)
        longer[name] = torch.cat([one, extra], dim=1)
    base = model(**given)
    assert torch.allclose(model(**longer), base, atol=1e-6)
    alone = model(**{name: t[:1] for name, t in given.items()})
    assert torch.allclose(alone, base[:1], atol=1e-6)


def test_every_fitting_mixer_replaces_the_attention() -> None:
    given, base = batch(SHAPE), build()(**batch(SHAPE))
    names = fitting_mixers()
    assert "softmax" in names
    for name in names:
        y = build(mixer=name)(**given)
        assert y.shape == base.shape, name
        assert torch.isfinite(y).all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 2}, "odd"),
        ({"time_heads": 3}, "divide embed_time"),
        ({"embed_time": 1, "time_heads": 1}, "at least 2"),
        ({"layers": -1}, "0 or more"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)
