"""Decoding caches: what they remember, what they cost, how they branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core_attn.state import FullCache, MixedCache, SinkCache, WindowCache


def pieces(total: int, sizes: list[int], value_dim: int = 3) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    k, v = torch.randn(2, 2, total, 4), torch.randn(2, 2, total, value_dim)
    assert sum(sizes) == total
    return k, v, list(zip(k.split(sizes, dim=2), v.split(sizes, dim=2)))


@pytest.mark.parametrize("sizes", [[1] * 40, [17, 1, 1, 5, 16], [40]])
def test_full_cache_returns_everything_so_far(sizes):
    k, v, parts = pieces(40, sizes)
    cache = FullCache(2, 2, 4, value_dim=3)
    assert len(cache) == 0
    done = 0
    for new_k, new_v in parts:
        keys, values = cache.append(new_k, new_v)
        done += new_k.shape[2]
        assert torch.equal(keys, k[:, :, :done])
        assert torch.equal(values, v[:, :, :done])
        assert len(cache) == cache.seen == done


@pytest.mark.parametrize("left", [0, 1, 5, 100])
@pytest.mark.parametrize("sizes", [[1] * 40, [17, 1, 1, 5, 16], [40]])
def test_window_cache_returns_the_new_and_the_last_left(left, sizes):
    k, v, parts = pieces(40, sizes)
    cache = WindowCache(2, 2, 4, value_dim=3, left=left)
    done = 0
    for new_k, new_v in parts:
        keys, values = cache.append(new_k, new_v)
        start, done = max(0, done - left), done + new_k.shape[2]
        assert torch.equal(keys, k[:, :, start:done])
        assert torch.equal(values, v[:, :, start:done])
        assert len(cache) == min(left, done)
        assert cache.seen == done


def test_full_cache_copies_little_and_window_cache_stays_small():
    full, window = FullCache(1, 1, 4), WindowCache(1, 1, 4, left=7)
    step = torch.randn(1, 1, 1, 4)
    window.append(step.expand(1, 1, 500, 4), step.expand(1, 1, 500, 4))  # a long prompt leaves no long buffer behind
    buffers, sizes = set(), set()
    for _ in range(1000):
        full.append(step, step)
        window.append(step, step)
        buffers.add(full.nbytes)
        sizes.add(window.nbytes)
    assert len(buffers) <= 8  # doubling: 16 … 2048 tokens
    assert full.nbytes <= 2 * 2 * 4 * 4 * 1000 + 1024
    assert sizes == {2 * 4 * 4 * 16}


def test_earlier_answers_stay_as_they_were():
    cache = WindowCache(1, 1, 2, left=3)
    answers = []
    for i in range(30):
        token = torch.full((1, 1, 1, 2), float(i))
        answers.append(cache.append(token, token)[0])
    for i, keys in enumerate(answers):
        assert keys[0, 0, :, 0].tolist() == [float(j) for j in range(max(0, i - 3), i + 1)]


def test_select_branches_and_reorders():
    cache = FullCache(2, 1, 2)
    k = torch.randn(2, 1, 5, 2)
    cache.append(k, k)
    twin = cache.select(torch.tensor([1, 0, 1]))
    assert torch.equal(twin.keys, k[[1, 0, 1]])
    one, other = torch.ones(2, 1, 1, 2), torch.zeros(3, 1, 1, 2)
    cache.append(one, one)
    twin.append(other, other)
    assert torch.equal(cache.keys[:, :, 5:], one)
    assert torch.equal(twin.keys[:, :, 5:], other)


@pytest.mark.parametrize("make", [FullCache, lambda *s: WindowCache(*s, left=3)])
def test_gradients_flow_through_the_cache(make):
    k = torch.randn(1, 1, 6, 2, requires_grad=True)
    cache = make(1, 1, 2)
    total = k.new_zeros(())
    for i in range(6):
        keys, values = cache.append(k[:, :, i : i + 1], k[:, :, i : i + 1].detach())
        total = total + (keys * values.detach()).sum()
    (grad,) = torch.autograd.grad(total, k)
    reads = [6 - i if make is FullCache else min(4, 6 - i) for i in range(6)]
    expected = k.detach() * torch.tensor(reads, dtype=torch.float32)[:, None]
    torch.testing.assert_close(grad, expected)


def test_dtype_of_the_cache_is_its_own():
    cache = FullCache(1, 1, 2, dtype=torch.bfloat16)
    k = torch.randn(1, 1, 3, 2)
    keys, _ = cache.append(k, k)
    assert cache.keys.dtype is torch.bfloat16
    assert keys.dtype is torch.float32
    assert torch.equal(keys, k.bfloat16().float())


def test_shapes_that_do_not_fit_are_refused_and_nothing_changes():
    cache = FullCache(2, 2, 4)
    good = torch.randn(2, 2, 3, 4)
    for k, v, name in [
        (torch.randn(1, 2, 3, 4), good, "k"),
        (torch.randn(2, 2, 3, 5), good, "k"),
        (torch.randn(2, 3, 4), good, "k"),
        (good, torch.randn(2, 2, 2, 4), "v"),
    ]:
        with pytest.raises(ValueError, match=f"takes {name} of shape"):
            cache.append(k, v)
    assert len(cache) == 0
    with pytest.raises(ValueError, match="left must be at least 0"):
        WindowCache(1, 1, 2, left=-1)


# Sinks with a window


@pytest.mark.parametrize("sinks", [0, 1, 4, 60])
@pytest.mark.parametrize("left", [0, 1, 5, 100])
@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 1, 17, 1, 1, 5, 11], [40]])
def test_sink_cache_returns_the_first_the_last_and_the_new(sinks, left, sizes):
    k, v, parts = pieces(40, sizes)
    cache = SinkCache(2, 2, 4, value_dim=3, sinks=sinks, left=left)
    done = 0
    for new_k, new_v in parts:
        keys, values = cache.append(new_k, new_v)
        kept = [i for i in range(done) if i < sinks or i >= done - left]
        done += new_k.shape[2]
        read = kept + list(range(done - new_k.shape[2], done))
        assert torch.equal(keys, k[:, :, read])
        assert torch.equal(values, v[:, :, read])
        kept = [i for i in range(done) if i < sinks or i >= done - left]
        assert torch.equal(cache.keys, k[:, :, kept])
        assert torch.equal(cache.values, v[:, :, kept])
        assert len(cache) == len(kept)
        assert cache.seen == done


def test_sink_cache_stays_small():
    cache = SinkCache(1, 1, 4, sinks=4, left=7)
    step = torch.randn(1, 1, 1, 4)
    cache.append(step.expand(1, 1, 500, 4), step.expand(1, 1, 500, 4))
    sizes = set()
    for _ in range(3000):
        cache.append(step, step)
        sizes.add(cache.nbytes)
    assert sizes == {2 * 4 * 4 * (16 + 16)}


def test_sink_cache_answers_stay_select_branches_and_gradients_flow():
    k = torch.randn(2, 1, 30, 2, requires_grad=True)
    cache = SinkCache(2, 1, 2, sinks=2, left=3)
    answers = [cache.append(k[:, :, i : i + 1], k[:, :, i : i + 1].detach())[0] for i in range(30)]
    for i, keys in enumerate(answers):
        read = [j for j in range(i + 1) if j < 2 or j >= i - 3]
        assert torch.equal(keys, k[:, :, read])
    (grad,) = torch.autograd.grad(sum(a.sum() for a in answers), k)
    assert grad[0, 0, :, 0].tolist() == [30.0, 29.0] + [float(min(4, 30 - i)) for i in range(2, 30)]

    plain = SinkCache(2, 1, 2, sinks=2, left=3)
    plain.append(k.detach(), k.detach())
    twin = plain.select(torch.tensor([1, 0, 1]))
    one, other = torch.ones(2, 1, 1, 2), torch.zeros(3, 1, 1, 2)
    plain.append(one, one)
    twin.append(other, other)
    assert torch.equal(plain.keys[:, :, -1:], one)
    assert torch.equal(twin.keys[:, :, :4], k[[1, 0, 1]][:, :, [0, 1, 28, 29]])
    assert torch.equal(twin.keys[:, :, -1:], other)


def test_sink_cache_refuses_what_does_not_fit_and_nothing_changes():
    cache = SinkCache(2, 2, 4, sinks=2, left=3)
    good = torch.randn(2, 2, 5, 4)
    for k, v, name in [
        (torch.randn(1, 2, 5, 4), good, "k"),
        (torch.randn(2, 3, 4), good, "k"),
        (good, torch.randn(2, 2, 4, 4), "v"),
    ]:
        with pytest.raises(ValueError, match=f"takes {name} of shape"):
            cache.append(k, v)
    assert len(cache) == cache.seen == 0
    with pytest.raises(ValueError, match="sinks must be at least 0"):
        SinkCache(1, 1, 2, sinks=-1, left=3)


# Heads that remember in different ways


def test_mixed_cache_gives_each_part_its_heads():
    k, v = torch.randn(2, 5, 20, 4), torch.randn(2, 5, 20, 4)
    everything, streaming = FullCache(2, 2, 4), SinkCache(2, 3, 4, sinks=1, left=2)
    cache = MixedCache([([4, 1], everything), ([0, 2, 3], streaming)])
    for i in range(20):
        (full, _), (near, values) = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert torch.equal(full, k[:, [4, 1], : i + 1])
        read = [j for j in range(i + 1) if j < 1 or j >= i - 2]
        assert torch.equal(near, k[:, [0, 2, 3]][:, :, read])
        assert torch.equal(values, v[:, [0, 2, 3]][:, :, read])
    assert cache.seen == 20
    assert cache.nbytes == everything.nbytes + streaming.nbytes
    twin = cache.select(torch.tensor([1]))
    cache.append(k[:, :, :1], v[:, :, :1])
    assert twin.seen == 20
    assert torch.equal(twin.parts[0][1].keys, k[1:, [4, 1]])
