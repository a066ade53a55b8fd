"""Hyena against the official operator, its definition token by token, and what decoding costs.

The golden tensors come from the official code run with the stored weights; the .json file beside them says which.
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

import core_attn
from core_attn.mechanisms.conv.hyena import Hyena
from core_attn.ops.fftconv.spectral import fast_size
from core_attn.testing import check_mechanism
from core_attn.testing.harness import state_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "core_hyena.json").read_text(encoding="utf-8"))["cases"]


def golden_of(case: str) -> dict[str, Tensor]:
    stored = load_file(GOLDEN / "core_hyena.safetensors")
    return {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}


def ours(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The official code's weights, or their gradients, under the names of our parameters."""
    found = {}
    for key, value in golden.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name == "short_filter.weight":
            name, value = "conv.weight", value[:, 0].T
        elif name == "short_filter.bias":
            name = "conv.bias"
        elif name == "filter_fn.bias":
            name, value = "skip", value.view(-1, golden["x"].shape[-1])
        elif name == "filter_fn.pos_emb.z":
            name, value = "filter.offsets", value[0]
        elif name.startswith("filter_fn.implicit_filter."):
            place, kind = name.split(".")[2:]  # layers stand at even places, the shared sine at odd ones
            if kind == "freq":
                name, value = "filter.freq", value[0]
            else:
                name = "filter.out.weight" if place == "6" else f"filter.layers.{int(place) // 2}.{kind}"
        found[name] = value
    return found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_official_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    golden, options = golden_of(case), dict(CASES[case])
    length = options.pop("length")
    mixer = Hyena(**options, learn_positions=True, backend=backend).to(dtype)
    mixer.load_state_dict({k: v.to(dtype) for k, v in ours(golden, "weight.").items()})
    x = golden["x"].to(dtype).requires_grad_()
    assert x.shape[1] == length
    out = mixer(x)
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    kind = str(dtype).removeprefix("torch.")
    right = {"x": golden[f"{kind}/grad.x"], **ours(golden, f"{kind}/grad.")}
    assert right.keys() == leaves.keys()
    for name, got, expected in [
        ("output", out, golden[f"{kind}/output"]),
        *((k, g, right[k]) for k, g in zip(leaves, gradients, strict=True)),
    ]:
        assert got.shape == expected.shape, name
        assert difference(got, expected) <= ALLOWED[dtype] * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("order", [2, 3])
def test_definition_token_by_token(order: int) -> None:
    """The convolutions as sums over all tokens before, the kernel's formula of the paper, in plain loops."""
    torch.manual_seed(0)
    length, dim, l_max = 7, 3, 11
    mixer = Hyena(dim, order=order, l_max=l_max, filter_order=4, emb_dim=5).double()
    x = torch.randn(1, length, dim, dtype=torch.float64)
    u, short = mixer.in_proj(x)[0], mixer.conv.weight
    mixed = mixer.conv.bias + sum(
        short[2 - j] * torch.cat([torch.zeros(j, u.shape[1], dtype=torch.float64), u[: length - j]]) for j in range(3)
    )
    parts = mixed.chunk(order + 1, dim=1)
    z = parts[-1]
    for o in range(order - 1):
        gated = z * parts[order - 1 - o]
        rows = []
        for t in range(length):
            total = mixer.skip[o] * gated[t]
            for s in range(t + 1):
                total = total + tap(mixer, t - s)[o * dim : (o + 1) * dim] * gated[s]
            rows.append(total)
        z = torch.stack(rows)
    right = mixer.out_proj(z * parts[0])
    assert difference(mixer(x)[0], right) < 1e-12


