"""Flow-Attention: the linear form is its definition, padding is no flow, decoding continues where it stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core_attn import ops
from core_attn.ops.flow import FlowState, flow_attention_step
from core_attn.ops.flow.reference import flow_map
from core_attn.testing import growth


def _inputs(length: int, keys: int, batch: int = 3, heads: int = 2, width: int = 4, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + keys)
    sizes = ((length, width), (keys, width), (keys, width + 1))
    return [
        (scale * torch.randn(batch, heads, n, d, generator=generator, dtype=torch.float64)).requires_grad_()
        for n, d in sizes
    ]


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(
    ("length", "keys", "causal"),
    [(n, n, causal) for causal in (False, True) for n in (1, 2, 3, 63, 64, 65, 131)] + [(7, 30, False), (30, 7, False)],
)
def test_linear_form_is_the_definition(length: int, keys: int, causal: bool, clamp: bool, padded: bool) -> None:
    qkv = _inputs(length, keys)
    masks: dict[str, Tensor] = {}
    if padded:
        mask = torch.rand(3, keys, generator=torch.Generator().manual_seed(0)) > 0.4
        mask[0] = False  # nothing real at all
        masks = {"key_padding_mask": mask} | ({"query_padding_mask": mask} if length == keys else {})
    fast, slow = (
        ops.flow_attention(*qkv, causal=causal, clamp=clamp, **masks, backend=b) for b in ("torch", "reference")
    )
    assert fast.shape == (3, 2, length, 5)
    assert _off(fast, slow) < 1e-12
    if padded:
        assert not fast[0].any()
    upstream = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, qkv, upstream), torch.autograd.grad(slow, qkv, upstream), strict=True):
        assert _off(a, b) < 1e-11


def test_padding_is_as_if_the_tokens_were_not_there() -> None:
    q, k, v = _inputs(20, 20, batch=1)
    mask = torch.arange(20).unsqueeze(0) < 13
    for causal in (False, True):
        short = ops.flow_attention(q[:, :, :13], k[:, :, :13], v[:, :, :13], causal=causal)
        padded = ops.flow_attention(q, k, v, causal=causal, key_padding_mask=mask, query_padding_mask=mask)
        assert _off(padded[:, :, :13], short) < 1e-13
        assert not padded[:, :, 13:].any()


def test_causal_padding_at_the_start_is_as_if_it_were_not_there() -> None:
    q, k, v = _inputs(20, 20, batch=1)
    mask = torch.arange(20).unsqueeze(0) >= 7
    late = ops.flow_attention(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], causal=True)
    padded = ops.flow_attention(q, k, v, causal=True, key_padding_mask=mask)
    assert _off(padded[:, :, 7:], late) < 1e-13


def test_flows_are_conserved() -> None:
    """The paper's point: normalised by the outgoing flow, every source sends out one, so the sinks' inflows add up."""
    q, k, _ = (x.detach() for x in _inputs(15, 22))
    phi_q, phi_k = torch.sigmoid(q), torch.sigmoid(k)
    outgoing = (phi_k * phi_q.sum(2, keepdim=True)).sum(-1, keepdim=True)
    conserved_sink = (phi_q * (phi_k / outgoing).sum(2, keepdim=True)).sum(-1)
    assert torch.allclose(conserved_sink.sum(-1), torch.full((3, 2), 22.0, dtype=torch.float64))


def test_clamp_decides_only_where_it_bites() -> None:
    # One key takes far more of the flow than its share: its conserved source passes 1.
    q, k, v = (x.detach() for x in _inputs(30, 30))
    k[:, :, 0] = 20.0
    k[:, :, 1:] = -3.0
    assert _off(ops.flow_attention(q, k, v), ops.flow_attention(q, k, v, clamp=False)) > 1e-3


def test_causal_form_survives_what_would_overflow_without_a_clamp() -> None:
    q, k, v = (x.detach().float() for x in _inputs(200, 200))
    k[:, :, 100:] = 50.0
    k[:, :, :100] = -80.0
    q[:] = -80.0
    out = ops.flow_attention(q, k, v, causal=True, clamp=False)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_map(causal: bool) -> None:
    q, k, v = _inputs(70, 70)
    weights = flow_map(q, k, causal=causal)
    assert _off(weights @ v, ops.flow_attention(q, k, v, causal=causal)) < 1e-12
    assert bool(weights.triu(1).any()) is not causal


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("pieces", [[1] * 70, [70], [64, 1, 5], [3, 66, 1]], ids=len)
def test_steps_are_the_parallel_form(pieces: list[int], clamp: bool) -> None:
    q, k, v = _inputs(70, 70)
    state = FlowState.empty(3, 2, 4, 5, dtype=torch.float64)
    outs = []
    for piece in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), strict=True):
        out, state = flow_attention_step(*piece, state, clamp=clamp)
        outs.append(out)
    right = ops.flow_attention(q, k, v, causal=True, clamp=clamp)
    assert _off(torch.cat(outs, dim=2), right) < 1e-12
    # Gradients flow through the state.
    upstream = torch.randn_like(right)
    stepped = torch.autograd.grad(torch.cat(outs, dim=2), (q, k, v), upstream)
    for a, b in zip(stepped, torch.autograd.grad(right, (q, k, v), upstream), strict=True):
        assert a.isfinite().all()
        assert _off(a, b) < 1e-11


def test_no_state_for_every_token() -> None:
    """The paper's causal code keeps L states of D x D; here it is one a chunk."""
    q, k, v = (torch.randn(1, 1, 1024, 32).requires_grad_() for _ in range(3))
    used = growth.count(lambda: ops.flow_attention(q, k, v, causal=True).sum().backward())
    assert used.peak_bytes < 1024 * 32 * 32 * 4


@pytest.mark.parametrize("causal", [False, True])
def test_growth(causal: bool) -> None:
    counts = []
    for length in (512, 16384):
        q, k, v = (torch.randn(1, 1, length, 8).requires_grad_() for _ in range(3))
        counts.append(growth.count(lambda q=q, k=k, v=v: ops.flow_attention(q, k, v, causal=causal).sum().backward()))
    assert counts[1].work / counts[0].work < 33
    assert counts[1].peak_bytes / counts[0].peak_bytes < 33


def test_errors() -> None:
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"shape \(B, H, L, D\)"):
        ops.flow_attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="one width"):
        ops.flow_attention(q[..., :3], k, v)
    with pytest.raises(ValueError, match="as many queries as keys"):
        ops.flow_attention(q[:, :, :3], k, v, causal=True)
