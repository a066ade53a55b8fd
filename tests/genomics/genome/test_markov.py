"""Markov models against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_genomics.data.fasta import turned
from attn_genomics.genome import markov, metrics
from attn_genomics.genome.baselines import scored
from attn_genomics.genome.markov import Part
from attn_genomics.tokens import decode, encode


def drawn(seed: int, length: int, unknown: float = 0.02) -> np.ndarray:
    """Each base follows from the two before it, more or less."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, length)
    for i in range(2, length):
        if rng.random() < 0.6:
            codes[i] = (codes[i - 1] + 2 * codes[i - 2] + 1) % 4
    codes[rng.random(length) < unknown] = 4
    return codes.astype(np.uint8)


def whole(codes: np.ndarray) -> Part:
    return Part(codes[None], np.ones((1, len(codes)), bool))


def test_counts_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markov, "_PIECE", 50)  # pieces join without a loss
    stretches = [drawn(0, 211), drawn(1, 7), np.empty(0, np.uint8), drawn(2, 100)]
    found = markov.count(stretches, 3)
    for order in range(4):
        table: dict[str, int] = {}
        for text in map(decode, stretches):
            for i in range(len(text) - order):
                word = text[i : i + order + 1]
                table[word] = table.get(word, 0) + ("N" not in word)
        flat = found.tables[order].ravel()
        assert flat.sum() == sum(table.values())
        for word, times in table.items():
            if "N" not in word:
                number = int("".join(map(str, encode(word))), 4)
                assert flat[number] == times


def test_interpolation_is_its_definition() -> None:
    train, test = drawn(0, 800), drawn(5, 60)
    model = markov.Interpolated(markov.count([train], 4), (1.0, 3.0, 0.5, 20.0, 7.0))
    found = model.probabilities(test)
    text, other = decode(train), decode(test)
    for i in range(len(other)):
        chance = np.full(4, 0.25)
        for order, strength in enumerate(model.strengths):
            context = other[i - order : i] if i >= order else "N"
            if "N" in context:
                break
            seen = np.array([sum(text.startswith(context + b, j) for j in range(len(text))) for b in "ACGT"])
            chance = (seen + strength * chance) / (seen.sum() + strength)
        np.testing.assert_allclose(found[i], chance, rtol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)


def test_what_is_chosen_is_the_best_and_beats_fixed_orders() -> None:
    train, val, test = drawn(0, 20_000), whole(drawn(1, 3000)), whole(drawn(2, 3000))
    counts = markov.count([train], 6)
    model, value = markov.choose(counts, val)
    assert value == pytest.approx(markov.bits(model.probabilities(val.codes)[val.places], val.truth).mean(), abs=1e-12)
    for strength in (0.5, 30.0, 3000.0):
        for order in range(model.order + 1):
            changed = (*model.strengths[:order], strength)
            worse = markov.Interpolated(counts, changed).probabilities(val.codes)[val.places]
            assert markov.bits(worse, val.truth).mean() >= value - 1e-6
    best = markov.bits(model.probabilities(test.codes)[test.places], test.truth).mean()
    single = markov.fixed(counts, val)
    assert single.order == 2
    assert best < markov.bits(single.probabilities(test.codes)[test.places], test.truth).mean() + 2e-3
    assert best < 1.6


def test_both_sides_know_more_than_one() -> None:
    train, val, test = drawn(0, 20_000), whole(drawn(1, 3000)), whole(drawn(2, 3000))
    counts = markov.count([turned(train)], 4, into=markov.count([train], 4))
    model, _ = markov.choose(counts, val, strands=True)
    two = markov.TwoSided.fit(model, val)
    found = two.probabilities(test.codes)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)
    one = markov.bits(model.probabilities(test.codes)[test.places], test.truth).mean()
    assert markov.bits(found[test.places], test.truth).mean() < one - 0.05


def test_windows_do_not_see_each_other() -> None:
    """A part in windows with context gives the same bits as the whole record."""
    train, record = drawn(0, 5000), drawn(3, 400, unknown=0.0)
    model, _ = markov.choose(markov.count([train], 5), whole(drawn(1, 1000)))
    expected = markov.bits(model.probabilities(record), record).reshape(8, 50)
    tokens = np.full((8, 60), 4, np.uint8)
    asked = np.zeros((8, 60), bool)
    for row in range(8):
        first = max(0, 50 * row - 10)
        tokens[row, : 50 * row + 50 - first] = record[first : 50 * row + 50]
        asked[row, 50 * row - first : 50 * row + 50 - first] = True
    part = Part(tokens, asked)
    found = markov.bits(model.probabilities(part.codes)[part.places], part.truth)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-12)
    figures = metrics.figures(scored(part, model.probabilities(part.codes)[part.places]), intervals=True)
    assert figures["bits per base"] == pytest.approx(expected.mean(), abs=1e-12)
    assert figures["bits per base, 95% from"] < expected.mean() < figures["bits per base, 95% to"]


def test_figures_do_not_depend_on_batches() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(23, 30, 4)))
    scores = logits.log_softmax(-1) / np.log(2)
    tokens = torch.from_numpy(rng.integers(0, 5, (23, 30)))
    asked = torch.from_numpy(rng.random((23, 30)) < 0.7) & (tokens < 4)

    def figures(size: int) -> dict[str, float]:
        state: dict[str, torch.Tensor] = {}
        for first in range(0, 23, size):
            rows = slice(first, min(first + size, 23))
            batch = {"tokens": tokens[rows], "scored": asked[rows], "index": torch.arange(23)[rows]}
            metrics.join(state, metrics.pack(batch, scores[rows]))
        made = metrics.unpack(state)
        assert made is not None
        assert made.told.sum() == pytest.approx(int(asked.sum()))
        return metrics.figures(made, intervals=True)

    found = figures(23)
    chance = torch.exp2(scores)[asked]
    truth = tokens[asked]
    assert found["bits per base"] == pytest.approx(float(-scores[asked][range(len(truth)), truth].mean()))
    assert found["accuracy"] == pytest.approx(float((chance.argmax(1) == truth).double().mean()))
    assert found["perplexity"] == pytest.approx(2 ** found["bits per base"])
    for size in (1, 5):
        assert figures(size) == pytest.approx(found, abs=1e-12)
