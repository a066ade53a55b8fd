"""Markov models of genomes, of fixed order and interpolated.

The interpolated model mixes all orders up to the largest by how often a context was seen:

    P_k(b | last k bases) = (count_k(context, b) + a_k P_{k-1}(b | last k - 1 bases)) / (count_k(context) + a_k)

with P_{-1} = 1/4. A strength a_k of each order, the largest order and whether both strands are counted are chosen by
the bits of the validation part. Numbers of contexts are those of `tokens`: A, C, G, T = 0, 1, 2, 3, the base before
last counts 4, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from attn_genomics.tokens import N

ORDERS = 11
"""The largest order that is tried: 4^12 counts of it take 67 MB."""
_STRENGTHS = (0.5, 2.0, 10.0, 30.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 3000.0, 10000.0)
_PIECE = 4_000_000
_ADDED = 0.5  # to every count of a model of fixed order


class Counts:
    """How often each base follows each context, of every order.

    Args:
        orders: the largest one.

    Attributes:
        tables: of order k, (4^k, 4) uint32.
    """

    def __init__(self, orders: int = ORDERS) -> None:
        self.orders = orders
        self.tables = [np.zeros((4**k, 4), dtype=np.uint32) for k in range(orders + 1)]

    def add(self, codes: np.ndarray) -> None:
        """Count a stretch of a genome, uint8 codes; what is none of A, C, G and T breaks it."""
        for first in range(0, len(codes), _PIECE):
            before = min(first, self.orders)
            piece = codes[first - before : first + _PIECE]
            for k, table in enumerate(self.tables):
                # A base counts with every context that is whole within the stretch.
                number = words(piece, k + 1)[max(0, before - k) :]
                number = number[number >= 0]
                if 4 * len(number) < table.size:  # a whole table more would cost more than the sorting
                    found, times = np.unique(number, return_counts=True)
                    table.reshape(-1)[found] += times.astype(np.uint32)
                else:
                    table += np.bincount(number, minlength=table.size).reshape(-1, 4).astype(np.uint32)

    def copy(self) -> Counts:
        """One that can be counted on."""
        made = Counts(0)
        made.orders, made.tables = self.orders, [table.copy() for table in self.tables]
        return made


def words(codes: np.ndarray, length: int) -> np.ndarray:
    """(L,) -> (L - length + 1,) number of each word, the first letter counting most; -1 where a letter is no base."""
    count = max(0, len(codes) - length + 1)
    number, bad = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
    for i in range(length):
        letters = codes[i : i + count]
        number *= 4
        number += letters
        bad |= letters >= N
    number[bad] = -1
    return number


def contexts(codes: np.ndarray, order: int) -> np.ndarray:
    """(L,) -> (L,) number of the `order` bases before each place; -1 where they are not all there."""
    found = np.full(len(codes), -1, dtype=np.int64)
    if len(codes) > order:
        found[order:] = words(codes[:-1], order) if order else 0
    return found


@dataclass(frozen=True)
class Interpolated:
    """The model.

    Attributes:
        counts: of training.
        strengths: a_0, a_1, … up to the largest order.
        strands: whether the other strand was counted too.
    """

    counts: Counts
    strengths: tuple[float, ...]
    strands: bool = False

    @property
    def order(self) -> int:
        return len(self.strengths) - 1

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """(L,) codes -> (L, 4) of what each base might be, from those before it."""
        found = np.full((len(codes), 4), 0.25)
        for order, strength in enumerate(self.strengths):
            context = contexts(codes, order)
            known = context >= 0
            found[known] = mixed(self.counts.tables[order], context[known], found[known], strength)
        return found


@dataclass(frozen=True)
class Fixed:
    """A Markov model of one order; where a context is cut off by an N or a beginning, of the longest that is whole."""

    counts: Counts
    order: int
    added: float = _ADDED

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """(L,) -> (L, 4)."""
        found = np.full((len(codes), 4), 0.25)
        for order in range(self.order + 1):
            context = contexts(codes, order)
            known = context >= 0
            seen = self.counts.tables[order][context[known]] + self.added
            found[known] = seen / seen.sum(axis=1, keepdims=True)
        return found


def mixed(table: np.ndarray, context: np.ndarray, lower: np.ndarray, strength: float) -> np.ndarray:
    """One step of the interpolation: (M,) contexts, (M, 4) of the order below -> (M, 4)."""
    seen = table[context].astype(np.float64)
    return np.asarray((seen + strength * lower) / (seen.sum(axis=1, keepdims=True) + strength))


def count(stretches: Iterable[np.ndarray], orders: int = ORDERS, *, into: Counts | None = None) -> Counts:
    """Count stretches of a genome, on top of `into` where that is given."""
    made = Counts(orders) if into is None else into
    for codes in stretches:
        made.add(codes)
    return made


@dataclass
class Part:
    """What is scored: windows, of which some bases count.

    Attributes:
        tokens: (W, L) uint8, N behind what is shorter.
        scored: (W, L) bool.
    """

    tokens: np.ndarray
    scored: np.ndarray
    codes: np.ndarray = field(init=False)
    places: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        # One long row, with an N between windows so that no context reaches into the one before.
        walls = np.full((len(self.tokens), 1), N, dtype=np.uint8)
        self.codes = np.concatenate([walls, self.tokens], axis=1).ravel()
        asked = np.concatenate([np.zeros_like(walls, dtype=bool), self.scored & (self.tokens < N)], axis=1)
        self.places = np.flatnonzero(asked.ravel())

    @property
    def truth(self) -> np.ndarray:
        """(M,) bases that count."""
        return self.codes[self.places]


def bits(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(M, 4), (M,) -> (M,)."""
    return np.asarray(-np.log2(probabilities[np.arange(len(truth)), truth]))


