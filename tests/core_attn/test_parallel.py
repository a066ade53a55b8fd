"""Attention over 2 and 4 processes (gloo) against one: outputs, gradients, whole mixers, and mistakes.

One start of the processes a number of them, which runs every case of `parallel_worker.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import core_attn
from core_attn import parallel
from core_attn.einsums import pairs_read

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def seen(request, tmp_path_factory):
    """What each process saw, by rank."""
    world = request.param
    folder = tmp_path_factory.mktemp("processes")
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def test_ring_and_heads_equal_one_process(seen):
    """Causal or not, windows, grouped heads, L != M, padding, rows without keys: outputs and gradients."""
    for process in seen:
        assert len(process["operators"]) == 3 * 144
        for case, error in process["operators"].items():
            assert error <= (1e-12 if "float64" in case else 1e-5), f"{case}: {error:.1e}"


def test_bfloat16_is_no_worse_than_the_library(seen):
    for process in seen:
        assert process["half"]["ours"] <= 2 * process["half"]["sdpa"]


def test_mixers_on_shares_of_the_tokens(seen):
    """Outputs, gradients of inputs, summed gradients of weights; groups that are not all processes."""
    for process in seen:
        assert len(process["modules"]) == 11
        for case, error in process["modules"].items():
            assert error <= 1e-12, f"{case}: {error:.1e}"
        assert process["subgroup"]["error"] <= 1e-12
        assert process["subgroup"]["outside"] == "this process is not a member of the group"


def test_mistakes_are_sentences_on_every_process(seen):
    """Nobody is left waiting for a process that stopped."""
    expected = {
        "length": "cannot be divided among",
        "zigzag length": "pieces (layout zigzag); pad it",
        "layout": "unknown layout 'zigzack'; did you mean 'zigzag'?",
        "odd shares": "two pieces of equal length",
        "shapes differ": "the processes call with different shapes or options",
        "options differ": "the processes call with different shapes or options",
        "heads": "heads cannot be divided among",
        "heads differ": "the processes call with different shapes or options",
        "mask": "key_padding_mask must have shape",
        "no heads to split": "3 heads cannot be divided among",
        "dependent": "the heads of auto_correlation depend on each other",
        "no softmax": "flow is not exact softmax attention",
        "no mixer": "Linear holds no token mixer",
        "way": "unknown way to split 'rings'; did you mean 'ring'?",
        "dropout": "drops no weights of the map",
        "maps": "cannot be read or edited while a mixer is split",
    }
    for process in seen:
        assert set(process["mistakes"]) == set(expected)
        for name, said in process["mistakes"].items():
            assert expected[name] in said, f"{name}: {said}"
            assert "\n" not in said


def test_without_processes():
    x = torch.randn(1, 2, 4, 8)
    for call in (
        lambda: parallel.ring_attention(x, x, x),
        lambda: parallel.head_parallel_attention(x, x, x),
        lambda: parallel.shard(x, dim=2),
        lambda: parallel.parallelize(torch.nn.Linear(2, 2)).__enter__(),
    ):
        with pytest.raises(ValueError, match="there is no process group; start the processes with torchrun"):
            call()


def pairs(split, rank):
    """Pairs of a query and a key that one process computes."""
    rows, columns = split.queries // split.pieces, split.keys // split.pieces
    return sum(
        pairs_read(rows, columns, left=part.left, right=part.right)
        for owner in range(split.world)
        for part in split.parts(rank, owner)
    )


def test_every_pair_is_computed_once():
    """All processes together compute as many pairs as are read, whatever the layout, window and lengths."""
    for world in (1, 2, 3, 8):
        for pieces in (1, 2):
            for queries, keys in ((8, 8), (2, 6), (6, 2)):
                for left, right in ((None, None), (None, 0), (5, 0), (3, 9), (0, 0), (None, 4)):
                    split = parallel._Split(world, pieces, queries, keys, left, right)
                    total = pairs_read(world * queries, world * keys, left=left, right=right)
                    assert sum(pairs(split, rank) for rank in range(world)) == total


def test_zigzag_shares_causal_work_equally():
    def work(pieces):
        return [pairs(parallel._Split(8, pieces, 64, 64, None, 0), rank) for rank in range(8)]

    in_order, zigzag = work(1), work(2)
    assert max(in_order) > 10 * min(in_order)
    assert max(zigzag) == min(zigzag)


def test_blocks_travel_no_farther_than_they_are_read():
    def hops(left, right, pieces=1):
        return parallel._hops(parallel._Split(8, pieces, 64, 64, left, right))

    assert hops(None, None) == hops(None, 0) == 7
    assert hops(63, 0) == hops(64, 0) == 1
    assert hops(65, 0) == 2
    assert hops(0, 0) == 0
    assert hops(0, 1) == 7  # the next process's block has all the way round to go


@pytest.mark.parametrize(
    ("name", "options", "independent"),
    [
        ("softmax", {"kv_heads": 2}, True),
        ("flow", {"causal": True}, True),
        ("prob_sparse", {}, True),
        ("auto_correlation", {}, False),  # one set of delays for all heads
        ("longlora", {}, False),  # half of the heads see shifted groups
        ("ls", {}, False),  # half of the heads see a window
        ("duo", {}, False),  # some heads stream
        ("s2", {"causal": True}, False),  # strides with an offset of each head's own
        ("relative", {}, False),  # a table for each head
    ],
)
def test_heads_that_can_be_split(name, options, independent):
    """Found out by trying, at a length where not all pairs are read."""
    mixer = core_attn.build(name, dim=16, heads=4, **options)
    assert parallel._heads_are_independent(mixer, 2) is independent
    assert mixer.training


def test_what_the_ring_splits():
    """Softmax attention with nothing of its own in front of it."""
    assert parallel._ring_overrides(core_attn.build("softmax", dim=16, heads=4, window=4), None, "contiguous")
    for name in ("kdgqa", "flow"):
        with pytest.raises(ValueError, match=f"{name} is not exact softmax attention"):
            parallel._ring_overrides(core_attn.build(name, dim=16, heads=4), None, "contiguous")
    with pytest.raises(ValueError, match="kdgqa is not made of heads with one attention each"):
        parallel._heads_overrides(core_attn.build("kdgqa", dim=16, heads=4), None, 2)
