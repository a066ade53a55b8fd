"""ProbSparse attention: the fast form is its definition, its draws are reproducible, its causal selection is causal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core_attn import ops
from core_attn.naming import UnknownNameError
from core_attn.ops.prob_sparse import fixed_keys, sample_keys, selected
from core_attn.ops.prob_sparse.reference import active_queries, doubling_blocks, prob_sparse_map
from core_attn.ops.prob_sparse.sampling import budget
from core_attn.testing import growth

FORMS = [(False, "causal"), (True, "causal"), (True, "paper")]


def _inputs(length: int, keys: int, batch: int = 2, heads: int = 3, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + keys)
    sizes = ((length, width), (keys, width), (keys, width + 1))
    return [
        torch.randn(batch, heads, n, d, generator=generator, dtype=torch.float64).requires_grad_() for n, d in sizes
    ]


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sampled"])
@pytest.mark.parametrize("factor", [1, 5])
@pytest.mark.parametrize(
    ("length", "keys", "causal", "selection"),
    [(n, n, *form) for form in FORMS for n in (1, 2, 3, 31, 97)] + [(19, 40, *FORMS[0]), (53, 11, *FORMS[0])],
)
def test_fast_form_is_the_definition(
    length: int, keys: int, causal: bool, selection: str, factor: int, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selected, "_DENSE_KEYS_PER_SAMPLE", 1000 if dense else 0)
    qkv = _inputs(length, keys)
    index = sample_keys(
        length, keys, factor=factor, prefix=causal and selection == "causal", generator=torch.Generator().manual_seed(0)
    )
    fast, slow = (
        ops.prob_sparse_attention(*qkv, causal=causal, selection=selection, factor=factor, index=index, backend=b)
        for b in ("torch", "reference")
    )
    assert fast.shape == (2, 3, length, 5)
    assert _off(fast, slow) < 1e-12
    upstream = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, qkv, upstream), torch.autograd.grad(slow, qkv, upstream), strict=True):
        assert _off(a, b) < 1e-11


def test_all_queries_attending_is_softmax_attention() -> None:
    qkv = _inputs(20, 20)
    # 5 ceil(ln 20) = 15 of 20; 7 ceil(ln 20) = 21 is more than there are.
    for causal in (False, True):
        dense = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=causal)
        full = ops.prob_sparse_attention(*qkv, causal=causal, factor=7)
        assert _off(full, dense) < 1e-12
        assert _off(ops.prob_sparse_attention(*qkv, causal=causal, factor=1), dense) > 1e-2


def test_lazy_queries_read_the_mean_or_the_sum_so_far() -> None:
    q, k, v = (x.detach() for x in _inputs(64, 64))
    index = fixed_keys(64, 64, factor=1)
    lazy = (prob_sparse_map(q, k, index=index, factor=1) == 1 / 64).all(-1)
    out = ops.prob_sparse_attention(q, k, v, index=index, factor=1)
    assert lazy.sum(-1).eq(64 - 5).all()
    assert _off(out[lazy], v.mean(2, keepdim=True).expand_as(out)[lazy]) < 1e-12
    weights = prob_sparse_map(q, k, index=index, factor=1, causal=True, selection="paper")
    lazy = (weights == torch.ones(64, 64).tril()).all(-1)
    lazy[..., 0] = False  # the first query reads its only key in either case
    out = ops.prob_sparse_attention(q, k, v, index=index, factor=1, causal=True, selection="paper")
    assert lazy.any()
    assert _off(out[lazy], v.cumsum(2)[lazy]) < 1e-12


@pytest.mark.parametrize("measure", ["random", "rising", "falling", "equal"])
def test_causal_selection_is_causal_and_bounded(measure: str) -> None:
    length, count = 300, 12
    values = {
        "random": torch.rand(2, 3, length, generator=torch.Generator().manual_seed(1)),
        "rising": torch.arange(length).float().expand(2, 3, length),
        "falling": -torch.arange(length).float().expand(2, 3, length),
        "equal": torch.zeros(2, 3, length),
    }[measure]
    active = active_queries(values, count, prefix=True)
    assert active[..., :count].all()
    for start, end in doubling_blocks(length, count):
        assert active[..., start:end].sum(-1).le(count).all()
    assert active.sum(-1).eq(count).all() == (measure in ("falling", "equal"))
    for cut in (1, 13, 100, 299):
        assert torch.equal(active_queries(values[..., :cut], count, prefix=True), active[..., :cut])


@pytest.mark.parametrize("length", [2, 37, 130])
def test_a_rising_measure_is_the_definition_too(length: int) -> None:
    q, k, v = _inputs(length, length)
    rising = q * torch.arange(1, length + 1).unsqueeze(-1)
    for causal, selection in FORMS:
        arguments = {"causal": causal, "selection": selection, "factor": 2, "index": fixed_keys(length, length)}
        fast = ops.prob_sparse_attention(rising, k, v, **arguments)
        assert _off(fast, ops.prob_sparse_attention(rising, k, v, **arguments, backend="reference")) < 1e-11


def test_blocks() -> None:
    assert doubling_blocks(100, 12) == [(0, 12), (12, 24), (24, 48), (48, 96), (96, 100)]
    assert doubling_blocks(5, 5) == [(0, 5)]
    assert doubling_blocks(1, 1) == [(0, 1)]


def test_budget() -> None:
    assert [budget(n, 5) for n in (1, 2, 5, 20, 96, 720)] == [1, 2, 5, 15, 25, 35]
    assert budget(96, 3) == 3 * math.ceil(math.log(96))


@pytest.mark.parametrize("draw", [sample_keys, fixed_keys])
def test_keys_lie_where_they_may_and_fill_it(draw: object) -> None:
    assert callable(draw)
    index = draw(400, 50, factor=5)
    assert index.shape == (400, 20)
    share = torch.bincount(index.flatten(), minlength=50) / index.numel()
    assert len(share) == 50
    assert _off(share, torch.full((50,), 0.02)) < 0.006
    index = draw(400, 400, factor=5, prefix=True)
    place = torch.arange(400).unsqueeze(-1)
    assert (index >= 0).all()
    assert (index <= place).all()
    assert abs(float(((index + 0.5) / (place + 1)).mean()) - 0.5) < 0.01


def test_draws_are_reproducible() -> None:
    def drawn(seed: int) -> Tensor:
        return sample_keys(30, 40, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    before = torch.get_rng_state()
    assert torch.equal(fixed_keys(30, 40), fixed_keys(30, 40))
    drawn(3)
    assert torch.equal(before, torch.get_rng_state())
    # The fixed keys are part of what an evaluated figure depends on: they must never change.
    assert fixed_keys(2, 1000, factor=1)[:, :4].tolist() == [[495, 72, 549, 145], [531, 587, 84, 820]]


def test_an_index_that_looks_ahead_is_folded_back() -> None:
    q, k, v = _inputs(30, 30)
    index = torch.full((30, 4), 29)
    folded = index % torch.arange(1, 31).unsqueeze(-1)
    assert torch.equal(
        ops.prob_sparse_attention(q, k, v, causal=True, factor=1, index=index),
        ops.prob_sparse_attention(q, k, v, causal=True, factor=1, index=folded),
    )


def test_no_matrix_of_all_pairs_in_long_sequences() -> None:
    length = 4096
    for causal in (False, True):
        q, k, v = (torch.randn(1, 1, length, 8).requires_grad_() for _ in range(3))
        used = growth.count(
            lambda q=q, k=k, v=v, causal=causal: ops.prob_sparse_attention(q, k, v, causal=causal).sum().backward()
        )
        assert used.peak_bytes < length * length * 4 / 4


@pytest.mark.parametrize("causal", [False, True])
def test_growth(causal: bool) -> None:
    counts = []
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        q, k, v = (torch.randn(1, 1, length, 8).requires_grad_() for _ in range(3))
        counts.append(
            growth.count(lambda q=q, k=k, v=v: ops.prob_sparse_attention(q, k, v, causal=causal).sum().backward())
        )
    # ceil(ln L) rises from 7 to 10 while L rises 32 times: 45.7 times; causal blocks double in number, too.
    assert counts[-1].work / counts[0].work < 60
    assert counts[-1].peak_bytes / counts[0].peak_bytes < 60


def test_errors() -> None:
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"shape \(B, H, L, D\)"):
        ops.prob_sparse_attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="one width"):
        ops.prob_sparse_attention(q[..., :3], k, v)
    with pytest.raises(ValueError, match="as many queries as keys"):
        ops.prob_sparse_attention(q[:, :, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="factor"):
        ops.prob_sparse_attention(q, k, v, factor=0)
    with pytest.raises(ValueError, match="index must have shape"):
        ops.prob_sparse_attention(q, k, v, index=torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(UnknownNameError, match="'paper'"):
        ops.prob_sparse_attention(q, k, v, selection="Paper")
