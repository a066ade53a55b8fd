"""FlashAttention, its block-sparse form and S2-Attention: the right blocks, and the attention over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.ops.block_sparse.patterns import count_pairs
from core_attn.ops.block_sparse.reference import expand

GOLDEN = Path(__file__).parents[1] / "golden"
S2_CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "core_s2.json").read_text(encoding="utf-8"))["cases"]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def masked(mixer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The module's projections around softmax attention with a mask written out."""
    q, k, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    s = (q @ k.mT / mixer.head_dim**0.5).masked_fill(~mask, float("-inf"))
    return mixer.out_proj(mixer.merge_heads(torch.softmax(s, -1) @ v))


def s2(case: str, **more: Any) -> Any:
    facts = S2_CASES[case]
    options = {
        "causal": facts["causal"],
        "block_size": facts["block_size"],
        "local_blocks": facts["local_blocks"],
        "stride": facts["vert_stride"],
        "step": facts.get("head_sliding_step"),
        "strided": facts.get("vert_position_type"),
    }
    return core_attn.build("s2", dim=8 * facts["num_heads"], heads=facts["num_heads"], **options, **more).double()


@pytest.mark.parametrize("case", S2_CASES)
def test_s2_reads_the_blocks_of_the_official_masks(case: str) -> None:
    official = load_file(GOLDEN / "core_s2.safetensors")[case].bool()
    length, causal = S2_CASES[case]["seqlen"], S2_CASES[case]["causal"]
    mixer = s2(case)
    ours = mixer.blocks(length, length)
    if causal:  # the mixer leaves blocks of the future to the operator's own masking
        ours = ours & torch.ones(ours.shape[-2:], dtype=torch.bool).tril()
    assert torch.equal(ours.expand_as(official), official)
    torch.manual_seed(0)
    x = torch.randn(2, length, mixer.dim, dtype=torch.float64, requires_grad=True)
    mask = expand(official, (16, 16), length, length)
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    out, right = mixer(x), masked(mixer, x, mask)
    assert difference(out, right) < 1e-12
    leaves = [x, *mixer.parameters()]
    probe = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(o, leaves, probe) for o in (out, right)), strict=True):
        assert difference(a, b) < 1e-11


def test_s2_heads_read_the_whole_context_between_them() -> None:
    mixer = core_attn.build("s2", dim=16, heads=4, causal=True, block_size=4, local_blocks=1, stride=4)
    blocks = mixer.blocks(80, 80)
    assert blocks.any(0).all()
    assert not blocks[0].all()


@pytest.mark.parametrize("columns", [8, 16, 21])
def test_butterfly_is_the_support_of_the_butterfly_factors(columns: int) -> None:
    size = 1 << (columns - 1).bit_length()
    support = torch.zeros(size, size)
    stride = 1
    while stride < size:
        # The factor of this stride: blocks of two by two diagonal matrices.
        factor = torch.kron(torch.kron(torch.eye(size // (2 * stride)), torch.ones(2, 2)), torch.eye(stride))
        support += factor
        stride *= 2
    mixer = core_attn.build("block_sparse_flash", dim=8, heads=2, block_size=2)
    assert torch.equal(mixer.blocks(2 * columns, 2 * columns)[0], support[:columns, :columns] > 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"local_blocks": 1, "global_blocks": 2}], ids=str)
def test_block_sparse_flash_against_a_mask(causal: bool, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("block_sparse_flash", dim=8, heads=2, causal=causal, block_size=4, **options).double()
    x = torch.randn(2, 50, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(50, 50, dtype=torch.bool)
    for i in range(50):
        for j in range(50):
            a, b = i // 4, j // 4
            near = bin(a ^ b).count("1") <= 1 or abs(a - b) <= options.get("local_blocks", 0)
            mask[i, j] = (near or min(a, b) < options.get("global_blocks", 0)) and (not causal or j <= i)
    out, right = mixer(x), masked(mixer, x, mask)
    assert difference(out, right) < 1e-13
    leaves = [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, right)), strict=True):
        assert difference(a, b) < 1e-11
    assert mixer.sizes(batch=1, length=50)["P"] == mask.sum()


def test_pairs_are_counted() -> None:
    torch.manual_seed(0)
    for queries, keys, causal in ((7, 23, True), (23, 23, False), (1, 23, True), (9, 9, True)):
        first = (keys - queries) // 5
        blocks = torch.rand(3, -(-keys // 5) - first, -(-keys // 5)) < 0.5
        front = (keys - queries) % 5
        mask = expand(blocks, (5, 5), queries + front, keys)[:, front:]
        if causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        assert count_pairs(blocks, 5, queries, keys, causal=causal) == pytest.approx(float(mask.sum()) / 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_flash_is_softmax(causal: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    flash = core_attn.build("flash", dim=16, heads=2, causal=causal, kv_heads=kv_heads).double()
    exact = core_attn.build("softmax", dim=16, heads=2, causal=causal, kv_heads=kv_heads, backend="reference").double()
    exact.load_state_dict(flash.state_dict())
    assert flash.backend == "torch"
    x = torch.randn(2, 700, 16, dtype=torch.float64, requires_grad=True)
    a, b = flash(x), exact(x)
    assert difference(a, b) < 1e-13
    (da,), (db,) = (torch.autograd.grad(o.square().sum(), x) for o in (a, b))
    assert difference(da, db) < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s2", {"block_size": 0}, "block_size must be a positive integer, got 0"),
        ("s2", {"local_blocks": 0}, "local_blocks and stride must be at least 1 and step at least 0, got 0, 4, None"),
        ("s2", {"stride": 0}, "got 2, 0, None"),
        ("s2", {"step": -1}, "got 2, 4, -1"),
        ("s2", {"strided": "absolut"}, "absolute"),
        ("block_sparse_flash", {"local_blocks": -1}, "must be at least 0, got -1 and 0"),
    ],
    ids=str,
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core_attn.build(name, dim=16, heads=2, **options)


def test_only_a_causal_pattern_decodes() -> None:
    with pytest.raises(ValueError, match="s2 decodes token by token only when it is built with causal=True"):
        core_attn.build("s2", dim=16, heads=2).init_state(1)
