"""The contract's test must fail for mechanisms that break the contract, and for the right reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

import core_attn
from core_attn.contract import Growth, Pattern
from core_attn.einsums import Cascade
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.testing import CHECKS, CheckFailedError, Outcome, check_mechanism
from core_attn.testing.growth import CountingMode, count, expected_exponent, exponent

SELF = frozenset({Pattern.NONCAUSAL_SELF})
CAUSAL = frozenset({Pattern.CAUSAL_SELF})


def test_an_honest_mechanism_passes(toy):
    report = check_mechanism(toy)
    assert report.passed
    assert [r.name for r in report] == list(CHECKS)
    assert {r.name for r in report if r.outcome is Outcome.NOT_CLAIMED} == {"backends", "decoding", "cost"}
    assert report["growth_time"].detail.startswith("claimed L^2; exponent 1.99")
    assert "toy: 20 passed, 0 failed, 3 not claimed" in str(report)
    assert report.to_dict()["results"][0]["outcome"] == "passed"


def softmax(q, k):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)


def leaks(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k) @ v


def leaks_in_training(self, q, k, v, *, key_padding_mask, aux):
    weights = self.attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)
    return weights @ v + (1e-6 * v.mean(2, keepdim=True) if self.training else 0)


def leaks_through_a_gradient(self, q, k, v, *, key_padding_mask, aux):
    weights = self.attention_map(q, k, key_padding_mask=key_padding_mask, aux=aux)
    mean = v.mean(2, keepdim=True)
    return weights @ v + mean - mean.detach()


def ignores_padding(self, q, k, v, *, key_padding_mask, aux):
    # Values under the mask do not matter: the frame zeroes them. Their places still take weight.
    return softmax(q, k) @ v


def reads_padding(self, x, **call):
    return MultiHeadMixer.forward(self, x, **call) + 0 * x.sum(1, keepdim=True)


def mixes_batch(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k - k.mean(0, keepdim=True)) @ v


def mixes_batch_in_training(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k - k.mean(0, keepdim=True) if self.training else k) @ v


def one_sample_differs(self, q, k, v, *, key_padding_mask, aux):
    # A fast path for single samples with another scale: batch 1 and batch 3 disagree.
    return torch.softmax(q @ k.mT * (0.1 if len(q) == 1 else 0.2), dim=-1) @ v


def wrong_dtype(self, q, k, v, *, key_padding_mask, aux):
    return (softmax(q.float(), k.float()) @ v.float()).to(v.dtype)


def random(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k) @ v * (1 + 1e-4 * torch.rand(()))


def wrong_gradient(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k.detach()) @ v


def blocks_of_two(self, q, k, v, *, key_padding_mask, aux):
    # Forgets the rest of a length that 2 does not divide.
    out = torch.zeros_like(q)
    even = q.shape[2] // 2 * 2
    out[:, :, :even] = softmax(q[:, :, :even], k) @ v
    return out / out[:, :, -1:].abs().sum((-1, -2), keepdim=True)


def breaks_on_empty(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k) @ v * (1 + 0 * q.flatten()[0])


def assumes_contiguous(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k) @ v * (1.0 if self.contiguous else 2.0)


def remembers_contiguity(self, x, **call):
    self.contiguous = x.is_contiguous()
    return MultiHeadMixer.forward(self, x, **call)


def branches_on_data(self, q, k, v, *, key_padding_mask, aux):
    return softmax(q, k) @ v * (2.0 if q.sum() > 0 else 1.0)


def other_map(self, q, k, *, key_padding_mask, aux):
    return softmax(q, k) + 1e-6


BROKEN = {
    "causal": ("causal", {"attend": leaks}, {"patterns": CAUSAL, "padding": False, "maps": False}),
    "causal in training": ("causal", {"attend": leaks_in_training}, {"patterns": CAUSAL, "maps": False}),
    "causal gradient": ("causal", {"attend": leaks_through_a_gradient}, {"patterns": CAUSAL, "maps": False}),
    "padding": ("padding", {"attend": ignores_padding}, {"patterns": SELF}),
    "padding read": ("padding", {"forward": reads_padding}, {"patterns": SELF}),
    "batch": ("batch", {"attend": mixes_batch}, {"patterns": SELF}),
    "batch in training": ("batch", {"attend": mixes_batch_in_training}, {"patterns": SELF}),
    "batch of one": ("batch", {"attend": one_sample_differs}, {"patterns": SELF}),
    "precision": ("precision", {"attend": lambda self, q, k, v, **_: softmax(q, k) @ v + v.dtype.itemsize}, {}),
    "autocast dtypes": (
        "autocast",
        {"attend": lambda self, q, k, v, **_: torch.lerp(v, v.to(next(self.parameters()).dtype), 0.5)},
        {},
    ),
    "autocast numbers": (
        "autocast",
        {"attend": lambda self, q, k, v, **_: softmax(q, k) @ v + torch.is_autocast_enabled("cpu")},
        {},
    ),
    "dtype": ("shape", {"forward": lambda self, x, **call: MultiHeadMixer.forward(self, x, **call).float()}, {}),
    "float32 inside": ("gradients", {"attend": wrong_dtype}, {"patterns": SELF}),
    "determinism": ("determinism", {"attend": random}, {"patterns": SELF}),
    "draws unseen": (
        "determinism",
        {"attend": lambda self, q, k, v, **_: softmax(q, k) @ v + 0 * torch.rand(())},
        {"patterns": SELF},
    ),
    "gradients": ("gradients", {"attend": wrong_gradient}, {"patterns": SELF}),
    "lengths": ("lengths", {"attend": blocks_of_two}, {"patterns": SELF}),
    "empty batch": ("empty_batch", {"attend": breaks_on_empty}, {"patterns": SELF}),
    "strides": ("strides", {"forward": remembers_contiguity, "attend": assumes_contiguous}, {"patterns": SELF}),
    "input written": (
        "strides",
        {"forward": lambda self, x, **call: MultiHeadMixer.forward(self, x.mul_(1.5), **call)},
        {"patterns": SELF},
    ),
    "compile": ("compile", {"attend": branches_on_data}, {"patterns": SELF, "padding": False}),
    "export": ("export", {"attend": branches_on_data}, {"patterns": SELF}),
    "map is not what is computed": (
        "maps",
        {"attention_map": other_map, "attend": lambda self, q, k, v, **_: softmax(q, k) @ v},
        {"patterns": SELF, "padding": False},
    ),
    "time too low": ("growth_time", {}, {"time": Growth.LOGLINEAR, "patterns": SELF}),
    "time too high": (
        "growth_time",
        {"attend": lambda self, q, k, v, **_: v.cumsum(2)},
        {"patterns": SELF},
    ),
    "memory too low": ("growth_memory", {}, {"memory": Growth.LINEAR, "patterns": SELF}),
    "pattern not refused": ("inputs", {"check_inputs": lambda self, x, **call: None}, {"patterns": SELF}),
    "decodes without step": ("decoding", {}, {"decodes": True}),
    "constant state without decoding": ("facts", {}, {"constant_state": True}),
    "raises": ("shape", {"attend": lambda self, q, k, v, **_: q @ k}, {}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mechanism_fails_the_named_check(variant, name):
    check, methods, facts = BROKEN[name]
    report = check_mechanism(variant(methods, **facts), only=[check], raise_on_failure=False)
    assert not report.passed, str(report)
    assert [r.name for r in report.failures] == [check]
    with pytest.raises(CheckFailedError, match=check):
        check_mechanism(variant(methods, **facts), only=[check])


def test_each_break_fails_for_its_own_reason(variant):
    def detail(name):
        check, methods, facts = BROKEN[name]
        return check_mechanism(variant(methods, **facts), only=[check], raise_on_failure=False)[check].detail

    assert "tokens from 1 on change outputs before them" in detail("causal")
    assert "train: tokens" in detail("causal in training")
    assert "have gradients" in detail("causal gradient")
    assert "4 padding tokens change the outputs of the real ones" in detail("padding")
    assert "inf under the mask changes the output" in detail("padding read")
    assert "L=9, eval: a sample alone gives another output" in detail("batch")
    assert "train: the rest of the batch" in detail("batch in training")
    assert "a sample alone" in detail("batch of one")
    assert "x of float64 gives float32" in detail("dtype")
    assert "expected dtype" in detail("autocast dtypes")
    assert "the output under autocast is off by" in detail("autocast numbers")
    assert "two evaluations" in detail("determinism")
    assert "global random state" in detail("draws unseen")
    assert "writes into its input" in detail("input written")
    assert "claimed to grow as L log L but grows as L^1.99" in detail("time too low")
    assert "grows only as L^1.00" in detail("time too high")
    assert "memory is claimed to grow as L but" in detail("memory too low")
    assert "RuntimeError at test_check_mechanism.py" in detail("raises")


class Decoder(MultiHeadMixer):
    """Running mean of the values: decodes with one sum and one count."""

    def attend(self, q, k, v, *, key_padding_mask, aux):
        return v.cumsum(2) / torch.arange(1, v.shape[2] + 1, dtype=v.dtype, device=v.device)[:, None]

    def init_state(self, batch, *, device=None, dtype=None):
        return {"sum": torch.zeros(batch, self.heads, 1, self.head_dim, device=device, dtype=dtype), "count": 0}

    def step(self, x, state):
        v = self.split_heads(self.v_proj(x))
        sums = state["sum"] + v.cumsum(2)
        counts = state["count"] + torch.arange(1, v.shape[2] + 1, dtype=v.dtype)[:, None]
        out = self.out_proj(self.merge_heads(sums / counts))
        return out, {"sum": sums[:, :, -1:].clone(), "count": state["count"] + v.shape[2]}


def decoder(methods=None, **facts):
    info = {
        "name": "running_mean",
        "title": "A toy",
        "source": "",
        "year": 2017,
        "patterns": CAUSAL,
        "time": Growth.LINEAR,
        "memory": Growth.LINEAR,
        "decodes": True,
        "constant_state": True,
    }
    return type("D", (Decoder,), {"info": core_attn.MechanismInfo(**{**info, **facts}), **(methods or {})})


def test_decoding():
    report = check_mechanism(decoder(), only=["facts", "causal", "decoding", "growth_time", "growth_memory", "inputs"])
    assert all(r.outcome is Outcome.PASSED for r in report)

    def forgets(self, x, state):
        out, new = Decoder.step(self, x, state)
        return out, {**new, "count": state["count"] + 1}

    report = check_mechanism(decoder({"step": forgets}), only=["decoding"], raise_on_failure=False)
    assert "in chunks: decoding differs" in report["decoding"].detail

    def hoards(self, x, state):
        out, new = Decoder.step(self, x, state)
        return out, {**new, "all": [*state.get("all", []), x]}

    report = check_mechanism(decoder({"step": hoards}), only=["decoding"], raise_on_failure=False)
    assert "the state grows" in report["decoding"].detail
    check_mechanism(decoder({"step": hoards}, constant_state=False), only=["decoding"])


def test_stochastic_mechanisms(variant):
    def draw(self, q, k, generator):
        if generator is None and not self.training:
            generator = torch.Generator().manual_seed(0)
        return torch.rand((), generator=generator, dtype=q.dtype)

    def attend(self, q, k, v, *, key_padding_mask, aux):
        return softmax(q, k) @ v * aux

    def unseeded(self, q, k, generator):
        return torch.rand((), dtype=q.dtype)

    facts = {"stochastic": True, "patterns": SELF}
    assert check_mechanism(variant({"draw": draw, "attend": attend}, **facts), only=["determinism"]).passed
    with pytest.raises(CheckFailedError, match="two evaluations"):
        check_mechanism(variant({"draw": unseeded, "attend": attend}, **facts), only=["determinism"])


def test_backends(variant, monkeypatch):
    """A wrong fast form is found; one that refuses is not counted as agreeing."""
    from core_attn import api, dispatch

    class Twins(variant(patterns=SELF)):
        def __init__(self, dim, *, heads=8, causal=False, backend="auto"):
            super().__init__(dim, heads=heads, causal=causal)
            self.backend = backend

        def attend(self, q, k, v, *, key_padding_mask, aux):
            return operator(q, k, v, key_padding_mask=key_padding_mask, backend=self.backend)

    def reference(q, k, v, *, key_padding_mask):
        scores = q @ k.mT
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], -1e9)
        return torch.softmax(scores, -1) @ v

    def run_with(fast):
        nonlocal operator
        held = dict(dispatch._OPERATORS)
        operator = dispatch.Operator(
            "twins",
            [
                dispatch.Backend("fast", fast),
                dispatch.Backend("kernel", fast, why_not=lambda request: "there is no GPU"),
                dispatch.Backend("reference", reference),
            ],
        )
        dispatch._OPERATORS.clear()
        dispatch._OPERATORS.update(held)
        monkeypatch.setattr(api, "operator_of", lambda info: operator)
        return check_mechanism(Twins, only=["backends"], raise_on_failure=False)["backends"]

    operator = None
    good = run_with(lambda q, k, v, **more: reference(q, k, v, **more))
    assert good.outcome is Outcome.PASSED
    assert good.detail == "fast = reference; cannot run here: kernel"
    wrong = run_with(lambda q, k, v, **more: reference(q, k, v, **more) * (1 + 1e-8))
    assert wrong.outcome is Outcome.FAILED
    assert "fast, noncausal_self, L=65, float64, eval: output is off the reference" in wrong.detail
    wrong = run_with(lambda q, k, v, **more: reference(q, k.detach() * 1, v, **more))
    assert "gradient is off" in wrong.detail


def test_targets_and_errors(toy, variant):
    assert check_mechanism(lambda dim, heads, causal: toy(dim, heads=heads, causal=causal), only=["shape"]).passed
    assert check_mechanism(lambda: toy(12, heads=3), only=["shape", "inputs", "causal", "maps"]).passed
    assert check_mechanism(toy, dim=24, heads=4, dropout=0.5, only=["batch", "maps"]).passed
    with pytest.raises(ValueError, match="did you mean 'causal'"):
        check_mechanism(toy, only=["casual"])
    with pytest.raises(ValueError, match="Linear is not a core_attn"):
        check_mechanism(nn.Linear)
    with pytest.raises(ValueError, match="not a int"):
        check_mechanism(3)
    with pytest.raises(ValueError, match="token mixers, this made a Linear"):
        check_mechanism(lambda: nn.Linear(2, 2))


def test_leaves_the_callers_random_state(toy):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    check_mechanism(toy, only=["determinism", "batch", "maps"])
    assert torch.equal(before, torch.get_rng_state())


@torch.library.custom_op("attn_test::hidden_square", mutates_args=())
def hidden_square(x: torch.Tensor) -> torch.Tensor:
    return (x[:, None] * x[None]).sum(0)


@torch.library.custom_op("attn_test::unseen_product", mutates_args=())
def unseen_product(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() @ x.numpy().T)


@register_flop_formula(torch.ops.attn_test.unseen_product)
def unseen_flops(x, **more):
    return 2 * x[0] * x[0] * x[1]


def test_counting():
    """Work and bytes of known computations, the inside of a custom operator included."""
    a = torch.randn(100, 20)
    product = count(lambda: a @ a.mT)
    assert product.work == 2 * 100 * 100 * 20
    assert product.peak_bytes == 100 * 100 * 4
    chain = count(lambda: (a + 1).mul_(2).sum())
    assert chain.peak_bytes == 100 * 20 * 4 + 4
    freed = count(lambda: [(a + i).sum() for i in range(5)])
    assert freed.peak_bytes <= 100 * 20 * 4 + 5 * 4 + 4
    hidden = [count(lambda n=n: hidden_square(torch.ones(n))) for n in (128, 256)]
    assert 1.95 < exponent([c.work for c in hidden]) < 2.05
    assert 1.95 < exponent([c.peak_bytes for c in hidden]) < 2.05
    fft = [count(lambda n=n: torch.fft.rfft(torch.ones(n))).work for n in (2048, 4096)]
    assert exponent(fft) == pytest.approx(expected_exponent(Growth.LOGLINEAR, 4096), abs=0.05)
    assert CountingMode().work == 0


def test_flops_are_counted_apart_from_elementwise_work():
    """Products of matrices, dense and by index, attention kernels and transforms; nothing else."""
    a, table = torch.randn(30, 20), torch.randn(50, 8)
    assert count(lambda: (a @ a.mT).exp().sum()).flops == 2 * 30 * 30 * 20
    assert count(lambda: torch.softmax(a, -1).cumsum(0)).flops == 0
    heads = torch.randn(1, 2, 16, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count(lambda: attention(heads, heads, heads)).flops == 2 * 2 * 2 * 16 * 16 * 4
    assert count(lambda: attention(heads, heads, heads, is_causal=True)).flops == 2 * 2 * 2 * 16 * 16 * 4
    places, weights = torch.randint(50, (7, 3)), torch.rand(7, 3)
    bag = count(lambda: torch.nn.functional.embedding_bag(places, table, per_sample_weights=weights, mode="sum"))
    assert bag.flops == 2 * 7 * 3 * 8
    assert count(lambda: unseen_product(torch.ones(30, 20))).flops == 2 * 30 * 30 * 20
    real, whole = torch.randn(6, 64), torch.randn(6, 64, dtype=torch.complex64)
    assert count(lambda: torch.fft.fft(whole)).flops == 5 * 6 * 64 * 6
    assert count(lambda: torch.fft.rfft(real)).flops == 2.5 * 6 * 64 * 6
    assert count(lambda: torch.fft.irfft(torch.fft.rfft(real))).flops == 2 * 2.5 * 6 * 64 * 6


COSTS = {"flops": "4*B*(L + M)*C**2 + 4*B*H*P*D", "bytes": "E*(B*(2*L + X)*C + 4*C**2)"}


def costs(variant, **changed):
    cascade = Cascade(**{"einsums": ("O[l,d] = A[l,m] * V[m,d]",), "passes": 3, **COSTS, **changed})
    return check_mechanism(variant(cascade=cascade), only=["cost"], raise_on_failure=False)["cost"]


def test_cost(variant):
    """A right formula passes with the ratio that masking costs; one of something else is told so."""
    right = costs(variant)
    assert right.outcome is Outcome.PASSED
    assert "noncausal_self 1.00, 1.00; causal_self 1.89, 1.94; noncausal_cross 1.00, 1.00" in right.detail
    for flops in (
        "4*B*(L + M)*C**2 + 8*B*H*P*D",
        "4*B*(L + M)*C**2",
        "4*(L + M)*C**2 + 4*H*P*D",
    ):
        assert "FLOPs are counted" in costs(variant, flops=flops).detail
    assert "inputs, output and weights hold" in costs(variant, bytes="E*C").detail
    assert "FLOPs are counted, L - L gives 0" in costs(variant, flops="L - L").detail
    assert "gives -512 FLOPs" in costs(variant, flops="-L").detail
    assert "'Z', which is neither a standard symbol nor explained" in costs(variant, flops="Z").detail
    assert "needs a size for 'Z'" in costs(variant, flops="Z", symbols={"Z": "a width"}).detail
    assert "at least one pass" in costs(variant, passes=0).detail


def test_every_rank_of_grid_is_tested(variant):
    """A mechanism that is wrong for one rank only is found, and the report says for which."""

    class Grids(variant(grid_ranks=frozenset({1, 2, 3}))):
        wrong: int = 0

        def side_input(self, q, k, *, x, query_padding_mask, grid, generator):
            assert grid is not None
            return grid

        def attend(self, q, k, v, *, key_padding_mask, aux):
            out = super().attend(q, k, v, key_padding_mask=key_padding_mask, aux=None)
            return out * float("nan") if len(aux) == self.wrong else out

    assert check_mechanism(Grids, only=["shape", "cost", "lengths"], raise_on_failure=False).passed
    broken = type("WrongIn3D", (Grids,), {"wrong": 3})
    report = check_mechanism(broken, only=["lengths"], raise_on_failure=False)
    assert report["lengths"].detail.startswith("grid of rank 3: ")
    assert check_mechanism(broken, only=["lengths"], grid_rank=2).passed
    with pytest.raises(ValueError, match="takes no grid of rank 4"):
        check_mechanism(Grids, grid_rank=4)


def test_counts_leave_out_kernels_whose_inside_is_unseen():
    """Else a mechanism would seem cheaper wherever its compiled kernel runs."""
    from core_attn import dispatch

    held = dict(dispatch._OPERATORS)
    operator = dispatch.Operator(
        "kernels", [dispatch.Backend("cpu", lambda q, k, v: "cpu"), dispatch.Backend("torch", lambda q, k, v: "torch")]
    )
    x = torch.zeros(1, 1, 1, 1)
    try:
        assert operator(x, x, x) == "cpu"
        with dispatch.without("cpu", "triton"):
            assert operator(x, x, x) == "torch"
            assert operator(x, x, x, backend="cpu") == "cpu"
        assert operator(x, x, x) == "cpu"
    finally:
        dispatch._OPERATORS.clear()
        dispatch._OPERATORS.update(held)
