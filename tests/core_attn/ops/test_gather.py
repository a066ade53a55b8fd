"""gather_attention: the gathered form is the definition, whatever the lists; memory is that of the lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.ops import gather_attention, softmax_attention
from core_attn.ops.gather import blocked
from core_attn.testing import growth


def inputs(
    queries: int, keys: int, *, batch: int = 2, heads: int = 4, key_heads: int = 4, channels: int = 8, value: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return tuple(torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)


def outcome(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = gather_attention(q, k, v, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, [q, k, v], probe)]


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


def strided(x: Tensor, how: int) -> Tensor:
    """The same values in another layout."""
    if how == 1:
        return x.detach().mT.contiguous().mT.requires_grad_()
    if how == 2:
        return torch.stack([x.detach(), x.detach()], -1)[..., 1].requires_grad_()
    return x


@pytest.mark.parametrize("part", range(4))
def test_200_random_draws(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(part)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, ()))

    for draw in range(50):
        monkeypatch.setattr(blocked, "_GATHERED_ON_CPU", number(1, 2000))
        key_heads, batch = number(1, 4), number(1, 3) if draw else 0
        heads = key_heads * number(1, 3)
        lengths = [0, 1, 2, 7, 13, 31, number(1, 40)]
        queries, keys = (lengths[number(0, len(lengths))] for _ in range(2))
        q, k, v = inputs(queries, keys, batch=batch, heads=heads, key_heads=key_heads, channels=3, value=4)
        q, k, v = (strided(x, number(0, 3)) for x in (q, k, v))
        lists = ([1, batch][number(0, 2)], [1, heads][number(0, 2)], queries, number(0, 9))
        options: dict[str, Any] = {
            "index": torch.randint(-1, keys, lists) if keys else torch.full(lists, -1),
            "causal": bool(number(0, 2)),
            "scale": [None, 0.3, -1.0][number(0, 3)],
        }
        if number(0, 2):
            real = torch.rand(batch, keys) < 0.7
            options["key_padding_mask"] = real
            with torch.no_grad():
                for x in (k, v):
                    x.copy_(torch.where(real[:, None, :, None], x, float("nan")))
        right = outcome("reference", q, k, v, **options)
        assert all(x.isfinite().all() for x in right)
        assert worst(outcome("torch", q, k, v, **options), right) < 1e-12, (draw, options)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_definition_against_a_loop(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = inputs(7, 9, key_heads=2)
    index = torch.randint(-1, 9, (2, 1, 7, 6))
    index[0, 0, 3] = -1
    index[1, 0, 5] = torch.tensor([4, 4, 4, 2, -1, -1])  # named three times: three terms of the softmax
    got = gather_attention(q, k, v, index=index, causal=True, backend=backend)
    for b in range(2):
        for head in range(4):
            for i in range(7):
                read = [j for j in index[b, 0, i].tolist() if 0 <= j <= i + 9 - 7]
                right = torch.zeros(6, dtype=torch.float64)
                if read:
                    p = torch.softmax(k[b, head // 2, read] @ q[b, head, i] / 8**0.5, 0)
                    right = p @ v[b, head // 2, read]
                assert worst([got[b, head, i]], [right]) < 1e-14


def test_all_keys_are_full_attention() -> None:
    torch.manual_seed(0)
    q, k, v = inputs(33, 40, key_heads=2)
    index = torch.stack([torch.randperm(40) for _ in range(33)])[None, None]
    got = gather_attention(q, k, v, index=index, causal=True)
    assert worst([got], [softmax_attention(q, k, v, causal=True, backend="reference")]) < 1e-13


def test_float32_and_bfloat16() -> None:
    torch.manual_seed(0)
    low = [torch.randn(1, 4, 128, 64).bfloat16().requires_grad_() for _ in range(3)]
    index = torch.rand(1, 4, 128, 128).argsort(-1)[..., :40]
    exact = outcome("reference", *(x.detach().double().requires_grad_() for x in low), index=index)
    single = outcome("torch", *(x.detach().float().requires_grad_() for x in low), index=index)
    assert worst([x.double() for x in single], exact) < 1e-5
    mask = torch.zeros(1, 4, 128, 128, dtype=torch.bool).scatter_(-1, index, True)
    out = F.scaled_dot_product_attention(*low, attn_mask=mask)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    theirs = [out, *torch.autograd.grad(out, low, probe)]
    for a, b, right in zip(outcome("torch", *low, index=index), theirs, exact, strict=True):
        assert (a.double() - right).abs().max() <= 2 * (b.double() - right).abs().max()


def test_memory_is_linear() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
        index = torch.randint(length, (1, 2, length, 32))
        return growth.count(lambda: gather_attention(q, k, v, index=index).sum().backward()).peak_bytes

    assert peak(4096) < 2.1 * peak(2048)
    assert peak(2048) < 8 * 1024 * 1024  # an L x L matrix of the two heads would be 32 MiB


def test_opcheck() -> None:
    q, k, v = inputs(5, 7, batch=1, heads=2, key_heads=1, channels=3, value=2)
    index = torch.randint(-1, 7, (1, 1, 5, 4))
    padding = torch.rand(1, 7) < 0.8
    torch.library.opcheck(blocked._op._opoverload, (q, k, v, index, padding, True, 0.5))
    torch.library.opcheck(
        blocked._op._opoverload, (q.float(), k.float(), v.float(), index.expand(1, 2, 5, 4), None, False, 0.5)
    )


def test_compiles_and_exports() -> None:
    q, k, v = inputs(20, 20)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
            return gather_attention(q, k, v, index=index, causal=True)

    index = torch.randint(-1, 20, (2, 4, 20, 5))
    right = Module()(q, k, v, index)
    torch.compiler.reset()
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(q, k, v, index)
    assert worst([compiled], [right]) < 1e-14
    gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (compiled, right))
    assert worst(*map(list, gradients)) < 1e-14
    program = torch.export.export(Module(), (q, k, v, index)).module()
    other = index.flip(-2)
    assert worst([program(q, k, v, other)], [Module()(q, k, v, other)]) < 1e-14


def test_second_derivative_is_refused_in_words() -> None:
    q, k, v = inputs(5, 5)
    out = gather_attention(q, k, v, index=torch.zeros(1, 1, 5, 1, dtype=torch.int64), backend="torch")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.zeros(1, 1, 6, 2)}, "index must be int64, got torch.float32"),
        ({"index": torch.zeros(1, 1, 5, 2, dtype=torch.int64)}, r"\(B, H, L\) = \(2, 4, 6\), got \(1, 1, 5, 2\)"),
        ({"index": torch.zeros(6, 2, dtype=torch.int64)}, r"got \(6, 2\)"),
        ({"index": torch.full((1, 1, 6, 2), 7)}, r"from -1 \(none\) to M - 1 = 6, got 7 to 7"),
        ({"index": torch.full((1, 1, 6, 2), -2)}, "got -2 to -2"),
        ({"v": torch.zeros(2, 4, 15, 6).double()}, "do not fit"),
        ({"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)}, r"shape \(B, M\) = \(2, 7\), got \(2, 6\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    q, k, v = inputs(6, 7)
    arguments = {"q": q, "k": k, "v": v, "index": torch.zeros(1, 1, 6, 2, dtype=torch.int64), **changes}
    with pytest.raises(ValueError, match=message):
        gather_attention(**arguments)
