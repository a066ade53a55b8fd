"""Titans against its equations, written down once more with loops over tokens and over pairs of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core_attn

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def build(dim: int = 12, heads: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    mixer = core_attn.build("titans", dim=dim, heads=heads, causal=True, **options)
    with torch.no_grad():  # what starts at one or zero would hide whatever it multiplies
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def with_gradients(mixer: Any, x: Tensor, out: Tensor) -> list[Tensor]:
    """Outputs, gradients of the tokens, and of the parameters: in float64 of each, in float32 of all together.

    Behind the norm the first token's outputs do not depend on its step, and large gradients cancel in that of a gate's
    bias: rounding alone is up to 2e-5 of it, with the operator's reference too.
    """
    weight = torch.linspace(-1, 1, out.shape[2], dtype=out.dtype)
    dx, *rest = torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()])
    return [out, dx, *(rest if out.dtype is torch.float64 else [torch.cat([d.flatten() for d in rest])])]


def rms(x: Tensor, norm: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.eps) ** -0.5 * norm.weight


def memory_by_hand(mixer: Any, x: Tensor) -> Tensor:
    mixed = x @ mixer.qkv_proj.weight.T
    if mixer.conv is not None:
        padded = F.pad(mixed.transpose(1, 2), (mixer.conv.size - 1, 0))
        mixed = F.conv1d(padded, mixer.conv.weight.T.unsqueeze(1), groups=mixed.shape[2]).transpose(1, 2)
    q, k, v = (y.unflatten(2, (mixer.heads, -1)) for y in F.silu(mixed).split(mixer.dim, dim=2))
    q, k = (y / (y.square().sum(-1, keepdim=True) + mixer.eps).sqrt() for y in (q, k))
    gates = x @ mixer.gate_proj.weight.T + mixer.gate_proj.bias
    alpha, eta, theta = torch.sigmoid(gates).unflatten(2, (3, mixer.heads)).unbind(2)
    if mixer.bounded:
        theta = theta * (1 - eta) / mixer.chunk
    memory = surprise = x.new_zeros(x.shape[0], mixer.heads, mixer.head_dim, mixer.head_dim)
    outs = []
    for t in range(x.shape[1]):
        if t % mixer.chunk == 0:
            anchor = memory
        wrong = torch.einsum("bhd,bhde->bhe", k[:, t], anchor) - v[:, t]
        gradient = 2 * torch.einsum("bhd,bhe->bhde", k[:, t], wrong)
        surprise = eta[:, t, :, None, None] * surprise - theta[:, t, :, None, None] * gradient
        memory = (1 - alpha[:, t, :, None, None]) * memory + surprise
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], memory))
    gate = F.silu(x @ mixer.out_gate_proj.weight.T)
    return (rms(torch.stack(outs, dim=1), mixer.norm).flatten(2) * gate) @ mixer.out_proj.weight.T


def by_hand(mixer: Any, x: Tensor) -> Tensor:
    first = 0 if mixer.persistent is None else mixer.persistent.shape[0]
    if first:
        x = torch.cat([mixer.persistent.repeat(x.shape[0], 1, 1), x], dim=1)
    out = memory = memory_by_hand(mixer, x)
    if mixer.variant != "lmm":
        given = memory if mixer.variant == "mal" else x
        parts = (given @ mixer.attn_qkv_proj.weight.T).split(mixer.dim, dim=2)
        q, k, v = (y.unflatten(2, (mixer.heads, -1)).transpose(1, 2) for y in parts)
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        seen = (j <= i) & ((i - j < mixer.window) | (j < first))
        scores = (q @ k.transpose(-1, -2) / mixer.head_dim**0.5).masked_fill(~seen, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ mixer.attn_out_proj.weight.T
        if mixer.variant == "mag":
            out = rms(out, mixer.attn_norm) * torch.sigmoid(rms(memory, mixer.memory_norm))
    return out[:, first:]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"conv_size": 0, "bounded": False},
    {"chunk": 16},
    {"persistent": 3, "conv_size": 2},
    {"variant": "mag", "window": 7},
    {"variant": "mag", "window": 100, "persistent": 0},
    {"variant": "mal", "window": 7, "chunk": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_titans_is_its_equations(dtype: torch.dtype, options: dict[str, Any]) -> None:
    mixer = build(**options).to(dtype)
    x = torch.randn(2, 70, 12, dtype=dtype, requires_grad=True)
    found, right = (with_gradients(mixer, x, out) for out in (mixer(x), by_hand(mixer, x)))
    for a, b in zip(found, right, strict=True):
        assert error(a, b) < LIMIT[dtype]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding_is_the_whole(options: dict[str, Any]) -> None:
    """Token by token and in pieces, from the persistent tokens on, past the window; gradients reach them too."""
    for dtype, limit in LIMIT.items():
        mixer = build(**options).to(dtype)
        x = torch.randn(2, 40, 12, dtype=dtype, requires_grad=True)
        right = with_gradients(mixer, x, mixer(x))
        for pieces in ([1] * 40, [9, 1, 1, 22, 7]):
            state, outs = mixer.init_state(2, dtype=dtype), []
            for piece in x.split(pieces, dim=1):
                out, state = mixer.step(piece, state)
                outs.append(out)
            for a, b in zip(with_gradients(mixer, x, torch.cat(outs, dim=1)), right, strict=True):
                assert error(a, b) < limit


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_are_selected_by_sample(options: dict[str, Any]) -> None:
    mixer = build(**options).double()
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer.step(x[:, :6], mixer.init_state(3))
        rows = torch.tensor([2, 0])
        out, _ = mixer.step(x[rows, 6:], state.select(rows))
        assert error(out, mixer(x)[rows, 6:]) < 1e-12


@pytest.mark.parametrize("keys", ["random", "few"])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_bounded_steps_do_not_make_the_memory_grow_where_free_ones_do(momentum: float, keys: str) -> None:
    """Steps as long as the gates allow, long momentum, nothing forgotten: 10,000 tokens, all new or a few in turn."""
    torch.manual_seed(1)
    x = torch.randn(1, 10_000, 12) if keys == "random" else torch.randn(8, 12)[torch.randint(8, (1, 10_000))]
    largest = {}
    for bounded in (True, False):
        mixer = core_attn.build("titans", dim=12, heads=1, causal=True, bounded=bounded)
        with torch.no_grad():
            mixer.gate_proj.weight.zero_()  # type: ignore[union-attr, operator]
            gates = torch.tensor([-50.0, torch.logit(torch.tensor(momentum)), 50.0])
            mixer.gate_proj.bias.copy_(gates)  # type: ignore[union-attr, operator]
            _, state = mixer.step(x, mixer.init_state(1))
        largest[bounded] = state.memory.memory.abs().max().item()
    assert largest[True] < 1000
    assert not largest[False] < 1e6  # NaN counts as grown


def test_persistent_tokens_are_learned_by_the_memory_and_always_read() -> None:
    """Without any memory output, the attention of a window of one token still reads them."""
    mixer = build(variant="mag", window=1).double()
    x = torch.randn(1, 30, 12, dtype=torch.float64)
    before = mixer(x)
    with torch.no_grad():
        mixer.persistent.add_(1.0)
    assert ((mixer(x) - before).abs().amax(-1) > 1e-3).all()
    alone = build(variant="lmm", persistent=2).double()
    before = alone(x)
    with torch.no_grad():
        alone.persistent.add_(1.0)
    assert ((alone(x) - before).abs().amax(-1) > 1e-6).all()


def test_padding_leaves_memory_and_momentum_alone() -> None:
    """Padding at the end changes no real token, whatever is under it; with it in front only positions are behind."""
    for options in OPTIONS:
        mixer = build(**options).double()
        x = torch.randn(2, 20, 12, dtype=torch.float64)
        mask = torch.arange(20) < torch.tensor([[20], [13]])
        out = mixer(x.masked_fill(~mask[..., None], torch.nan), key_padding_mask=mask)
        assert error(out[1:, :13], mixer(x[1:, :13])) < 1e-12
        assert error(out[:1], mixer(x[:1])) < 1e-12
    mixer = build(conv_size=0).double()
    mask = torch.rand(1, 20) < 0.6
    out = mixer(x[:1], key_padding_mask=mask)
    assert error(out[mask], mixer(x[:1][mask][None])[0]) < 1e-12


def test_titans_refuses() -> None:
    with pytest.raises(ValueError, match="noncausal"):
        core_attn.build("titans", dim=8, heads=2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"heads": 3}, "heads must divide dim"),
        ({"conv_size": -1}, "conv_size"),
        ({"variant": "mac"}, "variant"),
        ({"chunk": 0}, "chunk and window must be at least 1"),
        ({"window": 0}, "chunk and window must be at least 1"),
        ({"persistent": -1}, "persistent must be at least 0"),
    ]
    for options, says in cases:
        with pytest.raises(ValueError, match=says):
            core_attn.build("titans", **{"dim": 8, "heads": 2, "causal": True, **options})
