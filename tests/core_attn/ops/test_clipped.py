"""clipped_softmax_attention: the blocked form against the definition, the definition against a loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.naming import UnknownNameError
from core_attn.ops import clipped_softmax_attention, softmax_attention
from core_attn.ops.clipped import blocked
from core_attn.testing.harness import worst

STRETCHES = [(-0.03, 1.0), (-0.003, 1.03), (0.0, 1.2), (-0.2, 1.0), (0.0, 1.0)]


def inputs(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    channels: int = 6,
    value: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((batch, heads, queries, channels), (batch, key_heads, keys, channels), (batch, key_heads, keys, value))
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = clipped_softmax_attention(*leaves, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries and 5 keys, so that few tokens already meet every kind of border."""
    monkeypatch.setattr(blocked, "_block_sizes", lambda channels, *, on_cpu: (4, 5))


def test_definition_is_the_sum_it_says() -> None:
    """One query at a time, one key at a time, in Python floats."""
    q, k, v = inputs(4, 6, batch=1, heads=2, key_heads=1)
    out = clipped_softmax_attention(q, k, v, gamma=-0.1, zeta=1.2, causal=True, scale=0.7, backend="reference")
    clipped = 0
    for h, i in itertools.product(range(2), range(4)):
        exps = [
            math.exp(0.7 * sum(a * b for a, b in zip(q[0, h, i].tolist(), k[0, 0, j].tolist())))
            for j in range(i + 6 - 4 + 1)
        ]
        weights = [1.3 * e / sum(exps) - 0.1 for e in exps]
        clipped += sum(not 0 < w < 1 for w in weights)
        for d in range(5):
            expected = sum(min(max(w, 0.0), 1.0) * v[0, 0, j, d].item() for j, w in enumerate(weights))
            assert out[0, h, i, d].item() == pytest.approx(expected, abs=1e-13)
    assert clipped > 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unstretched_is_softmax(backend: str) -> None:
    q, k, v = inputs(13, 17, key_heads=2)
    found = clipped_softmax_attention(q, k, v, gamma=0.0, zeta=1.0, causal=True, backend=backend)
    torch.testing.assert_close(found, softmax_attention(q, k, v, causal=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stretch", STRETCHES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (13, 13), (7, 18), (18, 7)])
def test_blocked_equals_the_definition(
    small_blocks: None, queries: int, keys: int, stretch: tuple[float, float]
) -> None:
    for causal, key_heads, padded in itertools.product([False, True], [4, 1], [False, True]):
        leaves = inputs(queries, keys, key_heads=key_heads)
        mask = torch.rand(2, keys) > 0.3 if padded else None
        options = {"gamma": stretch[0], "zeta": stretch[1], "causal": causal, "key_padding_mask": mask, "scale": 1.5}
        expected = outcome("reference", leaves, **options)
        assert worst(outcome("torch", leaves, **options), expected) < 1e-12
        with torch.no_grad():  # another way through the forward: nothing is kept for the backward
            alone = clipped_softmax_attention(*leaves, backend="torch", **options)
        torch.testing.assert_close(alone, expected[0], rtol=0, atol=1e-12)
        low = [x.detach().float().requires_grad_() for x in leaves]
        assert worst(outcome("torch", low, **options), expected) < 1e-5


def test_real_block_sizes_over_several_blocks() -> None:
    for channels, causal in ((16, False), (16, True), (4, True)):
        leaves = inputs(300, 1100, batch=1, heads=2, key_heads=1, channels=channels)
        options = {"gamma": -0.001, "zeta": 1.0, "causal": causal}
        assert worst(outcome("torch", leaves, **options), outcome("reference", leaves, **options)) < 1e-12


def test_200_random_draws() -> None:
    """Any sizes, strides, options; rows without keys; NaN under the mask."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        heads = pick(1, 2, 6)
        leaves = inputs(
            pick(0, 1, 2, 7, 19, 31, 53),
            pick(0, 1, 3, 7, 19, 37, 53),
            batch=pick(0, 1, 3),
            heads=heads,
            key_heads=pick(*[n for n in (1, 2, 3, 6) if heads % n == 0]),
            channels=pick(1, 3, 8),
            value=pick(1, 4),
            seed=seed,
        )
        if pick(False, True):  # every second channel of a wider tensor, and tokens before heads
            leaves = [
                x.detach().repeat_interleave(2, -1).transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
                for x in leaves
            ]
            for x in leaves:
                x.requires_grad_()
        gamma, zeta = pick(*STRETCHES)
        options: dict[str, Any] = {"gamma": gamma, "zeta": zeta, "causal": pick(False, True), "scale": pick(None, 2.0)}
        if pick(False, True):
            mask = torch.rand(leaves[1].shape[0], leaves[1].shape[2], generator=g) > 0.4
            if mask.shape[0] > 1:
                mask[0] = False
            options["key_padding_mask"] = mask
        expected = outcome("reference", leaves, **options)
        if "key_padding_mask" in options:
            with torch.no_grad():
                for x in leaves[1:]:
                    x.masked_fill_(~options["key_padding_mask"][:, None, :, None], float("nan"))
        found = outcome("torch", leaves, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-12, seed


def test_bfloat16_no_worse_than_twice_torch() -> None:
    """The same problem in torch's own operations: softmax, stretch and clip in bfloat16."""
    low = inputs(127, 127, channels=64, value=64, dtype=torch.bfloat16)
    options = {"gamma": -0.003, "zeta": 1.0}
    exact = [x.detach().double().requires_grad_() for x in low]
    expected = outcome("reference", exact, **options)
    out = torch.nn.functional.scaled_dot_product_attention(*low)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    plain = [out, *torch.autograd.grad(out, low, probe)]
    right = outcome("reference", exact, gamma=0.0, zeta=1.0)
    for ours, wanted, theirs, wanted_theirs in zip(outcome("torch", low, **options), expected, plain, right):
        error = (theirs.double() - wanted_theirs).norm() / wanted_theirs.norm()
        assert (ours.double() - wanted).norm() / wanted.norm() <= 2 * error


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_without_keys_are_zero_with_zero_gradients(small_blocks: None, backend: str) -> None:
    leaves = inputs(9, 4)  # causal: the first five queries stand before every key
    padding = torch.tensor([[True] * 4, [False] * 4])
    out, dq, dk, dv = outcome(backend, leaves, gamma=-0.01, causal=True, key_padding_mask=padding)
    assert out[0, :, :5].abs().max() == dq[0, :, :5].abs().max() == 0
    assert out[0, :, 5:].abs().min() > 0
    for x in (out, dq, dk, dv):
        assert x[1].abs().max() == 0


def test_gradcheck(small_blocks: None) -> None:
    leaves = inputs(6, 7, batch=1, heads=2, key_heads=1, channels=2, value=2)
    assert torch.autograd.gradcheck(lambda q, k, v: clipped_softmax_attention(q, k, v, gamma=-0.1, zeta=1.1), leaves)


def test_operator_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    leaves = inputs(5, 6, dtype=torch.float32)
    torch.library.opcheck(blocked._op._opoverload, (*leaves, None, True, -0.1, 1.1, 0.5, True))
    mask = torch.tensor([[True] * 5 + [False]] * 2)
    frozen = [x.detach() for x in leaves]
    torch.library.opcheck(blocked._op._opoverload, (*frozen, mask, False, -0.1, 1.1, 0.5, False))


def test_compiles_and_autocasts() -> None:
    leaves = inputs(33, 33, dtype=torch.float32)

    def call(*leaves: Tensor) -> Tensor:
        return clipped_softmax_attention(*leaves, gamma=-0.01, causal=True)

    expected = call(*leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = compiled(*leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (found, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = call(*leaves)
    assert low.dtype is torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gamma": 0.1}, "gamma <= 0"),
        ({"gamma": float("nan")}, "gamma <= 0"),
        ({"zeta": 0.9}, "zeta >= 1"),
        ({"q": torch.randn(4, 3, 6)}, "q, k and v must have shape"),
        ({"key_padding_mask": torch.ones(2, 3)}, "must be boolean"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    q, k, v = inputs(5, 6, dtype=torch.float32)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "gamma": -0.1, **change}
    with pytest.raises(ValueError, match=says) as caught:
        clipped_softmax_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert "\n" not in str(caught.value)


def test_backends_by_name() -> None:
    q, k, v = inputs(5, 6)
    with pytest.raises(UnknownNameError, match="backend"):
        clipped_softmax_attention(q, k, v, gamma=0.0, backend="sdpa")
    loss = clipped_softmax_attention(q, k, v, gamma=0.0, backend="torch").square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