def choose(counts: Counts, val: Part, *, strands: bool = False) -> tuple[Interpolated, float]:
    """Strengths and order for the least bits on `val`, order by order; the model and those bits."""
    truth = val.truth
    lower = np.full((len(truth), 4), 0.25)
    strengths: list[float] = []
    best, model = np.inf, Interpolated(counts, (1.0,), strands)
    for order, table in enumerate(counts.tables):
        context = contexts(val.codes, order)[val.places]
        known = np.flatnonzero(context >= 0)
        seen = table[context[known]].astype(np.float64)
        total, hits = seen.sum(axis=1), seen[np.arange(len(known)), truth[known]]
        told = lower[np.arange(len(truth)), truth]
        held = {}
        for strength in _STRENGTHS:
            made = told.copy()
            made[known] = (hits + strength * told[known]) / (total + strength)
            held[strength] = float(-np.log2(made).mean())
        strength = min(held, key=lambda one: held[one])
        lower[known] = (seen + strength * lower[known]) / (total + strength)[:, None]
        strengths.append(strength)
        if held[strength] < best - 1e-6:
            best, model = held[strength], Interpolated(counts, tuple(strengths), strands)
    return model, best


def fixed(counts: Counts, val: Part) -> Fixed:
    """The model of one order with the least bits on `val`."""
    held = {}
    for order in range(counts.orders + 1):
        model = Fixed(counts, order)
        held[order] = float(bits(model.probabilities(val.codes)[val.places], val.truth).mean())
    return Fixed(counts, min(held, key=lambda one: held[one]))


@dataclass(frozen=True)
class TwoSided:
    """An interpolated model of what stands before a base and the same of what stands behind it, read from the other
    strand, as for a model that sees both: log p = u (before + behind) + v (share of the base), made to sum to 1.

    Attributes:
        model: with both strands counted.
        weights: u, v.
    """

    model: Interpolated
    weights: tuple[float, float]

    @classmethod
    def fit(cls, model: Interpolated, val: Part) -> TwoSided:
        """The weights with the least bits on `val`."""
        from scipy.optimize import minimize

        sides, shares = _sides(model, val.codes, val.places)
        row = np.arange(len(val.places))

        def loss(weights: np.ndarray) -> float:
            score = _weighed(sides, shares, weights)
            return float(-score[row, val.truth].mean())

        found = minimize(loss, np.array([0.8, -0.5]), method="Nelder-Mead", options={"maxiter": 60, "xatol": 1e-3})
        return cls(model, (float(found.x[0]), float(found.x[1])))

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """(L,) -> (L, 4)."""
        found = np.empty((len(codes), 4))
        for first in range(0, len(codes), _PIECE):
            start = max(0, first - self.model.order)
            end = min(len(codes), first + _PIECE)
            places = np.arange(first - start, end - start)
            sides, shares = _sides(self.model, codes[start : end + self.model.order], places)
            found[first:end] = np.exp(_weighed(sides, shares, np.array(self.weights)))
        return found


def _sides(model: Interpolated, codes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the logarithms of both sides' probabilities, (M, 4), and logarithms of the bases' shares, (4,)."""
    other = np.where(codes < N, 3 - codes, codes)[::-1]
    before = np.log(model.probabilities(codes)[places])
    behind = np.log(model.probabilities(other)[::-1, ::-1][places])
    share = model.counts.tables[0][0] + _ADDED
    return before + behind, np.log(share / share.sum())


def _weighed(sides: np.ndarray, shares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    score = weights[0] * sides + weights[1] * shares
    return np.asarray(score - np.logaddexp.reduce(score, axis=1, keepdims=True))
