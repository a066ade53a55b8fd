"""The models against the papers' official code: the same weights and inputs give the same forecasts and gradients.

`tests/golden/timeseries_<model>.safetensors` holds what the official code gave; the `.json` beside it names repository,
commit and sizes. Official parameter names are mapped by `attn_timeseries.models.convert`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attn_shared.app import load
from attn_timeseries.config import MODELS
from attn_timeseries.models.base import SeriesShape
from attn_timeseries.models.convert import from_official
from core_attn import registry

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CASES = [
    (name, case)
    for name, cases in {
        "autoformer": ["main", "short"],
        "informer": ["main", "plain"],
        "flowformer": ["main"],
        "transformer": ["main"],
        "itransformer": ["main", "raw"],
        "dlinear": ["main", "individual"],
        "patchtst": ["main", "last"],
    }.items()
    for case in cases
]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


class Golden:
    """One case of one model: our model with the official weights, and what the official code gave."""

    def __init__(self, name: str, case: str, mode: str, dtype: torch.dtype) -> None:
        tensors = load_file(GOLDEN / f"timeseries_{name}.safetensors")
        note = json.loads((GOLDEN / f"timeseries_{name}.json").read_text(encoding="utf-8"))["cases"][case]
        self.tensors = {key.split(":", 1)[1]: t for key, t in tensors.items() if key.startswith(f"{case}:")}
        self.name, self.mode, self.dtype = name, mode, dtype
        card = MODELS[name]
        config = card.config(**({} if name == "dlinear" else {"dropout": 0.0}) | note["config"])
        self.model = load(card.target)(config, SeriesShape(**note["shape"])).to(dtype)
        self.model.load_state_dict(from_official(name, self.part("weight/")))
        self.model.train(mode == "train")
        self.x, self.x_mark, self.y_mark, self.w = (
            self.tensors[key].to(dtype).requires_grad_(key in ("x", "x_mark")) for key in ("x", "x_mark", "y_mark", "w")
        )

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: t for key, t in self.tensors.items() if key.startswith(prefix)}

    def forward(self) -> torch.Tensor:
        return self.model(self.x, self.x_mark, self.y_mark)

    def keys(self) -> list[torch.Tensor]:
        """The keys that ProbSparse attention sampled, in the order of its calls."""
        keys = self.part(f"{self.mode}/keys/")
        return [keys[str(i)].long() for i in range(len(keys))]


@pytest.fixture
def golden(request, monkeypatch):
    name, case, mode, dtype = request.param
    golden = Golden(name, case, mode, dtype)
    if name == "informer":
        keys = golden.keys()
        monkeypatch.setattr(registry.get("prob_sparse"), "draw", lambda self, q, k, generator: keys.pop(0))
    return golden


def every_case(modes: tuple[str, ...] = ("eval", "train")) -> pytest.MarkDecorator:
    cases = [
        pytest.param((name, case, mode, dtype.values[0]), id=f"{name}-{case}-{mode}-{dtype.id}")
        for name, case in CASES
        for mode in modes
        for dtype in DTYPES
    ]
    return pytest.mark.parametrize("golden", cases, indirect=True)


def assert_close(ours: torch.Tensor, official: torch.Tensor, what: str) -> None:
    """Largest difference, in units of the largest official value where that is above 1."""
    assert ours.shape == official.shape, what
    error = (ours.double() - official.double()).abs().max() / official.double().abs().max().clamp(min=1.0)
    assert error <= TOLERANCE[ours.dtype], f"{what}: {error:.1e}"


@every_case()
def test_forecast(golden):
    y = golden.forward()
    assert_close(y, golden.tensors[f"{golden.mode}/y"], "forecast")
    if golden.dtype == torch.float32:
        assert_close(y, golden.tensors[f"{golden.mode}/y32"], "forecast of the official float32 run")


@every_case()
def test_input_gradients(golden):
    (golden.forward() * golden.w).sum().backward()
    official = golden.part(f"{golden.mode}/grad/")
    compared = [key for key in ("x", "x_mark") if key in official]
    for key in compared:
        assert_close(getattr(golden, key).grad, official[key], key)
    # iTransformer's official window normalisation writes in place and has no gradient to its input.
    assert compared or golden.model.config.use_norm


@every_case(modes=("train",))
def test_weight_gradients_and_running_statistics(golden):
    (golden.forward() * golden.w).sum().backward()
    official = from_official(golden.name, golden.part("train/grad/weight/"))
    ours = {key: p.grad for key, p in golden.model.named_parameters()}
    assert set(ours) == set(official)
    for key, grad in ours.items():
        assert_close(grad, official[key], key)
    buffers = dict(golden.model.named_buffers())
    for key, value in from_official(golden.name, golden.part("train/buffer/")).items():
        assert_close(buffers[key], value, key)


def test_unknown_official_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'autoformer'"):
        from_official("autoforme", {})
