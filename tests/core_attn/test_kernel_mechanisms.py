"""Hedgehog, NaLa, InLine, Agent attention and TransNormer against what their papers' own code computes.

The golden tensors come from the official code run with the stored weights; the .json files beside them say which.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import core_attn
from core_attn.distillation import attention_distillation_loss
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}
# Checks that an option cannot change, and the slow ones.
SKIPPED = ["compile", "export", "determinism", "strides", "inputs", "state_dict"]


def _note(name: str) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))
    return note


def _golden(name: str, case: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    return {k.removeprefix(f"{case}/"): v.to(dtype) for k, v in stored.items() if k.startswith(f"{case}/")}


def _cases(name: str) -> list[str]:
    return [*_note(name)["cases"]]


def _ours(name: str, golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The official code's weights, or their gradients, under the names of our parameters."""
    official = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    found: dict[str, Tensor] = {}
    for key, value in official.items():
        module, _, kind = key.rpartition(".")
        if module in ("qkv", "qkvg", "kv"):
            names = {"qkv": "qkv", "kv": "kv", "qkvg": ["q", "k", "v", "gate"]}[module]
            found |= {f"{n}_proj.{kind}": x for n, x in zip(names, value.chunk(len(names)), strict=True)}
        elif key.endswith("_bias"):
            own = {
                "an": "key_table",
                "na": "query_table",
                "ah": "key_rows",
                "aw": "key_columns",
                "ha": "query_rows",
                "wa": "query_columns",
            }[key.removesuffix("_bias")]
            if key[:2] in ("ah", "aw"):
                value = value[0]
            elif key[:2] in ("ha", "wa"):
                value = value[0].permute(0, 3, 1, 2)  # (H, window, 1, N) -> (H, N, window, 1)
            found[own] = value
        else:
            own = {"q": "q_proj", "proj": "out_proj", "lepe": "local", "ln": "norm", "dwc": "local"}.get(module, module)
            found[f"{own.replace('residual', 'local')}.{kind}"] = value
    return found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in ("nala", "inline", "agent", "transnormer") for case in _cases(name)]
)
def test_official_outputs_and_gradients(name: str, case: str, dtype: torch.dtype, backend: str) -> None:
    golden, options = _golden(name, case, dtype), dict(_note(name)["cases"][case])
    grid = options.pop("grid", None)
    weights = _ours(name, golden, "weight.")
    options = {"dim": 8, "heads": 2, "bias": "q_proj.bias" in weights, **options}
    if name == "transnormer":
        options["eps"] = 1e-2
    mixer = core_attn.build(name, backend=backend, **options).to(dtype)
    mixer.load_state_dict(weights)
    x = golden["x"].requires_grad_()
    out = mixer(x, grid=None if grid is None else tuple(grid))
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    parameters = dict(mixer.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), [x, *parameters.values()])
    right = {"x": golden["grad.x"], **_ours(name, golden, "grad.weight.")}
    _close(out, golden["output"], dtype, "output")
    for key, got in zip(["x", *parameters], gradients, strict=True):
        _close(got, right[key], dtype, key)


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", _cases("hedgehog"))
def test_official_hedgehog(case: str, dtype: torch.dtype) -> None:
    golden = _golden("hedgehog", case, dtype)
    mixer = core_attn.build("hedgehog", dim=12, heads=2, **_note("hedgehog")["cases"][case]).to(dtype)
    names = {"q_map": "weight.q_map.mlp.layer", "k_map": "weight.k_map.mlp.layer"}
    mixer.load_state_dict({k: golden[v] for k, v in names.items()}, strict=False)
    leaves = [golden[n].requires_grad_() for n in "qkv"]
    q, k, v = leaves
    out = mixer.attend(q, k, v, key_padding_mask=None, aux=None)
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum(), [*leaves, mixer.q_map, mixer.k_map])
    _close(out, golden["output"], dtype, "output")
    for key, got in zip(["q", "k", "v", *names.values()], gradients, strict=True):
        _close(got, golden[f"grad.{key}"], dtype, key)


