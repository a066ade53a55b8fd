"""block_sparse_attention: the blocked form is the definition, whatever the blocks; it computes only what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core_attn.naming import UnknownNameError
from core_attn.ops import block_sparse_attention, softmax_attention
from core_attn.ops.block_sparse import OPERATOR, blocked
from core_attn.ops.block_sparse.reference import expand
from core_attn.testing import growth


def inputs(
    queries: int, keys: int, *, batch: int = 2, heads: int = 4, key_heads: int = 4, channels: int = 8, value: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return tuple(torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)


def outcome(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = block_sparse_attention(q, k, v, backend=backend, **options)
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
        # Small batches, so that several of each kind come about.
        monkeypatch.setattr(blocked, "_SCORES_ON_CPU", number(1, 4000))
        key_heads, batch = number(1, 4), number(1, 3) if draw else 0
        heads = key_heads * number(1, 3)
        lengths = [0, 1, 2, 7, 13, 31, 37, number(1, 60), number(1, 60)]
        queries, keys = (lengths[number(0, len(lengths))] for _ in range(2))
        size = (number(1, 20), number(1, 20))
        q, k, v = inputs(queries, keys, batch=batch, heads=heads, key_heads=key_heads, channels=3, value=4)
        q, k, v = (strided(x, number(0, 3)) for x in (q, k, v))
        grid = (-(-queries // size[0]), -(-keys // size[1]))
        leading = [(), (heads,), (batch, heads), (batch, 1), (1, heads)][number(0, 5)]
        options: dict[str, Any] = {
            "blocks": torch.rand(*leading, *grid) < torch.rand(()),
            "block_size": size,
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
        # The definition's own mask, through an operator with tests of its own.
        whole = expand(options.pop("blocks"), options.pop("block_size"), queries, keys)
        mask = whole[(None,) * (4 - whole.dim())].expand(batch, heads, queries, keys)
        plain = softmax_attention(q, k, v, mask=mask, backend="reference", **options)
        assert worst([plain], right[:1]) < 1e-12


def test_definition_against_a_loop() -> None:
    torch.manual_seed(0)
    q, k, v = inputs(11, 9, key_heads=2)
    blocks = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    got = block_sparse_attention(q, k, v, blocks=blocks, block_size=(4, 3), causal=True, backend="reference")
    for head in range(4):
        for i in range(11):
            read = [j for j in range(9) if blocks[i // 4, j // 3] and j <= i + 9 - 11]
            right = torch.zeros(2, 6, dtype=torch.float64)
            if read:
                s = torch.einsum("bd,bmd->bm", q[:, head, i], k[:, head // 2, read]) / 8**0.5
                right = torch.einsum("bm,bmd->bd", torch.softmax(s, -1), v[:, head // 2, read])
            assert worst([got[:, head, i]], [right]) < 1e-14


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_full_attention(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = inputs(150, 170, key_heads=2)
    got = block_sparse_attention(q, k, v, blocks=torch.ones(3, 3, dtype=torch.bool), causal=causal)
    assert worst([got], [softmax_attention(q, k, v, causal=causal, backend="reference")]) < 1e-13


def test_rows_without_keys_are_zero_with_zero_gradients() -> None:
    q, k, v = inputs(12, 12)
    blocks = torch.tensor([[True, False, False], [False, False, False], [False, False, True]])
    out, dq, dk, dv = outcome("torch", q, k, v, blocks=blocks, block_size=4)
    assert not out[:, :, 4:8].any()
    for gradient in (dq, dk, dv):
        assert not gradient[:, :, 4:8].any()
        assert gradient[:, :, :4].all()


def test_float32_and_bfloat16() -> None:
    torch.manual_seed(0)
    low = [torch.randn(1, 4, 256, 64).bfloat16().requires_grad_() for _ in range(3)]
    blocks = (torch.rand(4, 8, 8) < 0.4) | torch.eye(8, dtype=torch.bool)
    options: dict[str, Any] = {"blocks": blocks, "block_size": 32, "causal": True}
    exact = outcome("reference", *(x.detach().double().requires_grad_() for x in low), **options)
    single = outcome("torch", *(x.detach().float().requires_grad_() for x in low), **options)
    assert worst([x.double() for x in single], exact) < 1e-5
    mask = expand(blocks, (32, 32), 256, 256) & torch.ones(256, 256, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(*low, attn_mask=mask)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    theirs = [out, *torch.autograd.grad(out, low, probe)]
    for a, b, right in zip(outcome("torch", *low, **options), theirs, exact, strict=True):
        assert (a.double() - right).abs().max() <= 2 * (b.double() - right).abs().max()


def test_work_is_that_of_the_blocks_read_and_memory_is_linear() -> None:
    def cost(length: int, blocks: Tensor) -> tuple[int, int]:
        q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))

        def step() -> None:
            block_sparse_attention(q, k, v, blocks=blocks, block_size=64).sum().backward()

        with FlopCounterMode(display=False) as flops:
            blocked._forward(*(x.detach() for x in (q, k, v)), blocks[None, None], None, 64, 64, False, 0.25)
        return flops.get_total_flops(), growth.count(step).peak_bytes

    eye = torch.eye(16, dtype=torch.bool)
    blocks = eye | eye.roll(1, -1)
    flops, peak = cost(1024, blocks)
    assert flops == 2 * 2 * 2 * blocks.sum() * 64 * 64 * 16
    twice = torch.block_diag(blocks, blocks).bool()
    assert cost(2048, twice)[0] == 2 * flops
    assert cost(2048, twice)[1] < 2.2 * peak
    assert peak < 4 * 1024 * 1024  # an L x L matrix of the two heads would be 8 MiB


def test_opcheck() -> None:
    q, k, v = inputs(9, 10, batch=1, heads=2, key_heads=1, channels=3, value=2)
    blocks = torch.rand(1, 1, 3, 3) < 0.6
    padding = torch.rand(1, 10) < 0.8
    torch.library.opcheck(blocked._op._opoverload, (q, k, v, blocks, padding, 3, 4, True, 0.5))
    torch.library.opcheck(
        blocked._op._opoverload, (q.float(), k.float(), v.float(), blocks.expand(1, 2, 3, 3), None, 3, 4, False, 0.5)
    )


def test_compiles_and_exports() -> None:
    q, k, v = inputs(40, 40)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
            return block_sparse_attention(q, k, v, blocks=blocks, block_size=16, causal=True)

    blocks = torch.rand(4, 3, 3) < 0.7
    right = Module()(q, k, v, blocks)
    torch.compiler.reset()
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(q, k, v, blocks)
    assert worst([compiled], [right]) < 1e-14
    gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (compiled, right))
    assert worst(*map(list, gradients)) < 1e-14
    program = torch.export.export(Module(), (q, k, v, blocks)).module()
    assert worst([program(q, k, v, ~blocks)], [Module()(q, k, v, ~blocks)]) < 1e-14


def test_second_derivative_is_refused_in_words() -> None:
    q, k, v = inputs(5, 5)
    out = block_sparse_attention(q, k, v, blocks=torch.ones(1, 1, dtype=torch.bool), backend="torch")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()


def test_autocast() -> None:
    q, k, v = (x.detach().float() for x in inputs(20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(q, k, v, blocks=torch.ones(2, 2, dtype=torch.bool), block_size=10)
    assert out.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": torch.ones(2, 2)}, r"blocks must be boolean \(True = may be read\), got torch.float32"),
        ({"blocks": torch.ones(2, 3, dtype=torch.bool)}, r"\(B, H, nq, nk\) = \(2, 4, 2, 2\), got \(2, 3\)"),
        ({"blocks": torch.ones(3, 2, 2, dtype=torch.bool)}, r"got \(3, 2, 2\)"),
        ({"blocks": torch.ones(2, dtype=torch.bool)}, r"got \(2,\)"),
        ({"block_size": 0}, r"block_size must be a positive integer or \(query, key\), got 0"),
        ({"block_size": (8, -1)}, r"got \(8, -1\)"),
        ({"v": torch.zeros(2, 4, 15, 6).double()}, "do not fit"),
        ({"key_padding_mask": torch.ones(2, 15, dtype=torch.bool)}, r"shape \(B, M\) = \(2, 16\), got \(2, 15\)"),
        ({"key_padding_mask": torch.ones(2, 16)}, "must be boolean"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    q, k, v = inputs(16, 16)
    arguments = {"q": q, "k": k, "v": v, "blocks": torch.ones(2, 2, dtype=torch.bool), "block_size": 8, **changes}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_backends() -> None:
    q, k, v = inputs(4, 4)
    with pytest.raises(UnknownNameError, match="block_sparse_attention"):
        block_sparse_attention(q, k, v, blocks=torch.ones(1, 1, dtype=torch.bool), backend="torhc")
    assert [b.name for b in OPERATOR.backends][-2:] == ["torch", "reference"]
