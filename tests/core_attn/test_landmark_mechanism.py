"""Landmark attention as a mixer: the official grouped softmax, both kinds of landmarks, retrieval while decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.testing import check_mechanism
from core_attn.testing.growth import CountingMode

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, int]] = json.loads((GOLDEN / "core_landmark.json").read_text(encoding="utf-8"))["cases"]


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return core_attn.build("landmark", **{"dim": 16, "heads": 2, "causal": True, **options}).double().eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_official_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    stored = load_file(GOLDEN / "core_landmark.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    mixer = build(dim=8, block_size=CASES[case]["block_size"], landmark_tokens=True, backend=backend).to(dtype)
    weights = {"out_proj.weight": golden["c_proj.weight"], "out_proj.bias": golden["c_proj.bias"]}
    for kind in ("weight", "bias"):
        parts = golden[f"c_attn.{kind}"].chunk(3)
        weights |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
    mixer.load_state_dict(weights)
    mixer.to(dtype)
    x = golden["x"].to(dtype).requires_grad_()
    out = mixer(x)
    parameters = dict(mixer.named_parameters())
    probe = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    dx, *rest = torch.autograd.grad((out * probe).sum(), [x, *parameters.values()])
    gradients = dict(zip(parameters, rest, strict=True))
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert difference(out, golden["output"]) < tolerance
    assert difference(dx, golden["grad.x"]) < tolerance
    for kind in ("weight", "bias"):
        joint = torch.cat([gradients[f"{n}_proj.{kind}"] for n in "qkv"])
        assert difference(joint, golden[f"grad.c_attn.{kind}"]) < 10 * tolerance
        assert difference(gradients[f"out_proj.{kind}"], golden[f"grad.c_proj.{kind}"]) < 10 * tolerance


def test_nothing_is_read_from_landmark_tokens() -> None:
    mixer = build(block_size=4, landmark_tokens=True)
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    with core_attn.capture(mixer) as maps:
        mixer(x)
    weights = maps[""]
    assert not weights[..., 3::4].any()
    assert (weights.sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 8},
        {"block_size": 8, "top": 2},
        {"block_size": 5, "top": 0},
        {"block_size": 6, "landmark_tokens": True},
        {"block_size": 6, "landmark_tokens": True, "top": 1},
    ],
    ids=str,
)
def test_contract_with_options(options: dict[str, Any]) -> None:
    def make(dim: int, heads: int) -> Any:
        return core_attn.build("landmark", dim=dim, heads=heads, causal=True, **options)

    check_mechanism(make, only=["shape", "lengths", "causal", "padding", "maps", "decoding", "gradients", "batch"])


def test_blocks_that_hold_everything_are_dense_attention() -> None:
    mixer = build(block_size=64)
    exact = core_attn.build("softmax", dim=16, heads=2, causal=True).double()
    exact.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("landmark")})
    x = torch.randn(2, 60, 16, dtype=torch.float64)
    assert difference(mixer(x), exact(x)) < 1e-13


def test_training_reads_all_blocks() -> None:
    some, every = build(block_size=4, top=1), build(block_size=4)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    assert difference(some(x), every(x)) > 1e-4
    assert difference(some.train()(x), every.train()(x)) == 0


def test_a_decoding_step_reads_only_what_it_retrieves() -> None:
    """Work of a step at two lengths: the landmarks grow, the tokens read do not."""
    work = []
    for length in (1024, 2048):
        mixer = build(block_size=32, top=2).float()
        state = mixer.init_state(1)
        with torch.no_grad():
            mixer.step(torch.randn(1, length + 5, 16), state)
            with CountingMode() as mode:
                mixer.step(torch.randn(1, 1, 16), state)
        work.append(mode.work)
    tokens = 2 * 2 * 1024 * 8 * 2  # what reading the further 1024 keys and values would cost at least
    assert work[1] - work[0] < 0.2 * tokens


def test_states_branch() -> None:
    mixer = build(block_size=4)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    state = mixer.init_state(2, dtype=torch.float64)
    with torch.no_grad():
        mixer.step(x[:, :9], state)
        swapped = state.select(torch.tensor([1, 0]))
        a, _ = mixer.step(x[:, 9:], state)
        b, _ = mixer.step(x.flip(0)[:, 9:], swapped)
    assert difference(a, b.flip(0)) == 0
    assert difference(a, mixer(x)[:, 9:]) < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": 1, "landmark_tokens": True}, "block_size must be at least 2, got 1"),
        ({"causal": False, "landmark_tokens": True}, "landmark_tokens needs causal=True"),
        ({"top": -1}, "top must be at least 0, or None for all blocks, got -1"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_only_the_causal_one_decodes() -> None:
    with pytest.raises(ValueError, match="only when it is built with causal=True"):
        build(causal=False).init_state(1)