@pytest.mark.parametrize("case", _cases("hedgehog"))
def test_official_distillation_loss(case: str) -> None:
    golden, options = _golden("hedgehog", case), _note("hedgehog")["cases"][case]
    student = core_attn.build("hedgehog", dim=12, heads=2, **options).double()
    teacher = core_attn.build("softmax", dim=12, heads=2, causal=options["causal"], bias=False).double()
    with torch.no_grad():
        student.q_map.copy_(golden["weight.q_map.mlp.layer"])
        student.k_map.copy_(golden["weight.k_map.mlp.layer"])
        # Tokens (q, k) of 24 channels would be too wide for the layer: queries from x, keys from a context.
        teacher.q_proj.weight.copy_(torch.eye(12))
        teacher.k_proj.weight.copy_(torch.eye(12))
    x, context = (golden[n].transpose(1, 2).flatten(-2) for n in "qk")
    loss = attention_distillation_loss(student, teacher, x, context=context)
    # The official code raises weights below 1e-12 to that and makes the rows sum to 1 once more, by a log-softmax.
    learned = student.attention_map(golden["q"], golden["k"], key_padding_mask=None, aux=None).clamp(min=1e-12)
    official = loss + learned.sum(-1).log().mean()
    assert abs(official.item() - golden["distillation"].item()) < 1e-14
    assert abs(loss.item() - official.item()) < 1e-11
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    reached = [n for (n, _), g in zip(student.named_parameters(), gradients) if g is not None]
    assert reached == ["q_map", "k_map"]


def test_exp_of_keys_keeps_their_relative_weights_and_the_official_form_does_not() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 5, 4, dtype=torch.float64), torch.randn(1, 1, 6, 4, dtype=torch.float64)
    both = [torch.cat([x.exp(), (-x).exp()], dim=-1) for x in (q, k)]
    right = both[0] @ both[1].mT
    right = right / right.sum(-1, keepdim=True)
    found = {}
    for activation in ("exp", "exp_max"):
        mixer = core_attn.build("hedgehog", dim=4, heads=1, activation=activation).double()
        found[activation] = _difference(mixer.attention_map(q, k, key_padding_mask=None, aux=None), right)
    assert found["exp"] < 1e-12
    assert found["exp_max"] > 0.05


