"""The models against other people's code: the same weights and inputs give the same logits and gradients.

`tests/golden/eeg_<model>.safetensors` holds what the official RBTransformer and braindecode's EEGNet gave; the `.json`
beside it names the source and the sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attn_eeg.config import MODELS, RBTransformerConfig
from attn_eeg.models.base import EegShape
from attn_eeg.models.convert import from_official
from attn_eeg.models.rbtransformer import RBTransformer
from attn_shared.app import load

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
CASES = [
    ("rbtransformer", "main", "eval"),
    ("rbtransformer", "square", "eval"),
    ("eegnet", "main", "eval"),
    ("eegnet", "main", "train"),
    ("eegnet", "wide", "eval"),
    ("eegnet", "wide", "train"),
]


class Golden:
    """One case of one model: our model with the given weights, and what the other code gave."""

    def __init__(self, name: str, case: str, mode: str, dtype: torch.dtype) -> None:
        tensors = load_file(GOLDEN / f"eeg_{name}.safetensors")
        note = json.loads((GOLDEN / f"eeg_{name}.json").read_text(encoding="utf-8"))["cases"][case]
        self.tensors = {key.split(":", 1)[1]: t for key, t in tensors.items() if key.startswith(f"{case}:")}
        self.name, self.mode = name, mode
        card = MODELS[name]
        self.model = load(card.target)(card.config(dropout=0.0, **note["config"]), EegShape(**note["shape"])).to(dtype)
        missing, unexpected = self.model.load_state_dict(self.part("weight/"), strict=False)
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
        self.model.train(mode == "train")
        self.x = self.tensors["x"].to(dtype).requires_grad_()

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        official = {key[len(prefix) :]: t for key, t in self.tensors.items() if key.startswith(prefix)}
        return from_official(self.name, official)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def golden(request, case):
    return Golden(*case, request.param)


def error(ours: torch.Tensor, official: torch.Tensor) -> float:
    """Largest difference, in units of the largest official value where that is above 1."""
    assert ours.shape == official.shape
    ours, official = ours.detach().double(), official.double()
    return float((ours - official).abs().max() / official.abs().max().clamp(min=1.0))


def test_logits_and_gradients(golden):
    tolerance = TOLERANCE[golden.x.dtype]
    logits = golden.model(golden.x)
    assert error(logits, golden.tensors[f"{golden.mode}/y"]) <= tolerance
    (logits * golden.tensors["w"].to(logits.dtype)).sum().backward()
    assert error(golden.x.grad, golden.tensors[f"{golden.mode}/grad/x"]) <= tolerance
    official = golden.part(f"{golden.mode}/grad/weight/")
    ours = {key: p.grad for key, p in golden.model.named_parameters()}
    assert set(ours) == set(official)
    for key, grad in ours.items():
        assert error(grad, official[key]) <= tolerance, key
    buffers = dict(golden.model.named_buffers())
    for key, value in golden.part("train/buffer/").items() if golden.mode == "train" else ():
        assert error(buffers[key], value) <= tolerance, key


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case, mode in CASES if mode == "eval"])
def test_logits_of_the_official_float32_run(name, case):
    golden = Golden(name, case, "eval", torch.float32)
    assert error(golden.model(golden.x), golden.tensors["eval/y32"]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("channels", "classes", "options", "count"),
    [
        (32, 2, {}, 664_834),
        (14, 5, {}, 662_917),
        (62, 3, {"embed_dim": 256, "depth": 6, "heads": 8, "mlp_hidden_dim": 1024}, 5_277_955),
        (32, 2, {"embed_dim": 256, "depth": 6, "heads": 8, "mlp_hidden_dim": 1024}, 5_270_018),
    ],
)
def test_published_parameter_counts(channels, classes, options, count):
    """0.66 M and 5.27 M; the counts are those of the official class built with the same sizes."""
    shape = EegShape(channels=channels, features=4, samples=0, classes=classes)
    model = RBTransformer(RBTransformerConfig(**options), shape)
    assert sum(p.numel() for p in model.parameters()) == count


def test_unknown_official_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'rbtransformer'"):
        from_official("rbtransforme", {})
