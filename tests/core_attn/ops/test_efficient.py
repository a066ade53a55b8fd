"""efficient_attention: the linear form against the definition, the definition against a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.ops import efficient_attention
from core_attn.ops.efficient import linear, summarise
from core_attn.testing.harness import worst


def inputs(
    queries: int, keys: int, *, batch: int = 2, heads: int = 3, channels: int = 5, value: int = 4, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, channels), (batch, heads, keys, channels), (batch, heads, keys, value))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = efficient_attention(*leaves, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def test_definition_is_the_sum_it_says() -> None:
    """One query, one channel, one key at a time, in Python floats."""
    q, k, v = inputs(3, 4, batch=1, heads=1)
    out = efficient_attention(q, k, v, backend="reference")
    for i in range(3):
        row = [math.exp(x) for x in q[0, 0, i].tolist()]
        for e in range(4):
            expected = 0.0
            for d in range(5):
                column = [math.exp(k[0, 0, m, d].item()) for m in range(4)]
                summary = sum(w / sum(column) * v[0, 0, m, e].item() for m, w in enumerate(column))
                expected += row[d] / sum(row) * summary
            assert out[0, 0, i, e].item() == pytest.approx(expected, abs=1e-13)


def test_200_random_draws() -> None:
    """Any sizes, strides; samples without keys; NaN under the mask."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        leaves = inputs(
            pick(0, 1, 2, 7, 19, 53),
            pick(0, 1, 3, 7, 19, 37),
            batch=pick(0, 1, 3),
            heads=pick(1, 2, 6),
            channels=pick(1, 3, 8),
            value=pick(1, 4),
            seed=seed,
        )
        if pick(False, True):  # tokens before heads, as projections leave them, and every second channel
            leaves = [
                x.detach().repeat_interleave(2, -1).transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
                for x in leaves
            ]
            for x in leaves:
                x.requires_grad_()
        options: dict[str, Any] = {}
        if pick(False, True):
            mask = torch.rand(leaves[1].shape[0], leaves[1].shape[2], generator=g) > 0.4
            if mask.shape[0] > 1:
                mask[0] = False
            options["key_padding_mask"] = mask
        expected = outcome("reference", leaves, **options)
        low = [x.detach().float().requires_grad_() for x in leaves]
        assert worst(outcome("torch", low, **options), expected) < 1e-5, seed
        if options:
            with torch.no_grad():
                for x in leaves[1:]:
                    x.masked_fill_(~options["key_padding_mask"][:, None, :, None], float("nan"))
        found = outcome("torch", leaves, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-12, seed


def test_large_scores_do_not_overflow() -> None:
    leaves = [x.detach().float().mul(1000).requires_grad_() for x in inputs(9, 11)]
    found, expected = outcome("torch", leaves), outcome("reference", leaves)
    assert all(x.isfinite().all() for x in found)
    assert worst(found[:1], expected[:1]) < 1e-5


def test_samples_without_keys_are_zero_with_zero_gradients() -> None:
    leaves = inputs(5, 6)
    mask = torch.tensor([[True] * 6, [False] * 6])
    for backend in ("torch", "reference"):
        for x in outcome(backend, leaves, key_padding_mask=mask):
            assert x[1].abs().max() == 0
            assert x[0].abs().max() > 0


def test_bfloat16_no_worse_than_twice_torch() -> None:
    """Softmax attention of torch in bfloat16 on the same tensors is the measure."""
    low = [x.detach().bfloat16().requires_grad_() for x in inputs(127, 127, channels=64, value=64)]
    exact = [x.detach().double().requires_grad_() for x in low]
    plain, right = (torch.nn.functional.scaled_dot_product_attention(*x) for x in (low, exact))
    probe = torch.sin(torch.arange(right.numel(), dtype=torch.float64)).view(right.shape)
    theirs = [plain, *torch.autograd.grad(plain, low, probe.bfloat16())]
    rights = [right, *torch.autograd.grad(right, exact, probe)]
    for ours, wanted, other, best in zip(outcome("torch", low), outcome("reference", exact), theirs, rights):
        error = (other.double() - best).norm() / best.norm()
        assert (ours.double() - wanted).norm() / wanted.norm() <= 2 * error


def test_operator_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    k, v = (x.float().detach() for x in inputs(5, 6, heads=1)[1:])
    k, v = k[:, 0].requires_grad_(), v[:, 0].requires_grad_()
    mask = torch.tensor([[True] * 5 + [False]] * 2)
    torch.library.opcheck(linear._op._opoverload, (k, v, None))
    torch.library.opcheck(linear._op._opoverload, (k.detach(), v.detach(), mask))
    assert summarise(k, v, mask).shape == (2, 5, 4)
    (gradient,) = torch.autograd.grad(summarise(k, v).square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(4, 3, 5)}, "q, k and v must have shape"),
        ({"q": torch.randn(2, 6, 4, 5)}, "as many heads"),
        ({"key_padding_mask": torch.ones(2, 6)}, "must be boolean"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    q, k, v = (x.float() for x in inputs(5, 6))
    given: dict[str, Any] = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(ValueError, match=says) as caught:
        efficient_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert "\n" not in str(caught.value)
