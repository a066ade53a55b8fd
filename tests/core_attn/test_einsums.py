"""Formulas of costs: arithmetic and nothing else, in symbols that somebody explains."""

from __future__ import annotations

import pytest

import core_attn
from core_attn import registry
from core_attn.einsums import SYMBOLS, Cascade, evaluate, pairs_read


def test_formulas():
    assert evaluate("2*L**2 + L/4 - -1 + 7//2", {"L": 8}) == 128 + 2 + 1 + 3
    for wrong, said in (
        ("L +", "is no formula"),
        ("W * 2", "needs a size for 'W'"),
        ("L.real", "no arithmetic"),
        ("log(L)", "no arithmetic"),
        ("'L'", "no arithmetic"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(wrong, {"L": 8})


def test_meaning():
    cascade = Cascade(einsums=("Y = X",), passes=1, flops="2*L*W", bytes="E*L", symbols={"W": "keys in a window"})
    assert cascade.meaning() == {"E": SYMBOLS["E"], "L": "queries", "W": "keys in a window"}
    with pytest.raises(ValueError, match="uses 'W', which is neither"):
        Cascade(einsums=("Y = X",), passes=1, flops="2*L*W", bytes="E*L").meaning()


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, 0), (2, 1), (0, 0), (None, 3), (9, 9)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (8, 3), (1, 1), (0, 4), (4, 0)])
def test_pairs(queries, keys, left, right):
    """Against counting them one by one."""
    read = [
        (i, j)
        for i in range(queries)
        for j in range(keys)
        if (left is None or i + keys - queries - left <= j) and (right is None or j <= i + keys - queries + right)
    ]
    assert pairs_read(queries, keys, left=left, right=right) == len(read)


def test_sizes():
    plain = core_attn.build("softmax", dim=32, heads=4, kv_heads=2)
    sizes = plain.sizes(batch=2, length=10, context=6)
    assert sizes == {"B": 2, "H": 4, "G": 2, "L": 10, "M": 6, "X": 6, "C": 32, "D": 8, "P": 60, "E": 4}
    assert plain.double().sizes(batch=2, length=10)["E"] == 8
    assert plain.sizes(batch=2, length=10)["X"] == 0
    assert core_attn.build("softmax", dim=32, causal=True).sizes(batch=1, length=10)["P"] == 55
    assert core_attn.build("softmax", dim=32, causal=True, window=3).sizes(batch=1, length=10)["P"] == 27
    assert core_attn.build("softmax", dim=32, window=(1, None)).sizes(batch=1, length=4)["P"] == 4 + 4 + 3 + 2


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n).info.cascade is not None])
def test_description_has_the_cascade(name):
    """In words and as JSON, every letter of the formulas explained."""
    description = core_attn.describe(name)
    text, facts = str(description), description.to_dict()["cascade"]
    for einsum in facts["einsums"]:
        assert f"\n  {einsum}" in text
    assert f"\nFLOPs of forward: {facts['flops']}\n" in text
    assert f"\nBytes moved at least: {facts['bytes']}\n" in text
    for symbol, meaning in facts["symbols"].items():
        assert any(line.split() == [symbol, *meaning.split()] for line in text.splitlines())


def test_without_a_cascade_nothing_is_said():
    import dataclasses

    description = core_attn.describe("softmax")
    bare = dataclasses.replace(description, info=dataclasses.replace(description.info, cascade=None))
    assert "FLOPs" not in str(bare)
    assert bare.to_dict()["cascade"] is None
