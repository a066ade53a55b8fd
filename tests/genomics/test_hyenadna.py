"""HyenaDNA against the official code with the same weights: outputs, gradients, and its state_dict.

`tests/golden/genomics_hyenadna.safetensors` holds what the official code gave; the `.json` beside it names the commit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attn_genomics.config import HyenaDNAConfig
from attn_genomics.models import convert
from attn_genomics.models.base import Shape
from attn_genomics.models.hyenadna import HyenaDNA
from attn_genomics.models.start import load_start
from attn_shared.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "genomics_hyenadna.safetensors"
CASES: dict[str, dict[str, Any]] = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))["cases"]
TENSORS = load_file(GOLDEN)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SPARSE = {"tiny_1k": 75}


def official(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that the golden numbers were made with, by official names."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    found: dict[str, Tensor] = {}
    for key in sorted(case["shapes"]):
        shape = case["shapes"][key]
        drawn = rng.standard_normal(shape).astype(np.float32).astype(np.float64)
        if key.endswith("pos_emb.t"):
            value = torch.linspace(0, 1, shape[1], dtype=torch.float64).view(shape)
        elif key.endswith("modulation.deltas"):
            ends = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
            value = torch.linspace(*ends, shape[2], dtype=torch.float64).view(shape)
        elif key.endswith("pos_emb.z"):
            value = TENSORS[f"{name}/z"].double()
        elif key.endswith(("3.freq", "5.freq")):
            value = found[key[: -len("3.freq")] + "1.freq"]
        elif key.endswith(".freq"):
            value = case["w"] * torch.from_numpy(1 + 0.1 * drawn)
        elif "norm" in key or "ln_f" in key:
            value = torch.from_numpy(0.1 * drawn + key.endswith("weight"))
        elif len(shape) > 1:
            fan = math.prod(shape[1:])
            value = torch.from_numpy(drawn * (0.25 if "implicit_filter" in key else 1.0) / fan**0.5)
        else:
            value = torch.from_numpy(0.3 * drawn)
        found[key] = value.to(dtype)
    return found


def config(name: str) -> HyenaDNAConfig:
    case = CASES[name]
    return HyenaDNAConfig(**{key: value for key, value in case.items() if key not in ("length", "shapes")})


def loaded(name: str, dtype: torch.dtype) -> HyenaDNA:
    model = HyenaDNA(config(name), Shape(length=CASES[name]["length"])).to(dtype).eval()
    model.load_official(official(name, dtype))
    return model


def official_gradients(model: HyenaDNA) -> dict[str, Tensor]:
    """Gradients by official names."""
    found = {theirs: dict(model.named_parameters())[mine].grad for theirs, mine in convert._WHOLE.items()}
    for index, block in enumerate(model.blocks):
        parameters, prefix = dict(block.named_parameters()), f"backbone.layers.{index}."
        found |= {prefix + theirs: parameters[mine].grad for theirs, mine in convert._PLAIN.items()}
        found[prefix + "mixer.short_filter.weight"] = parameters["mixer.conv.weight"].grad.T.unsqueeze(1)
        found[prefix + "mixer.filter_fn.bias"] = parameters["mixer.skip"].grad.flatten()
        found[prefix + "mixer.filter_fn.implicit_filter.1.freq"] = parameters["mixer.filter.freq"].grad[None]
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_official_code(name: str, dtype: torch.dtype) -> None:
    model, tokens = loaded(name, dtype), TENSORS[f"{name}/tokens"].long()
    output = model(tokens)
    expected = TENSORS[f"{name}/{str(dtype).split('.')[1]}/output"]
    torch.testing.assert_close(output[:, :: SPARSE.get(name, 1)], expected, rtol=0, atol=TOLERANCE[dtype])
    (output * torch.cos(torch.arange(output.numel(), dtype=dtype)).view_as(output)).sum().backward()
    gradients = official_gradients(model)
    start = f"{name}/float64/grad."
    compared = 0
    for key in (key for key in TENSORS if key.startswith(start)):
        theirs, expected = key.removeprefix(start), TENSORS[key]
        if theirs.endswith("pos_emb.z"):  # not trained any further here
            continue
        got = gradients[theirs].double()
        if name in SPARSE:
            turned = (got * torch.cos(torch.arange(got.numel(), dtype=torch.float64)).view_as(got)).sum()
            got = torch.stack([got.sum(), turned, got.abs().max()])
            size = gradients[theirs].abs().sum().item()
        else:
            size = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, size), msg=theirs)
        compared += 1
    assert compared == len(gradients)


def test_the_language_models_output_layer_is_tied_and_prefixes_fall_away() -> None:
    tensors = official("small", torch.float32)
    whole = {f"model.{key}": value for key, value in tensors.items()}
    whole["model.lm_head.weight"] = tensors["backbone.embeddings.word_embeddings.weight"]
    model = HyenaDNA(config("small"), Shape(length=24))
    model.load_official(whole)
    features = torch.randn(2, 3, 8)
    torch.testing.assert_close(model.bases(features), (features @ whole["model.lm_head.weight"].T)[..., 7:11])
    with pytest.raises(ValueError, match="not tied"):
        model.load_official(whole | {"model.lm_head.weight": tensors["backbone.embeddings.word_embeddings.weight"] + 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layers.0.mixer.extra": torch.zeros(1)}, "no place for: backbone.layers.0.mixer.extra"),
        ({"backbone.layers.0.norm1.bias": None}, "lack backbone.layers.0.norm1.bias"),
        ({"backbone.layers.1.norm1.bias": torch.zeros(9)}, r"shape \(8,\) here and \(9,\)"),
        ({"backbone.layers.0.mixer.filter_fn.modulation.deltas": torch.zeros(1, 1, 8)}, "deltas is not what"),
        ({"backbone.layers.0.mixer.filter_fn.implicit_filter.3.freq": torch.zeros(1, 8)}, "different frequencies"),
        ({"backbone.layers.0.mixer.filter_fn.pos_emb.z": torch.zeros(1, 30, 3)}, "set l_max=30 and emb_dim=3"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {key: value for key, value in (official("small", torch.float32) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        HyenaDNA(config("small"), Shape(length=24)).load_official(tensors)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".safetensors", ""])
def test_starts_from_published_files(suffix: str, tmp_path: Path) -> None:
    tensors = {f"model.{key}": value.clone() for key, value in official("small", torch.float32).items()}
    path = tmp_path / f"weights{suffix or '.ckpt'}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if suffix != ".bin" else tensors, path)
    if not suffix:  # a folder
        case = CASES["small"]
        layer = {key: case[key] for key in ("l_max", "order", "filter_order", "emb_dim", "w")}
        sizes = {key: case[key] for key in ("d_model", "n_layer", "d_inner")}
        (tmp_path / "config.json").write_text(json.dumps({**sizes, "vocab_size": 12, "layer": layer}))
        other = HyenaDNA(HyenaDNAConfig(**{**vars(config("small")), "l_max": 50}), Shape(length=24))
        with pytest.raises(UserError, match=r"set --model_args.l_max 26$"):
            load_start(other, tmp_path)
        path = tmp_path
    model = HyenaDNA(config("small"), Shape(length=24)).eval()
    load_start(model, path)
    tokens = TENSORS["small/tokens"].long()
    torch.testing.assert_close(model(tokens), loaded("small", torch.float32)(tokens))
    # Such a model is written and read as any other: its trained positions are part of its weights.
    again = HyenaDNA(config("small"), Shape(length=24)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), model(tokens))


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": pytest.raises}, path)
    with pytest.raises(UserError, match="it was not loaded"):
        load_start(HyenaDNA(config("small"), Shape(length=24)), path)
    with pytest.raises(UserError, match="there is nothing at"):
        load_start(HyenaDNA(config("small"), Shape(length=24)), tmp_path / "none")
