"""relative_attention: blocked form against definition, definition against a loop and the paper's skewing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core_attn.naming import UnknownNameError
from core_attn.ops import relative_attention, softmax_attention
from core_attn.ops.relative import blocked
from core_attn.testing.harness import worst


def inputs(
    queries: int,
    keys: int,
    *,
    distances: int,
    causal: bool,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    tables: int = 4,
    channels: int = 6,
    value: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and the table of embeddings."""
    torch.manual_seed(seed)
    rows = distances if causal else 2 * distances - 1
    shapes = (
        (batch, heads, queries, channels),
        (batch, key_heads, keys, channels),
        (batch, key_heads, keys, value),
        (tables, rows, channels),
    )
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    q, k, v, relative = leaves
    out = relative_attention(q, k, v, relative=relative, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries and 5 keys, so that few tokens already meet every kind of border."""
    monkeypatch.setattr(blocked, "_block_sizes", lambda channels, *, on_cpu: (4, 5))


def test_definition_is_the_sum_it_says() -> None:
    """One query at a time, one key at a time, in Python floats."""
    for causal in (False, True):
        q, k, v, relative = inputs(4, 6, distances=3, causal=causal, batch=1, heads=2, key_heads=1, tables=2)
        out = relative_attention(q, k, v, relative=relative, causal=causal, scale=0.7, backend="reference")
        for h, i in itertools.product(range(2), range(4)):
            weights = {}
            for j in range(6):
                distance = i + 6 - 4 - j
                if causal and distance < 0:
                    continue
                row = min(distance, 2) if causal else max(-2, min(distance, 2)) + 2
                both = k[0, 0, j] + relative[h, row]
                weights[j] = math.exp(0.7 * sum(a * b for a, b in zip(q[0, h, i].tolist(), both.tolist())))
            for d in range(5):
                expected = sum(w * v[0, 0, j, d].item() for j, w in weights.items()) / sum(weights.values())
                assert out[0, h, i, d].item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("length", [1, 2, 9, 17])
def test_equals_the_papers_skewing(backend: str, length: int) -> None:
    """Section 3.4.1: Q E^T with the farthest distance first; pad a column, reshape, drop the first row."""
    q, k, v, relative = inputs(length, length, distances=length, causal=True)
    products = q @ relative.flip(1).transpose(1, 2)
    padded = torch.cat([products.new_zeros(*products.shape[:3], 1), products], dim=-1)
    skewed = padded.reshape(*products.shape[:2], length + 1, length)[:, :, 1:]
    scores = (q @ k.transpose(2, 3) + skewed) / math.sqrt(q.shape[-1])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v
    found = relative_attention(q, k, v, relative=relative, causal=True, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tables", [1, 4])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (13, 13), (23, 23), (7, 18), (18, 7)])
def test_blocked_equals_the_definition(
    small_blocks: None, queries: int, keys: int, key_heads: int, tables: int
) -> None:
    for causal, distances in itertools.product([False, True], [1, 2, 6, 40]):
        leaves = inputs(queries, keys, distances=distances, causal=causal, key_heads=key_heads, tables=tables)
        padding = torch.rand(2, keys) > 0.3
        for mask in (None, padding):
            options = {"causal": causal, "key_padding_mask": mask}
            expected = outcome("reference", leaves, **options)
            assert worst(outcome("torch", leaves, **options), expected) < 1e-12
            low = [x.detach().float().requires_grad_() for x in leaves]
            assert worst(outcome("torch", low, **options), expected) < 1e-5


def test_real_block_sizes_over_several_blocks() -> None:
    for causal, distances, channels in ((False, 100, 16), (True, 100, 16), (True, 700, 4), (False, 3, 4)):
        leaves = inputs(
            300, 700, distances=distances, causal=causal, batch=1, heads=2, key_heads=2, tables=2, channels=channels
        )
        assert worst(outcome("torch", leaves, causal=causal), outcome("reference", leaves, causal=causal)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_200_random_draws(causal: bool) -> None:
    """Any sizes, strides, options; rows without keys; NaN under the mask."""
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: int, g: torch.Generator = g) -> int:
            return values[int(torch.randint(len(values), (), generator=g))]

        queries, keys = pick(0, 1, 2, 7, 19, 31, 53), pick(0, 1, 3, 7, 19, 37, 53)
        heads = pick(1, 2, 6)
        key_heads = pick(*[n for n in (1, 2, 3, 6) if heads % n == 0])
        leaves = inputs(
            queries,
            keys,
            distances=pick(1, 2, 5, 30, 60),
            causal=causal,
            batch=pick(0, 1, 3),
            heads=heads,
            key_heads=key_heads,
            tables=pick(1, heads),
            channels=pick(1, 3, 8),
            value=pick(1, 4),
            seed=seed,
        )
        if pick(0, 1):  # every second channel of a wider tensor, and tokens before heads
            leaves = [
                x.detach().repeat_interleave(2, -1).transpose(-3, -2).contiguous().transpose(-3, -2)[..., ::2]
                for x in leaves
            ]
            for x in leaves:
                x.requires_grad_()
        options: dict[str, Any] = {"causal": causal, "scale": [None, 0.3][pick(0, 1)]}
        if pick(0, 1):
            mask = torch.rand(leaves[1].shape[0], keys, generator=g) > 0.4
            if mask.shape[0] > 1:
                mask[0] = False
            options["key_padding_mask"] = mask
        expected = outcome("reference", leaves, **options)
        if "key_padding_mask" in options:
            with torch.no_grad():
                for x in leaves[1:3]:
                    x.masked_fill_(~options["key_padding_mask"][:, None, :, None], float("nan"))
        found = outcome("torch", leaves, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-12, seed
        again = outcome("reference", leaves, **options)
        assert worst(again, expected) < 1e-12, seed


def test_a_table_of_zeros_is_softmax_attention() -> None:
    q, k, v, relative = inputs(19, 19, distances=5, causal=True, key_heads=2)
    found = relative_attention(q, k, v, relative=torch.zeros_like(relative), causal=True)
    torch.testing.assert_close(found, softmax_attention(q, k, v, causal=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_no_worse_than_twice_torch(causal: bool) -> None:
    """The same problem for `scaled_dot_product_attention`: q · relative by its definition, as a bias."""
    low = inputs(127, 127, distances=40, causal=causal, channels=64, value=64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in low]
    expected = outcome("reference", exact, causal=causal)

    def by_torch() -> list[Tensor]:
        q, k, v, relative = low
        distance = torch.arange(127)[:, None] - torch.arange(127)
        row = (distance + (0 if causal else 39)).clamp(0, relative.shape[1] - 1)
        bias = torch.einsum("bhld,hlmd->bhlm", q, relative[:, row]) * 64**-0.5
        if causal:
            bias = bias.masked_fill(distance < 0, -torch.inf)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
        return [out, *torch.autograd.grad(out, low, probe)]

    for ours, theirs, right in zip(outcome("torch", low, causal=causal), by_torch(), expected):
        assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_without_keys_are_zero_with_zero_gradients(small_blocks: None, backend: str) -> None:
    leaves = inputs(9, 4, distances=3, causal=True)  # the first five queries stand before every key
    padding = torch.tensor([[True] * 4, [False] * 4])
    out, dq, dk, dv, dtable = outcome(backend, leaves, causal=True, key_padding_mask=padding)
    for x in (out, dq):
        assert x[0, :, :5].abs().max() == 0
        assert x[0, :, 6:].abs().min() > 0
        assert x[1].abs().max() == 0
    assert dk[1].abs().max() == dv[1].abs().max() == 0
    assert dtable.isfinite().all()


def test_gradcheck(small_blocks: None) -> None:
    leaves = inputs(6, 7, distances=4, causal=False, batch=1, heads=2, key_heads=1, tables=2, channels=2, value=2)
    assert torch.autograd.gradcheck(lambda q, k, v, e: relative_attention(q, k, v, relative=e), leaves)


def test_operator_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    for causal, mask in ((True, None), (False, torch.tensor([[True] * 5 + [False]] * 2))):
        q, k, v, relative = inputs(5, 6, distances=3, causal=causal, dtype=torch.float32)
        torch.library.opcheck(blocked._op._opoverload, (q, k, v, relative, mask, causal, 0.5))
        q, k, v, _ = inputs(5, 6, distances=3, causal=causal, dtype=torch.float32, tables=1)
        frozen = relative.detach()
        torch.library.opcheck(blocked._op._opoverload, (q, k, v, frozen, mask, causal, 0.5))


def test_compiles_and_autocasts() -> None:
    q, k, v, relative = inputs(33, 33, distances=9, causal=True, dtype=torch.float32)

    def call(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
        return relative_attention(q, k, v, relative=relative, causal=True)

    expected = call(q, k, v, relative)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, relative), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = call(q, k, v, relative)
    assert low.dtype is torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.05
    low.float().sum().backward()
    assert relative.grad is not None
    assert relative.grad.dtype is torch.float32


def test_never_a_matrix_of_queries_and_keys() -> None:
    """The largest tensor made, forward and backward, is linear in the length."""
    largest: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "core_attn":
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    q, k, v, relative = inputs(
        3000, 3000, distances=3000, causal=True, batch=1, heads=1, key_heads=1, tables=1, channels=16, value=16
    )
    with Largest():
        out = relative_attention(q, k, v, relative=relative, causal=True)
        torch.autograd.grad(out.sum(), [q, k, v, relative])
    assert max(largest) <= 3000 * 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relative": torch.randn(4, 3)}, "relative must have shape"),
        ({"relative": torch.randn(3, 5, 6)}, "H = 4"),
        ({"relative": torch.randn(4, 5, 7)}, "D = 6"),
        ({"relative": torch.randn(4, 4, 6)}, "2R - 1"),
        ({"relative": torch.randn(4, 0, 6)}, "R >= 1"),
        ({"relative": torch.ones(4, 5, 6, dtype=torch.int64)}, "floating point"),
        ({"q": torch.randn(4, 3, 6)}, "q, k and v must have shape"),
        ({"key_padding_mask": torch.ones(2, 3)}, "must be boolean"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    q, k, v, relative = inputs(5, 6, distances=3, causal=False, dtype=torch.float32)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "relative": relative, **change}
    with pytest.raises(ValueError, match=says) as caught:
        relative_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert "\n" not in str(caught.value)


def test_backends_by_name() -> None:
    q, k, v, relative = inputs(5, 6, distances=3, causal=False)
    with pytest.raises(UnknownNameError, match="backend"):
        relative_attention(q, k, v, relative=relative, backend="sdpa")
    loss = relative_attention(q, k, v, relative=relative, backend="torch").square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
