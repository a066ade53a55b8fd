"""A mechanism as a cascade of einsums, and what it costs as formulas.

"FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design" (S185): an attention mechanism is a
sequence of einsums; how often the definition must go over all keys before it can go on is its number of passes, which
decides whether it can be computed in one sweep with a constant amount of fast memory.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What the letters of every formula mean; a mechanism adds its own in `Cascade.symbols`.
SYMBOLS = {
    "B": "samples of the batch",
    "H": "query heads",
    "G": "key heads",
    "L": "queries",
    "M": "keys",
    "X": "keys of another sequence than the queries': M in cross attention, 0 in self attention",
    "C": "channels",
    "D": "channels of a head",
    "P": "pairs of a query and a key that a head reads",
    "E": "bytes of an element",
}

_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """The einsums of a mechanism's forward in order, and its costs.

    Attributes:
        einsums: one a line, such as "S[b,h,l,m] = Q[b,h,l,d] * K[b,h,m,d]". A letter on the right that is missing on
            the left is summed over, or reduced as the operation before the bracket says: "max[m] S[b,h,l,m]".
        passes: how often the algorithm as implemented goes over all the keys that a query reads: 3 where the largest
            score, the sum of the weights and the weighted sum each need one, 1 where running values of all three are
            corrected on the way (FlashAttention), so that the fast memory needed does not grow with the keys.
        flops: multiplications and additions of matrix products in forward, projections included: arithmetic in
            the symbols, such as "4*B*(L + M)*C**2 + 4*B*H*P*D". Products by index count as products, Fourier
            transforms as 5 N log2 N, or half of that where one side is real; elementwise work does not count.
        bytes: what must be moved at least: reading inputs and weights, writing outputs, such as
            "E*(B*(2*L + X)*C + 4*C**2)".
        symbols: meaning of the symbols that are not in `SYMBOLS`.
    """

    einsums: tuple[str, ...]
    passes: int
    flops: str
    bytes: str
    symbols: Mapping[str, str] | None = None

    def meaning(self) -> dict[str, str]:
        """Every symbol that the formulas use -> what it means.

        Raises:
            ValueError: a formula uses a symbol that nobody explains.
        """
        known = {**SYMBOLS, **(self.symbols or {})}
        used = sorted({n.id for f in (self.flops, self.bytes) for n in ast.walk(_parse(f)) if isinstance(n, ast.Name)})
        for name in used:
            if name not in known:
                raise ValueError(f"the formula uses {name!r}, which is neither a standard symbol nor explained")
        return {name: known[name] for name in used}


def pairs_read(queries: int, keys: int, *, left: int | None = None, right: int | None = None) -> int:
    """Pairs of a query and a key when query i, at position i + M - L, reads `left` keys before it and `right` after it.

    None means all of that side; causal attention is `right=0`.
    """
    first = [0 if left is None else max(0, i + keys - queries - left) for i in range(queries)]
    last = [keys if right is None else min(keys, i + keys - queries + right + 1) for i in range(queries)]
    return sum(max(0, b - a) for a, b in zip(first, last))


def evaluate(formula: str, sizes: Mapping[str, float]) -> float:
    """The value of a formula: + - * / // ** of numbers and the symbols in `sizes`.

    Raises:
        ValueError: a symbol without a size, or anything that is no arithmetic.
    """
    return float(_value(_parse(formula).body, sizes, formula))


def _parse(formula: str) -> ast.Expression:
    try:
        return ast.parse(formula, mode="eval")
    except SyntaxError:
        raise ValueError(f"{formula!r} is no formula") from None


def _value(node: ast.AST, sizes: Mapping[str, float], formula: str) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise ValueError(f"{formula!r} needs a size for {node.id!r}")
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        result: float = _OPERATIONS[type(node.op)](
            _value(node.left, sizes, formula), _value(node.right, sizes, formula)
        )
        return result
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, sizes, formula)
    raise ValueError(f"{formula!r} is no arithmetic of numbers and symbols")
