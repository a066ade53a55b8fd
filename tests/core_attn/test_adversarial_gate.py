"""Adversarial attention gates against their equation, pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from core_attn.mechanisms.channel.adversarial_gate import AdversarialGate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = 1e-13 if dtype is torch.float64 else 1e-6
    gate = AdversarialGate(5, 4, axes=len(shape)).to(dtype)
    torch.nn.init.normal_(gate.maps.bias)
    x, read = (torch.randn(2, n, *shape, dtype=dtype) for n in (3, 5))
    found, maps = gate(x, read)
    assert maps.shape == (2, 4, *shape)
    weight, bias = gate.maps.weight.flatten(1).tolist(), gate.maps.bias.tolist()
    for b in range(2):
        for at in range(math.prod(shape)):
            y, own, gated = (one[b].flatten(1)[:, at].tolist() for one in (read, x, found))
            e = [math.exp(sum(w * v for w, v in zip(weight[k], y)) + bias[k]) for k in range(4)]
            assert maps[b].flatten(1)[:, at].tolist() == pytest.approx([one / sum(e) for one in e], abs=tolerance)
            assert gated == pytest.approx([v * (e[1] + e[2] + e[3]) / sum(e) for v in own], abs=10 * tolerance)


def test_one_map_gates_itself() -> None:
    gate = AdversarialGate(3, 2).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for found, wanted in zip(gate(x), gate(x, x)):
        assert torch.equal(found, wanted)
    assert torch.autograd.gradcheck(gate, (x,))
    # All background lets nothing through, and none of it everything.
    with torch.no_grad():
        gate.maps.weight.zero_()
        gate.maps.bias.copy_(torch.tensor([100.0, 0.0]))
        assert gate(x)[0].abs().max() < 1e-30
        gate.maps.bias.copy_(torch.tensor([-100.0, 0.0]))
        assert torch.equal(gate(x)[0], x)


def test_bad_input_is_one_sentence() -> None:
    def fails(says: str, call: Any) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)

    gate = AdversarialGate(4, 3)
    x = torch.randn(2, 4, 5, 5)
    fails("classes 2 or more", lambda: AdversarialGate(4, 1))
    fails("axes 2 or 3", lambda: AdversarialGate(4, 3, axes=1))
    fails("reads a map of 4 channels and 2 axes", lambda: gate(x[:, 1:]))
    fails("the grid of what is read", lambda: gate(x[..., 1:], x))
    fails("the grid of what is read", lambda: gate(x[:1], x))


def test_compiles() -> None:
    gate = AdversarialGate(4, 3).eval()
    x = torch.randn(2, 4, 6, 5)
    compiled: Any = torch.compile(gate, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(x), gate(x)):
        assert torch.allclose(found, wanted, atol=1e-6)
