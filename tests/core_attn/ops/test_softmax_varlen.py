"""Packed sequences: each is what it would be alone."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.dispatch import BackendError
from core_attn.ops import softmax_attention, softmax_attention_varlen


def packed(
    queries: list[int], keys: list[int], *, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    q = torch.randn(sum(queries), heads, 8, dtype=torch.float64)
    k, v = (torch.randn(sum(keys), key_heads, n, dtype=torch.float64) for n in (8, 5))
    offsets = {
        name: torch.tensor([0, *n]).cumsum(0).to(torch.int32)
        for name, n in (("offsets_q", queries), ("offsets_k", keys))
    }
    return tuple(x.to(dtype).requires_grad_() for x in (q, k, v)), offsets


def alone(tensors: tuple[Tensor, ...], offsets: dict[str, Tensor], **options: Any) -> Tensor:
    """Each sequence by itself, by the definition."""
    q, k, v = tensors
    outs = [
        softmax_attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), backend="reference", **options)[
            0
        ].transpose(0, 1)
        for (a, b), (c, d) in zip(pairwise(offsets["offsets_q"].tolist()), pairwise(offsets["offsets_k"].tolist()))
    ]
    return torch.cat(outs)


def outcome(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_random_draws(backend: str) -> None:
    draw = random.Random(0)
    for seed in range(200):
        torch.manual_seed(seed)
        number = draw.choice([1, 2, 5])
        queries = [draw.choice([0, 1, 2, 7, 13, 31]) for _ in range(number)]
        keys = queries if draw.random() < 0.5 else [draw.choice([0, 1, 3, 11, 37]) for _ in range(number)]
        dtype = draw.choice([torch.float64, torch.float32])
        leaves, offsets = packed(queries, keys, dtype=dtype)
        options = {"causal": draw.random() < 0.5, "window": draw.choice([None, 1, 4, (3, 0), (None, 2)])}
        found = outcome(softmax_attention_varlen(*leaves, **offsets, **options, backend=backend), leaves)
        exact = tuple(x.detach().double().requires_grad_() for x in leaves)
        for a, b in zip(found, outcome(alone(exact, offsets, **options), exact)):
            assert a.dtype is dtype
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-12 if dtype is torch.float64 else 1e-5)


def test_a_window_and_causality_are_each_sequences_own() -> None:
    leaves, offsets = packed([6, 4], [6, 4])
    out = softmax_attention_varlen(*leaves, **offsets, causal=True)
    (changed,) = torch.autograd.grad(out[6].sum(), leaves[2])
    assert changed.abs().sum((1, 2)).nonzero().flatten().tolist() == [6]


def test_auto_on_the_cpu_is_the_blocked_loop() -> None:
    from core_attn.ops.softmax.varlen import OPERATOR

    leaves, offsets = packed([3], [3])
    assert softmax_attention_varlen(*leaves, **offsets).shape == (3, 4, 5)
    names = [b.name for b in OPERATOR.backends]
    assert names == ["triton", "torch", "reference"]
    with pytest.raises(BackendError, match=r"triton.*(CUDA|float64)"):
        softmax_attention_varlen(*leaves, **offsets, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 2, 3, 4)}, r"shapes \(T, H, D\)"),
        ({"q": torch.randn(5, 3, 8)}, "2 heads of k and v must divide the 3 heads of q"),
        ({"q": torch.randn(5, 4, 8).half()}, "one floating dtype"),
        ({"offsets_q": torch.tensor([0, 3, 4])}, "offsets_q must rise from 0 to the 5 packed rows"),
        ({"offsets_q": torch.tensor([1, 3, 5])}, "offsets_q must rise from 0"),
        ({"offsets_k": torch.tensor([0, 9, 7])}, "offsets_k must rise from 0 to the 7 packed rows"),
        ({"offsets_k": torch.tensor([0, 7])}, "as many sequences, got 2 and 1"),
        ({"offsets_k": torch.tensor([0.0, 3.0, 7.0])}, r"int32 or int64 of shape \(N \+ 1,\)"),
        ({"offsets_k": torch.tensor([0])}, r"int32 or int64 of shape \(N \+ 1,\)"),
        ({"window": 0}, "window must be at least 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.randn(5, 4, 8),
        "k": torch.randn(7, 2, 8),
        "v": torch.randn(7, 2, 8),
        "offsets_q": torch.tensor([0, 3, 5]),
        "offsets_k": torch.tensor([0, 3, 7]),
    }
    with pytest.raises(ValueError, match=message):
        softmax_attention_varlen(**{**good, **change})


def test_autocast() -> None:
    leaves, offsets = packed([3, 2], [3, 2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert softmax_attention_varlen(*leaves, **offsets).dtype is torch.bfloat16
