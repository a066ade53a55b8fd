"""Attention gates against MONAI's, and against their equation pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.networks.nets.attentionunet import AttentionBlock
from torch import Tensor
from torch.nn import functional as F

from core_attn.mechanisms.channel.attention_gate import AttentionGate
from core_attn.naming import UnknownNameError

OURS = {"W_g.0.conv": "signal", "W_g.1": "signal_norm", "W_x.0.conv": "input", "W_x.1": "input_norm"}
OURS |= {"psi.0.conv": "psi", "psi.1": "psi_norm"}


def renamed(official: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in official.items():
        module, _, kind = key.rpartition(".")
        found[f"{OURS[module]}.{kind}"] = value
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
def test_sum_is_monais(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    block = AttentionBlock(len(shape), f_int=4, f_g=6, f_l=8).to(dtype).train(training)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    gate = AttentionGate(8, 6, hidden=4, axes=len(shape)).to(dtype).train(training)
    gate.load_state_dict(renamed(block.state_dict()))
    x, g = (torch.randn(2, n, *shape, dtype=dtype, requires_grad=True) for n in (8, 6))
    found, right = gate(x, g), block(g, x)
    assert (found - right).abs().max() <= tolerance
    probe = torch.cos(torch.arange(right.numel(), dtype=dtype)).view_as(right)
    own = dict(
        zip(["x", "g", *dict(gate.named_parameters())], torch.autograd.grad(found, [x, g, *gate.parameters()], probe))
    )
    theirs = torch.autograd.grad(right, [x, g, *block.parameters()], probe)
    wanted = dict(zip(["x", "g"], theirs)) | renamed(dict(zip(dict(block.named_parameters()), theirs[2:])))
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (own[name] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max()), name
    after = renamed(block.state_dict())
    for name, value in gate.state_dict().items():
        assert (value - after[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("form", ["sum", "concat"])
def test_definition_is_the_sum_it_says(form: str) -> None:
    """One pixel, one channel at a time, in Python floats; the batch norms with statistics as evaluation uses them."""
    torch.manual_seed(0)
    gate = AttentionGate(3, 2, hidden=2, form=form).double()
    for norm in (gate.signal_norm, gate.input_norm, gate.psi_norm):
        for t in (norm.weight.data, norm.bias.data, norm.running_mean):
            t.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    gate.eval()
    x, g = (torch.randn(1, n, 2, 3, dtype=torch.float64) for n in (3, 2))

    def normed(norm: torch.nn.Module, values: list[float]) -> list[float]:
        stats = zip(
            values, norm.running_mean.tolist(), norm.running_var.tolist(), norm.weight.tolist(), norm.bias.tolist()
        )
        return [(v - m) / math.sqrt(s + 1e-5) * w + b for v, m, s, w, b in stats]

    def at(convolution: torch.nn.Module, values: list[float]) -> list[float]:
        rows = zip(convolution.weight.flatten(1).tolist(), convolution.bias.tolist())
        return [sum(w * v for w, v in zip(row, values)) + b for row, b in rows]

    out = gate(x, g)
    for i in range(2):
        for j in range(3):
            read = normed(gate.signal_norm, at(gate.signal, g[0, :, i, j].tolist()))
            own = normed(gate.input_norm, at(gate.input, x[0, :, i, j].tolist()))
            joined = [a + b for a, b in zip(read, own)] if form == "sum" else [*read, *own]
            (score,) = normed(gate.psi_norm, at(gate.psi, [max(0.0, v) for v in joined]))
            for c in range(3):
                assert out[0, c, i, j].item() == pytest.approx(x[0, c, i, j].item() / (1 + math.exp(-score)), abs=1e-13)


@pytest.mark.parametrize(("fine", "coarse"), [((8, 8), (4, 4)), ((7, 9), (4, 5)), ((5, 6, 7), (3, 3, 4))])
def test_coarse_signals_are_interpolated(fine: tuple[int, ...], coarse: tuple[int, ...]) -> None:
    """After the convolution, which is the same as before it."""
    torch.manual_seed(0)
    for form in ("sum", "concat"):
        gate = AttentionGate(4, 6, axes=len(fine), form=form).double()
        x, g = torch.randn(2, 4, *fine, dtype=torch.float64), torch.randn(2, 6, *coarse, dtype=torch.float64)
        wide = F.interpolate(g, size=fine, mode="bilinear" if len(fine) == 2 else "trilinear")
        assert (gate(x, g) - gate(x, wide)).abs().max() < 1e-12
        gates = gate.gate(x, g)
        assert gates.shape == (2, 1, *fine)
        assert torch.equal(gate.eval()(x, g), x * gate.gate(x, g))
        assert 0 < gates.min() < gates.max() < 1


def test_without_norms_gradcheck() -> None:
    gate = AttentionGate(3, 2, norm=False, form="concat").double()
    x, g = (torch.randn(1, n, *s, dtype=torch.float64, requires_grad=True) for n, s in ((3, (4, 4)), (2, (2, 2))))
    assert torch.autograd.gradcheck(gate, (x, g))


def test_bad_input_is_one_sentence() -> None:
    def fails(error: type[Exception], says: str, call: Any) -> None:
        with pytest.raises(error, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)

    gate = AttentionGate(4, 6)
    x, g = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    fails(ValueError, "axes 2 or 3", lambda: AttentionGate(4, 6, axes=4))
    fails(UnknownNameError, "concat", lambda: AttentionGate(4, 6, form="concatenate"))
    fails(ValueError, "of 2 axes", lambda: gate(x[0], g))
    fails(ValueError, "4 channels and a signal of 6", lambda: gate(g, x))
    fails(ValueError, "one batch size", lambda: gate(x, g[:1]))


def test_compiles() -> None:
    gate = AttentionGate(4, 6).eval()
    x, g = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    compiled: Any = torch.compile(gate, backend="aot_eager", fullgraph=True)
    found: Tensor = compiled(x, g)
    torch.testing.assert_close(found, gate(x, g))
