"""InfLLM against the official context manager, its definition by loops, its limits, its memory of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import core_attn
import core_attn.ops
from core_attn.mechanisms.sparse.infllm import representative_keys
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, int]] = json.loads((GOLDEN / "core_infllm.json").read_text(encoding="utf-8"))["cases"]
SMALL: dict[str, Any] = {"block_size": 4, "local": 6, "top": 2, "representatives": 2, "chunk": 4}


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return core_attn.build("infllm", **{"dim": 16, "heads": 2, "causal": True, **options}).double().eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_official_outputs(case: str, backend: str) -> None:
    stored = load_file(GOLDEN / "core_infllm.safetensors")
    q, k, v, right = (stored[f"{case}/{n}"] for n in ("q", "k", "v", "output"))
    facts = CASES[case]
    mixer = build(
        dim=8,
        block_size=facts["block_size"],
        initial_blocks=facts["initial"] // facts["block_size"],
        local=facts["local"],
        top=facts["top"],
        representatives=facts["block_size"],
        chunk=facts["chunk"],
        selection="paper",
        backend=backend,
    )
    blocks = mixer.side_input(q, k, x=q, query_padding_mask=None, grid=None, generator=None)
    assert difference(mixer.attend(q, k, v, key_padding_mask=None, aux=blocks), right) < 1e-12


def test_the_official_code_counts_keys_twice_in_chunks() -> None:
    """Unchanged it reads keys that some queries of a chunk still hold in their window once more with the older ones."""
    stored = load_file(GOLDEN / "core_infllm.safetensors")
    q, k, v, unchanged, right = (stored[f"few_blocks/{n}"] for n in ("q", "k", "v", "unchanged", "output"))
    facts = CASES["few_blocks"]
    initial, local, chunk, size = (facts[n] for n in ("initial", "local", "chunk", "block_size"))
    index = torch.full((1, 1, 31, 40), -1)
    for i in range(31):
        start = i - i % chunk
        stop = min(start + chunk, 31)
        left = min(initial, max(0, start - local)) + size * max(0, (start - initial - local) // size)
        copied = range(left, left + max(stop - left - local, 0))
        read = [*range(i + 1), *(j for j in copied if j > i - local)]
        index[0, 0, i, : len(read)] = torch.tensor(read)
    assert difference(core_attn.ops.gather_attention(q, k, v, index=index), unchanged) < 1e-12
    assert difference(right, unchanged) > 0.1
    single = stored["one_query_a_time/output"]
    assert torch.equal(single, stored["one_query_a_time/unchanged"])


@pytest.mark.parametrize("selection", ["causal", "paper"])
def test_definition_by_loops(selection: str) -> None:
    """Section 3.2 written out for one sample; each chunk reads first, chosen and recent tokens."""
    size, local, top, count, chunk, length = 4, 6, 2, 2, 3, 62
    mixer = build(block_size=size, local=local, top=top, representatives=count, chunk=chunk, selection=selection)
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(3))
    blocks = mixer.side_input(q, k, x=q, query_padding_mask=None, grid=None, generator=None)
    got = mixer.attend(q, k, v, key_padding_mask=None, aux=blocks)[0]
    for start in range(0, length, chunk):
        gone = max(0, (start - local) // size - 1)
        scores = []
        for e in range(gone):
            score = 0.0
            for h in range(2):
                members = range(size * (1 + e), size * (2 + e))
                rank = [sum(q[0, h, m + j] @ k[0, h, m] for j in range(1, local + 1)) for m in members]
                best = sorted(range(size), key=lambda i, rank=rank: -float(rank[i]))[:count]
                asking = [start] if selection == "causal" else range(start, min(start + chunk, length))
                score += sum(float(q[0, h, i] @ k[0, h, members[r]]) for i in asking for r in best)
            scores.append(score)
        chosen = sorted(range(gone), key=lambda e, scores=scores: -scores[e])[:top]
        for i in range(start, min(start + chunk, length)):
            read = [*range(size), *range(size * (1 + gone), i + 1)]
            read += [m for e in chosen for m in range(size * (1 + e), size * (2 + e))]
            read = sorted({m for m in read if m <= i})
            for h in range(2):
                right = torch.softmax(k[0, h, read] @ q[0, h, i] / 8**0.5, 0) @ v[0, h, read]
                assert difference(got[h, i], right) < 1e-13


def test_full_budget_is_dense_attention() -> None:
    mixer = build(block_size=4, local=4, top=100, chunk=5)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    q, k, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    dense = mixer.out_proj(mixer.merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    assert difference(mixer(x), dense) < 1e-13
    assert difference(build(block_size=4, local=4, top=1, chunk=5)(x), dense) > 1e-3
    # And a window that holds everything leaves nothing to evict.
    assert difference(build(local=90)(x), dense) < 1e-13


@pytest.mark.parametrize(
    "changes", [{}, {"chunk": 1}, {"chunk": 7, "local": 3}, {"top": 0}, {"initial_blocks": 0}], ids=str
)
def test_contract_where_blocks_are_evicted(changes: dict[str, Any]) -> None:
    def make(dim: int, heads: int) -> Any:
        return core_attn.build("infllm", dim=dim, heads=heads, causal=True, **{**SMALL, **changes})

    check_mechanism(make, only=["lengths", "causal", "padding", "maps", "decoding", "batch", "strides", "precision"])


def test_the_papers_selection_lets_a_chunk_choose_together() -> None:
    mixer = build(**SMALL, selection="paper")
    x = torch.randn(1, 80, 16, dtype=torch.float64)
    changed = x.clone()
    leak = 0.0
    for cut in range(50, 80):
        changed = x.clone()
        changed[:, cut:] = 5 * torch.randn(80 - cut, 16)
        leak = max(leak, difference(mixer(changed)[:, :cut], mixer(x)[:, :cut]))
        assert difference(mixer(changed)[:, : cut - cut % 4], mixer(x)[:, : cut - cut % 4]) < 1e-13
    assert leak > 1e-3
    with pytest.raises(ValueError, match="decodes with selection='causal' or chunk=1"):
        mixer.init_state(1)


def test_gradients() -> None:
    mixer = build(dim=4, **SMALL)
    x = torch.randn(1, 40, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,), fast_mode=True)


@pytest.mark.parametrize("pieces", [[1] * 100, [100], [37, 1, 1, 61]], ids=len)
def test_memory_decodes_what_forward_gives(pieces: list[int]) -> None:
    mixer = build(**SMALL, resident=2)
    x = torch.randn(3, 100, 16, dtype=torch.float64)
    state = mixer.init_state(3)
    with torch.no_grad():
        outs = [mixer.step(piece, state)[0] for piece in x.split(pieces, dim=1)]
    assert difference(torch.cat(outs, 1), mixer(x)) < 1e-13
    assert len(state.blocks) == mixer.evicted(99 - 99 % 4) == 21
    assert len(state._at_hand) <= 2 * 3
    assert state.recent[1].shape[2] <= 6 + 4 + 4


def test_blocks_at_hand_are_not_loaded_again() -> None:
    x = torch.randn(2, 200, 16, dtype=torch.float64)
    loads = []
    for resident in (2, 50):
        mixer = build(**SMALL, resident=resident)
        state = mixer.init_state(2)
        with torch.no_grad():
            for piece in x.split(1, dim=1):
                mixer.step(piece, state)
        loads.append(state.loads)
    distinct = len(state._at_hand)
    assert loads[1] == distinct
    assert loads[0] > loads[1]


def test_memories_branch() -> None:
    mixer = build(**SMALL)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    state = mixer.init_state(2)
    with torch.no_grad():
        mixer.step(x[:, :70], state)
        swapped = state.select(torch.tensor([1, 0]))
        a, _ = mixer.step(x[:, 70:], state)
        b, _ = mixer.step(x.flip(0)[:, 70:], swapped)
    assert difference(a, b.flip(0)) == 0
    assert difference(a, mixer(x)[:, 70:]) < 1e-13


def test_padding_represents_nothing() -> None:
    q, k = (torch.randn(2, 2, 12, 4, dtype=torch.float64) for _ in range(2))
    real = torch.tensor([[True, False, True, True], [False] * 4])
    got = representative_keys(q, k[:, :, :4], size=4, local=5, count=4, real=real)
    assert difference(got[0, :, 0], k[0][:, [0, 2, 3]].mean(1)) < 1e-14
    assert not got[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "must be positive, initial_blocks and top at least 0, got 0, 128, 4, 32, 1 and 4"),
        ({"top": -1}, "got 32, 128, 4, 32, 1 and -1"),
        ({"selection": "papr"}, "paper"),
        ({"resident": 3}, "resident must be at least top = 4, got 3"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_only_causal() -> None:
    with pytest.raises(ValueError, match="infllm cannot compute noncausal self attention"):
        build(causal=False)(torch.randn(1, 4, 16, dtype=torch.float64))
