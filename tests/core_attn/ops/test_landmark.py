"""landmark_attention: the tiled form is the definition, the definition is the grouped softmax of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.ops import landmark_attention, softmax_attention
from core_attn.ops.landmark import blocked, reference
from core_attn.testing import growth


def inputs(
    queries: int, keys: int, block: int, *, batch: int = 2, heads: int = 4, key_heads: int = 4, channels: int = 8
) -> list[Tensor]:
    shapes = (
        (batch, heads, queries, channels),
        (batch, key_heads, keys, channels),
        (batch, key_heads, keys, 6),
        (batch, key_heads, -(-keys // block), channels),
    )
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    q, k, v, landmarks = leaves
    out = landmark_attention(q, k, v, landmarks=landmarks, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def worst(got: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference relative to the largest value, over all tensors; infinite where one is not finite."""
    errors = [0.0]
    for a, b in zip(got, right, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.numel():
            error = (a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0)
            errors.append(float(error) if error.isfinite() else float("inf"))
    return max(errors)


@pytest.mark.parametrize("part", range(4))
def test_200_random_draws(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(part)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, ()))

    for draw in range(50):
        monkeypatch.setattr(blocked, "_SCORES_ON_CPU", number(1, 4000))
        key_heads, batch = number(1, 4), number(1, 3) if draw else 0
        lengths = [0, 1, 2, 7, 13, 31, 37, number(1, 60)]
        queries, keys = (lengths[number(0, len(lengths))] for _ in range(2))
        block = number(1, 20)
        leaves = inputs(
            queries, keys, block, batch=batch, heads=key_heads * number(1, 3), key_heads=key_heads, channels=3
        )
        leaves = [x.detach().mT.contiguous().mT.requires_grad_() if number(0, 2) else x for x in leaves]
        options: dict[str, Any] = {
            "block_size": block,
            "causal": bool(number(0, 2)),
            "top": [None, 0, 1, 3][number(0, 4)],
            "scale": [None, 0.3, -1.0][number(0, 3)],
        }
        if number(0, 2):
            real = torch.rand(batch, keys) < 0.7
            options["key_padding_mask"] = real
            with torch.no_grad():
                for x in leaves[1:3]:
                    x.copy_(torch.where(real[:, None, :, None], x, float("nan")))
        right = outcome("reference", leaves, **options)
        assert all(x.isfinite().all() for x in right)
        assert worst(outcome("torch", leaves, **options), right) < 1e-12, (draw, options)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_definition_against_a_loop(backend: str) -> None:
    torch.manual_seed(0)
    leaves = inputs(11, 11, 4, batch=1, heads=1, key_heads=1)
    q, k, v, landmarks = (x[0, 0] for x in leaves)
    got = landmark_attention(*leaves[:3], landmarks=leaves[3], block_size=4, causal=True, backend=backend)[0, 0]
    for i in range(11):
        own = i // 4
        direct = (k[own * 4 : i + 1] @ q[i] / 8**0.5).exp()
        gates = (landmarks[:own] @ q[i] / 8**0.5).exp()
        total = direct.sum() + gates.sum()
        right = direct @ v[own * 4 : i + 1] / total
        for j in range(own):
            block = slice(4 * j, 4 * j + 4)
            right = right + gates[j] / total * (torch.softmax(k[block] @ q[i] / 8**0.5, 0) @ v[block])
        assert worst([got[i]], [right]) < 1e-14


