"""RAT against the official layer, and its decoding.

The golden tensors come from the official code run with the stored weights; the .json file beside them says which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.mechanisms.linear.rat import Rat
from core_attn.testing import check_mechanism
from core_attn.testing.harness import state_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "core_rat.json").read_text(encoding="utf-8"))["cases"]


def loaded(case: str, dtype: torch.dtype, **options: Any) -> tuple[Rat, dict[str, Tensor]]:
    """Ours with the official weights, whose names are the same, and the stored tensors of the case."""
    stored = load_file(GOLDEN / "core_rat.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    given = {k: v for k, v in CASES[case].items() if k != "length"}
    mixer = Rat(**given, **options).to(dtype)
    mixer.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    return mixer, golden


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_official_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    mixer, golden = loaded(case, dtype, backend=backend)
    x = golden["x"].to(dtype).requires_grad_()
    assert x.shape[1] == CASES[case]["length"]
    out = mixer(x)
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    kind = str(dtype).removeprefix("torch.")
    for name, got in [("output", out), *((f"grad.{k}", g) for k, g in zip(leaves, gradients, strict=True))]:
        right = golden[f"{kind}/{name}"]
        assert got.shape == right.shape, name
        assert difference(got, right) <= ALLOWED[dtype] * max(1.0, right.abs().max().item()), name


@pytest.mark.parametrize("case", CASES)
def test_official_outputs_token_by_token(case: str) -> None:
    mixer, golden = loaded(case, torch.float64)
    state, outs = mixer.init_state(2), []
    with torch.no_grad():
        for token in golden["x"].double().split(1, dim=1):
            out, state = mixer.step(token, state)
            outs.append(out)
    assert difference(torch.cat(outs, dim=1), golden["float64/output"]) < 1e-12


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_decoding_is_the_parallel_form_with_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixer = Rat(8, heads=2, chunk_size=8).to(dtype)
    x = torch.randn(2, 71, 8, dtype=dtype, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    weight = torch.cos(torch.arange(x.numel(), dtype=dtype)).view_as(x)
    right = mixer(x)
    expected = torch.autograd.grad((right * weight).sum(), leaves)
    for sizes in ([1] * 71, [37, 1, 15, 1, 17], [0, 71]):
        state, outs = mixer.init_state(2), []
        for piece in x.split(sizes, dim=1):
            out, state = mixer.step(piece, state)
            outs.append(out)
        got = torch.cat(outs, dim=1)
        gradients = torch.autograd.grad((got * weight).sum(), leaves)
        for a, b in zip([got, *gradients], [right, *expected], strict=True):
            assert difference(a, b) <= ALLOWED[dtype] * max(1.0, b.abs().max().item())


def test_the_state_grows_by_one_pair_a_chunk() -> None:
    mixer = Rat(16, heads=2, chunk_size=16).eval()
    with torch.no_grad():
        state, held = mixer.init_state(1), []
        for count in (1, 14, 1, 15, 1, 1600):
            _, state = mixer.step(torch.randn(1, count, 16), state)
            held.append(state_bytes(state))
    pair = 2 * 16 * 4
    assert held == [pair * (1 + n) for n in (0, 0, 1, 1, 2, 102)]


def test_whole_padded_chunks_are_read_by_nobody() -> None:
    torch.manual_seed(0)
    mixer = Rat(8, heads=2, chunk_size=4, base=1e9).double().eval()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    real = torch.ones(1, 20, dtype=torch.bool)
    real[:, :8] = False
    with torch.no_grad():
        # The rotation knows distances only, so that chunks of padding in front move nothing.
        assert difference(mixer(x, key_padding_mask=real)[:, 8:], mixer(x[:, 8:])) < 1e-12


def test_heads_share_queries_and_keys_in_turns_and_gates_begin_long() -> None:
    mixer = core_attn.build("rat", dim=24, heads=6, causal=True, ngroups=3)
    q, k, v, log_gate, _ = mixer._inputs(torch.randn(1, 5, 24))
    for x in (q, k):
        assert torch.equal(x[:, :3], x[:, 3:])
        assert not torch.equal(x[:, 0], x[:, 1])
    assert v.shape == log_gate.shape == q.shape
    # e^b / (1 + e^b) for e^b in [1, C - 1]: from 1/2 to (C - 1) / C.
    assert mixer.gate_bias.min() >= 0
    assert mixer.gate_bias.max() <= torch.tensor(15.0).log() + 1e-6
    assert core_attn.build("rat", dim=6, heads=3, causal=True).kv_heads == 1


@pytest.mark.parametrize(
    "options", [{"chunk_size": 1}, {"chunk_size": 200}, {"heads": 1}, {"chunk_size": 5, "bias": True, "ngroups": 1}]
)
def test_contract_of_options(options: dict[str, Any]) -> None:
    skip = ["compile", "export", "strides", "state_dict", "growth_time", "growth_memory", "determinism", "inputs"]
    check_mechanism("rat", skip=skip, **options)


@pytest.mark.parametrize(
    "options",
    [{"heads": 3}, {"ngroups": 3}, {"ngroups": 0}, {"chunk_size": 0}, {"base": 0.0}, {"causal": False}],
)
def test_bad_options_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{10,300}$"):
        core_attn.build("rat", dim=8, **{"heads": 2, "causal": True, **options})


def difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()
