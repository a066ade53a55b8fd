"""DeltaNet against its equations, computed in another way, with the delta rule of flash-linear-attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core_attn
from core_attn.mechanisms.conv.short import ShortConvolution

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def delta_rule_recurrence() -> Callable[..., tuple[Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.delta_rule.naive import delta_rule_recurrence
    return delta_rule_recurrence


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def by_hand(mixer: Any, x: Tensor, rule: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """DeltaNet written down once more: nn.functional.conv1d, normalize, a loop over tokens."""
    mixed = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        kernel = mixer.conv.weight.T.unsqueeze(1)
        padded = F.pad(mixed.transpose(1, 2), (mixer.conv.size - 1, 0))
        mixed = F.conv1d(padded, kernel, groups=mixed.shape[2]).transpose(1, 2)
    q, k, v = (F.silu(part).unflatten(2, (mixer.heads, -1)).transpose(1, 2) for part in mixed.split(mixer.dim, dim=2))
    q, k = (y / (y.norm(dim=-1, keepdim=True).square() + mixer.eps).sqrt() for y in (q, k))
    beta = torch.sigmoid(x @ mixer.beta_proj.weight.T).transpose(1, 2) * mixer.strongest
    out, _ = rule(q, k, v, beta)
    out = out * (out.square().mean(-1, keepdim=True) + mixer.eps) ** -0.5 * mixer.norm.weight
    return out.transpose(1, 2).flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"conv_size": 0}, {"allow_neg_eigval": True, "conv_size": 3}], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_delta_net_is_its_equations(
    dtype: torch.dtype, options: dict[str, Any], delta_rule_recurrence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("delta_net", dim=12, heads=3, causal=True, **options).to(dtype)
    with torch.no_grad():
        mixer.norm.weight.normal_()  # type: ignore[union-attr]
    x = torch.randn(2, 70, 12, dtype=dtype, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    weight = torch.linspace(-1, 1, 12, dtype=dtype)
    out = mixer(x)
    found = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
    with monkeypatch.context() as patch:
        if dtype is torch.float64:  # the oracle works in float32
            patch.setattr(Tensor, "float", Tensor.double)
        out = by_hand(mixer, x, delta_rule_recurrence)
    right = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
    for a, b in zip(found, right, strict=True):
        assert error(a, b) < LIMIT[dtype]


def test_delta_net_refuses() -> None:
    with pytest.raises(ValueError, match="noncausal"):
        core_attn.build("delta_net", dim=8, heads=2)
    with pytest.raises(ValueError, match="heads must divide dim"):
        core_attn.build("delta_net", dim=8, heads=3, causal=True)
    with pytest.raises(ValueError, match="conv_size"):
        core_attn.build("delta_net", dim=8, heads=2, causal=True, conv_size=-1)


def test_delta_net_state_is_selected_by_sample() -> None:
    mixer = core_attn.build("delta_net", dim=8, heads=2, causal=True).double()
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    _, state = mixer.step(x[:, :5], mixer.init_state(3))
    rows = torch.tensor([2, 0])
    out, _ = mixer.step(x[rows, 5:], state.select(rows))
    assert error(out, mixer(x)[rows, 5:]) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 4])
def test_short_convolution(size: int) -> None:
    conv = ShortConvolution(6, size, bias=True).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    assert conv.bias is not None
    padded = F.pad(x.transpose(1, 2), (size - 1, 0))
    right = F.conv1d(padded, conv.weight.T.unsqueeze(1), conv.bias, groups=6).transpose(1, 2)
    out, past = conv(x)
    assert error(out, right) < 1e-14
    pieces, past = [], conv.init_past(2)
    for piece in x.split([1, 1, 5, 4], dim=1):
        out, past = conv(piece, past)
        pieces.append(out)
    assert error(torch.cat(pieces, dim=1), right) < 1e-14
    with pytest.raises(ValueError, match="at least one tap"):
        ShortConvolution(6, 0)