@pytest.mark.parametrize("causal", [False, True])
def test_limits_are_full_attention(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, landmarks = inputs(33, 33, 40, key_heads=2)
    dense = softmax_attention(q, k, v, causal=causal, backend="reference")
    # One block holds everything; or every token is a block and its own landmark.
    one = landmark_attention(q, k, v, landmarks=landmarks, block_size=40, causal=causal)
    each = landmark_attention(q, k, v, landmarks=k, block_size=1, causal=causal)
    assert worst([one], [dense]) < 1e-13
    assert worst([each], [dense]) < 1e-13


def test_full_budget_of_blocks_is_no_selection() -> None:
    torch.manual_seed(0)
    q, k, v, landmarks = inputs(50, 50, 8)
    every = landmark_attention(q, k, v, landmarks=landmarks, block_size=8, causal=True)
    assert worst([landmark_attention(q, k, v, landmarks=landmarks, block_size=8, causal=True, top=7)], [every]) == 0
    some = landmark_attention(q, k, v, landmarks=landmarks, block_size=8, causal=True, top=2)
    assert worst([some[:, :, :24]], [every[:, :, :24]]) < 1e-14  # up to two other blocks there is nothing to choose
    assert worst([some], [every]) > 1e-3
    options: dict[str, Any] = {"block_size": 8, "causal": True, "key_padding_mask": None, "scale": 8**-0.5}
    p = reference.probabilities(q, k, landmarks=landmarks, top=2, **options)
    blocks = torch.nn.functional.pad(p > 0, (0, 6)).unflatten(-1, (7, 8)).any(-1).sum(-1)
    assert torch.equal(blocks, (torch.arange(50) // 8 + 1).clamp(max=3).expand_as(blocks))


def test_float32_and_bfloat16() -> None:
    """In the limit of one block it is softmax attention, so that torch's own error is the measure."""
    torch.manual_seed(0)
    low = [torch.randn(1, 4, 256, 64).bfloat16().requires_grad_() for _ in range(3)]
    landmarks = torch.randn(1, 4, 8, 64).bfloat16().requires_grad_()
    leaves = [*low, landmarks]
    options: dict[str, Any] = {"block_size": 32, "causal": True}
    exact = outcome("reference", [x.detach().double().requires_grad_() for x in leaves], **options)
    single = outcome("torch", [x.detach().float().requires_grad_() for x in leaves], **options)
    assert worst([x.double() for x in single], exact) < 1e-5
    out = torch.nn.functional.scaled_dot_product_attention(*low, is_causal=True)
    right = torch.nn.functional.scaled_dot_product_attention(*(x.detach().double() for x in low), is_causal=True)
    ours = (outcome("torch", leaves, **options)[0].double() - exact[0]).abs().max()
    assert ours <= 2 * (out.double() - right).abs().max()


def test_memory_is_linear() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        g = torch.randn(1, 2, length // 32, 16, requires_grad=True)
        return growth.count(
            lambda: landmark_attention(q, k, v, landmarks=g, block_size=32, causal=True).sum().backward()
        ).peak_bytes

    assert peak(2048) < 2.1 * peak(1024)
    assert peak(2048) < 8 * 1024 * 1024  # an L x L matrix of the two heads would be 32 MiB


def test_opcheck() -> None:
    q, k, v, landmarks = inputs(5, 7, 3, batch=1, heads=2, key_heads=2, channels=3)
    padding = torch.rand(1, 7) < 0.8
    torch.library.opcheck(blocked._op._opoverload, (q, k, v, landmarks, padding, 3, True, None, 0.5))
    low = [x.float() for x in (q, k, v, landmarks)]
    torch.library.opcheck(blocked._op._opoverload, (*low, None, 3, False, 1, 0.5))


def test_second_derivative_is_refused_in_words() -> None:
    q, k, v, landmarks = inputs(5, 5, 2)
    out = landmark_attention(q, k, v, landmarks=landmarks, block_size=2, backend="torch")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"top": -1}, "top must be at least 0, or None for all blocks, got -1"),
        ({"block_size": 4}, r"landmarks must have shape \(B, Hkv, nb, D\) = \(2, 4, 2, 8\)"),
        ({"landmarks": torch.zeros(2, 4, 3, 8)}, "got .* and torch.float32"),
        ({"v": torch.zeros(2, 4, 6, 6).double()}, "do not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    q, k, v, landmarks = inputs(6, 7, 3)
    arguments = {"q": q, "k": k, "v": v, "landmarks": landmarks, "block_size": 3, **changes}
    with pytest.raises(ValueError, match=message):
        landmark_attention(**arguments)