@pytest.mark.parametrize("activation", ["softmax", "exp", "exp_max"])
def test_hedgehog_with_extreme_tokens_is_finite(activation: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        mixer = core_attn.build("hedgehog", dim=8, heads=2, causal=True, activation=activation).to(dtype)
        x = (torch.randn(2, 70, 8) * 1000).to(dtype).requires_grad_()
        out = mixer(x)
        out.float().square().mean().backward()
        assert out.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_hedgehog_starts_as_the_identity_and_decodes_in_constant_memory() -> None:
    mixer = core_attn.build("hedgehog", dim=12, heads=3, causal=True)
    assert torch.equal(mixer.q_map, torch.eye(4).repeat(3, 1, 1))
    with torch.no_grad():
        _, state = mixer.step(torch.randn(2, 300, 12), mixer.init_state(2))
    assert state.untyped_storage().nbytes() == mixer.init_state(2).untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hedgehog", {"activation": "exp"}),
        ("hedgehog", {"activation": "exp_max"}),
        ("nala", {"power": 1.5, "local": False, "dim": 12}),
        ("nala", {"heads": 1, "bias": False}),
        ("inline", {"feature_map": "exp", "heads": 1}),
        ("inline", {"feature_map": "relu", "local": False}),
        ("agent", {"agents": 4, "window": 3}),
        ("agent", {"agents": 1, "local": False, "heads": 1, "dim": 7}),
        ("transnormer", {"variant": "t1"}),
        ("transnormer", {"diagonal": True, "block": 8}),
        ("transnormer", {"diagonal": True, "block": 7, "variant": "t1"}),
    ],
)
def test_contract_of_options(name: str, options: dict[str, Any]) -> None:
    check_mechanism(name, skip=SKIPPED, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_transnormer_by_its_definition(variant: str, diagonal: bool, causal: bool) -> None:
    torch.manual_seed(0)
    length, block = 23, 5
    mixer = core_attn.build(
        "transnormer", dim=12, heads=3, causal=causal, diagonal=diagonal, block=block, variant=variant
    ).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    keep = torch.ones(length, length, dtype=torch.bool)
    keep = keep.tril() if causal else keep
    if diagonal:
        keep = keep & torch.block_diag(*[torch.ones(block, block)] * 5).bool()[:length, :length]
        scores = q @ k.mT / 2
        weights = torch.relu(scores) * keep if variant == "t1" else scores.masked_fill(~keep, -torch.inf).softmax(-1)
    else:
        shift = 1.0 if variant == "t2" else 0.0
        weights = (nn.functional.elu(q) + shift) @ (nn.functional.elu(k) + shift).mT * keep
    out = (weights @ v).transpose(1, 2).flatten(-2)
    if not (diagonal and variant == "t2"):
        out = out / (out.square().mean(-1, keepdim=True).sqrt() + 1e-8)
    assert _difference(mixer(x), mixer.out_proj(out)) < 1e-12


def test_official_causal_blocks_leak_and_ours_do_not() -> None:
    golden = _golden("transnormer", "official_leak")
    mixer = core_attn.build("transnormer", dim=8, heads=2, causal=True, diagonal=True, block=4).double()
    mixer.load_state_dict(_ours("transnormer", golden, "weight."))
    x = golden["x"]
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    blocks = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    late = (q @ k.mT / 2).masked_fill(~blocks, -torch.inf).softmax(-1).tril()
    official = mixer.out_proj((late @ v).transpose(1, 2).flatten(-2))
    assert _difference(official, golden["output"]) < 1e-12  # weights that the future has taken its share of
    assert _difference(mixer(x), golden["output"]) > 1e-2


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_transnormer_blocks_decode_in_constant_memory(variant: str) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build(
        "transnormer", dim=8, heads=2, causal=True, diagonal=True, block=6, variant=variant
    ).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        right, state, outs, held = mixer(x), mixer.init_state(2), [], set()
        for piece in x.split([3, 3, 1, 20, 13], dim=1):
            out, state = mixer.step(piece, state)
            outs.append(out)
            held.add(state.tokens.untyped_storage().nbytes())
    assert _difference(torch.cat(outs, dim=1), right) < 1e-12
    assert len(held) == 1


def test_nala_by_its_definition_on_a_sequence() -> None:
    """A row of 7 tokens: half of the pairs of channels turn by the column, the others by the row, which is 0."""
    torch.manual_seed(0)
    mixer = core_attn.build("nala", dim=8, heads=1, local=False).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    q, k, v = (p(x)[0] for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = torch.zeros(7, 8, dtype=torch.float64)
    turn = torch.polar(
        torch.ones(7, 4, dtype=torch.float64),
        torch.outer(torch.arange(7, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0, 1e-4], dtype=torch.float64)),
    )
    for i in range(7):
        norm = q[i].norm()
        power = 3 * (0.5 + math.tanh(norm.item()))
        total, read = 7e-6, torch.zeros(8, dtype=torch.float64)
        for j in range(7):
            weight = 0.0
            for sign in (1, -1):
                a, b = torch.relu(sign * q[i] / norm) ** power, torch.relu(sign * k[j] ** 3)
                total = total + a @ b
                ca, cb = (torch.view_as_complex(y.view(4, 2)) * turn[n] for y, n in ((a, i), (b, j)))
                weight = weight + (ca * cb.conj()).real.sum()
            read = read + weight * v[j]
        out[i] = read / total
    right = mixer.out_proj(mixer.norm(out) * nn.functional.silu(mixer.gate_proj(x)))
    assert _difference(mixer(x), right) < 1e-12


def test_inline_weights_sum_to_one_and_tell_lengths_of_queries_apart() -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("inline", dim=4, heads=1, local=False).double()
    q, k = torch.randn(1, 1, 1, 4, dtype=torch.float64), torch.randn(1, 1, 6, 4, dtype=torch.float64)
    q = torch.cat([q, 2 * q], dim=2)
    q, k, _ = mixer.prepare(q, k, k, key_padding_mask=None)
    weights = mixer.attention_map(q, k, key_padding_mask=None, aux=None)
    assert _difference(weights.sum(-1), torch.ones(1, 1, 2)) < 1e-12
    assert _difference(weights[:, :, 0], weights[:, :, 1]) > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hedgehog", {"activation": "sofmax"}),
        ("nala", {"power": 0}),
        ("nala", {"causal": True}),
        ("inline", {"feature_map": "reul"}),
        ("inline", {"causal": True}),
        ("agent", {"agents": 5}),
        ("agent", {"window": 0}),
        ("agent", {"causal": True}),
        ("transnormer", {"block": 0}),
        ("transnormer", {"variant": "t3"}),
    ],
)
def test_bad_options_are_one_sentence(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{10,300}$"):
        core_attn.build(name, dim=8, heads=2, **options)


def _close(got: Tensor, right: Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == right.shape, what
    assert _difference(got, right) <= ALLOWED[dtype] * max(1.0, right.abs().max().item()), what


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()