def tap(mixer: Hyena, n: int) -> Tensor:
    made = mixer.filter
    time = n / (made.l_max - 1)
    bands = [1e-4 + i * (made.emb_dim // 2 - 1 - 1e-4) / (made.emb_dim // 2 - 1) for i in range(made.emb_dim // 2)]
    angles = [2 * math.pi * band * n / made.l_max for band in bands]
    h = torch.tensor([time, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64)
    for layer in made.layers:
        h = torch.sin(made.freq * (layer.weight @ h + layer.bias))
    channels = made.out.weight.shape[0]
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    rates = torch.tensor([slow + i * (fast - slow) / (channels - 1) for i in range(channels)], dtype=torch.float64)
    return (made.out.weight @ h) * (torch.exp(-rates * time) + 0.05)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_decoding_is_the_parallel_form_with_gradients(dtype: torch.dtype, order: int) -> None:
    torch.manual_seed(0)
    mixer = Hyena(8, order=order, l_max=80).to(dtype)
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
        # What is compared at 1e-5 in float32 is the whole of the gradients: the networks' are sums of thousands.
        flat = [torch.cat([g.flatten() for g in torch.autograd.grad((got * weight).sum(), leaves)])]
        for a, b in zip([got, *flat], [right, torch.cat([g.flatten() for g in expected])], strict=True):
            assert difference(a, b) <= ALLOWED[dtype] * max(1.0, b.abs().max().item())


def test_state_grows_by_one_number_a_channel_and_can_branch() -> None:
    torch.manual_seed(0)
    mixer = Hyena(8, l_max=4096).double().eval()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    with torch.no_grad():
        state = mixer.init_state(2)
        empty = state_bytes(state)
        assert empty == state.past.nbytes + 4096 * 8 * 8
        _, state = mixer.step(x[:, :20], state)
        branch = state.select(torch.tensor([1]))
        a, _ = mixer.step(x[:, 20:], state)
        b, _ = mixer.step(x[1:, 20:], branch)
        assert torch.allclose(a[1:], b, rtol=0, atol=1e-14)
        assert state.read[0].keys.nbytes == 2 * 30 * 8 * 8


def test_a_step_computes_as_many_products_as_tokens_it_reads() -> None:
    """No filter network and no transform in a step: work grows by the context alone."""
    from core_attn.testing import growth

    mixer = Hyena(8, l_max=4096).eval()
    work = []
    with torch.no_grad():
        for context in (1000, 2000):
            _, state = mixer.step(torch.randn(1, context, 8), mixer.init_state(1))
            _, state = mixer.step(torch.randn(1, 1, 8), state)  # makes room
            token = torch.randn(1, 1, 8)
            work.append(growth.count(lambda token=token, state=state: mixer.step(token, state)).work)
    assert 1.5 < work[1] / work[0] < 2.1


def test_bfloat16_kernels_are_made_in_float32() -> None:
    torch.manual_seed(0)
    mixer = Hyena(8, l_max=4096).bfloat16()
    made = mixer.filter(3000)
    assert made.dtype is torch.float32
    right = Hyena(8, l_max=4096).double()
    right.load_state_dict({k: v.double() for k, v in mixer.state_dict().items()})
    assert difference(made, right.filter(3000)) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.filter(3000), made)


def test_filter_and_transforms_are_counted() -> None:
    from core_attn.testing import growth

    mixer = Hyena(8, filter_order=16)
    x = torch.randn(2, 100, 8)
    with torch.no_grad():
        flops = growth.count(lambda: mixer(x)).flops
    points = fast_size(199)
    products = 8 * 2 * 100 * 64 + 2 * 100 * (5 * 16 + 2 * 256 + 16 * 8)
    assert flops == pytest.approx(products + 2.5 * 5 * 8 * points * math.log2(points))


@pytest.mark.parametrize(
    "options",
    [
        {"order": 3, "filter_order": 8},
        {"learn_positions": True, "l_max": 129, "filter_order": 8},
        {"emb_dim": 3, "short_size": 1, "w": 1, "filter_order": 4},
    ],
)
def test_contract_of_options(options: dict[str, Any]) -> None:
    skip = ["compile", "export", "strides", "state_dict", "growth_time", "growth_memory", "determinism", "cost"]
    check_mechanism("hyena", skip=skip, **options)


def test_too_long_is_refused() -> None:
    mixer = Hyena(4, l_max=10)
    with pytest.raises(ValueError, match="at most l_max=10 tokens, got 11"):
        mixer(torch.randn(1, 11, 4))
    _, state = mixer.step(torch.randn(1, 9, 4), mixer.init_state(1))
    with pytest.raises(ValueError, match="at most l_max=10 tokens, got 11"):
        mixer.step(torch.randn(1, 2, 4), state)


@pytest.mark.parametrize(
    "options",
    [
        {"order": 1},
        {"l_max": 1},
        {"filter_order": 0},
        {"emb_dim": 4},
        {"emb_dim": 1},
        {"short_size": 0},
        {"causal": False},
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{10,300}$"):
        core_attn.build("hyena", dim=8, **{"causal": True, **options})


def difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()
