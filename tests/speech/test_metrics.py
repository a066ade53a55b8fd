"""Scores and the loss against other people's code and against their definitions."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from attn_speech import metrics
from attn_speech.losses import pit_si_sdr


def speech_like(voices: int, samples: int, seed: int = 0) -> np.ndarray:
    """Coloured noise whose level moves as speech does; (C, T)."""
    from scipy.signal import lfilter

    draw = np.random.default_rng(seed)
    noise = lfilter([1.0], [1.0, -1.6, 0.8], draw.normal(size=(voices, samples)))
    slow = np.repeat(draw.uniform(0.05, 1.0, (voices, -(-samples // 800))), 800, axis=1)[:, :samples]
    return np.asarray(0.05 * noise * slow)


def estimates_of(sources: np.ndarray, seed: int = 1) -> np.ndarray:
    """Each source with some of the others, filtered and noisy, in reverse order."""
    draw = np.random.default_rng(seed)
    mixed = sources + 0.2 * sources.sum(axis=0) + 0.01 * draw.normal(size=sources.shape)
    return np.ascontiguousarray(0.7 * mixed[::-1] + 0.1 * np.roll(mixed[::-1], 3, axis=1))


@pytest.mark.parametrize("voices", [2, 3])
def test_si_sdr_is_torchmetrics(voices: int) -> None:
    from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio

    sources = speech_like(voices, 5000) + 0.3  # a mean that must not count
    estimates = estimates_of(sources)
    ours = metrics.pairwise_si_sdr(torch.from_numpy(estimates)[None], torch.from_numpy(sources)[None])[0]
    for i, j in itertools.product(range(voices), repeat=2):
        theirs = scale_invariant_signal_noise_ratio(torch.from_numpy(estimates[i]), torch.from_numpy(sources[j]))
        assert ours[i, j].item() == pytest.approx(theirs.item(), abs=1e-3)


@pytest.mark.parametrize("voices", [2, 3])
def test_sdr_is_bss_eval(voices: int) -> None:
    import fast_bss_eval
    from mir_eval.separation import bss_eval_sources

    sources = speech_like(voices, 6000)
    estimates = estimates_of(sources)[::-1]
    ours = metrics.bss_sdr(estimates, sources).diagonal()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = bss_eval_sources(sources, estimates, compute_permutation=False)[0]
    assert ours == pytest.approx(theirs, abs=1e-3)
    fast = fast_bss_eval.sdr(torch.from_numpy(sources), torch.from_numpy(estimates.copy()))
    assert ours == pytest.approx(fast.numpy(), abs=1e-3)


def test_sdr_forgives_filters_and_si_sdr_does_not() -> None:
    source = speech_like(1, 6000)
    source[:, -600:] = 0  # so that the echo ends inside
    echo = source + 0.5 * np.roll(source, 40, axis=1)
    assert metrics.bss_sdr(echo, source).item() > 100
    assert metrics.si_sdr(torch.from_numpy(echo), torch.from_numpy(source)).item() < 15


@pytest.mark.parametrize("voices", [2, 3])
def test_permutation_is_brute_force(voices: int) -> None:
    pairs = torch.randn(50, voices, voices, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = metrics.best_permutation(pairs)
    for own, scores in zip(chosen.tolist(), pairs):
        best = max(
            itertools.permutations(range(voices)), key=lambda p: sum(float(scores[p[c], c]) for c in range(voices))
        )
        assert tuple(own) == best
    assert len(metrics.permutations(voices)) == math.factorial(voices)


def test_loss_is_the_least_over_permutations_of_whole_utterances() -> None:
    sources = torch.from_numpy(np.stack([speech_like(3, 2000, seed) for seed in range(4)]))
    estimates = torch.from_numpy(np.stack([estimates_of(one.numpy()) for one in sources]))
    estimates = estimates[:, [1, 2, 0]].requires_grad_()
    lengths = torch.tensor([2000, 1500, 1999, 700])
    loss = pit_si_sdr(estimates, sources, sources.sum(dim=1), lengths)
    expected = []
    for own, true, size in zip(estimates, sources, lengths.tolist()):
        scores = [[metrics.si_sdr(own[i, :size], true[j, :size]) for i in range(3)] for j in range(3)]
        orders = itertools.permutations(range(3))
        expected.append(-max(torch.stack([scores[j][p[j]] for j in range(3)]).mean() for p in orders))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-9)
    (ours,) = torch.autograd.grad(loss, estimates)
    (theirs,) = torch.autograd.grad(torch.stack(expected).mean(), estimates)
    assert torch.allclose(ours, theirs, atol=1e-9)
    assert ours[3, :, 700:].abs().max() == 0


def test_nothing_behind_the_end_matters() -> None:
    sources = torch.from_numpy(speech_like(2, 3000))[None]
    estimates = torch.from_numpy(estimates_of(sources[0].numpy()))[None]
    alone = metrics.pairwise_si_sdr(estimates[..., :2000], sources[..., :2000])
    for junk in (estimates, sources):
        junk[..., 2000:] = torch.nan
    together = metrics.pairwise_si_sdr(estimates, sources, torch.tensor([2000]))
    assert torch.allclose(alone, together, atol=1e-9)


def test_loss_stops_at_its_limit() -> None:
    sources = torch.from_numpy(speech_like(2, 2000))[None]
    noise = torch.randn(sources.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = (sources + 1e-4 * sources.std() * noise).requires_grad_()
    loss = pit_si_sdr(estimates, sources, sources.sum(dim=1))
    assert loss.item() == -30
    assert torch.autograd.grad(loss, estimates)[0].abs().max() == 0
    assert pit_si_sdr(estimates, sources, sources.sum(dim=1), limit=50.0).item() == -50


def test_silent_sources_ask_for_silence() -> None:
    sources = torch.from_numpy(speech_like(2, 2000))[None]
    sources[:, 1] = 0
    mixture = sources.sum(dim=1)
    heard = sources[:, 0] + 0.02 * torch.randn(1, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loud = torch.stack([heard, 0.5 * heard], dim=1).requires_grad_()
    quiet = torch.stack([heard, 0.01 * heard], dim=1)
    louder = pit_si_sdr(loud, sources, mixture)
    assert pit_si_sdr(quiet, sources, mixture) < louder
    # Silence is worth as much as the limit, and may come from any output.
    silent = torch.stack([torch.zeros_like(mixture), heard], dim=1)
    expected = (-30 - metrics.si_sdr(heard, sources[:, 0]).item()) / 2
    assert pit_si_sdr(silent, sources, mixture).item() == pytest.approx(expected)
    gradient = torch.autograd.grad(louder, loud)[0]
    assert gradient.isfinite().all()
    assert gradient[:, 1].abs().max() > 0
    nothing = torch.zeros(2, 2, 100, requires_grad=True)
    loss = pit_si_sdr(nothing, torch.zeros(2, 2, 100), torch.zeros(2, 100))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, nothing)[0].abs().max() == 0


def test_loss_has_finite_gradients_for_silent_estimates_in_float32() -> None:
    sources = torch.from_numpy(speech_like(2, 500)).float()[None]
    estimates = torch.zeros_like(sources).requires_grad_()
    loss = pit_si_sdr(estimates, sources, sources.sum(dim=1))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, estimates)[0].isfinite().all()


def test_scores_of_a_batch_are_those_of_each_alone() -> None:
    sources = torch.from_numpy(np.stack([speech_like(2, 9000, seed) for seed in range(2)])).float()
    mixture = sources.sum(dim=1)
    estimates = torch.stack([torch.from_numpy(estimates_of(one.numpy())) for one in sources]).float()
    lengths = torch.tensor([9000, 6000])
    both = metrics.score(estimates, sources, mixture, lengths, 8000)
    one = metrics.score(estimates[1:, :, :6000], sources[1:, :, :6000], mixture[1:, :6000], None, 8000)
    assert both[1] == pytest.approx(one[0], abs=1e-6, nan_ok=True)
    found = metrics.unpack(metrics.pack(torch.tensor([4, 2]), both))
    assert found is not None
    assert found.index.tolist() == [2, 4]
    assert (found.of("si_sdri") == found.of("si_sdr") - found.of("si_sdr_mixture")).all()
    figures = metrics.figures(found, 8000)
    assert figures["si_sdri"] == pytest.approx(found.of("si_sdri").mean())
    assert figures["mixtures"] == 2
    assert figures["sdri"] == pytest.approx((found.of("sdr") - found.of("sdr_mixture")).mean())
    # The same permutation as for SI-SDR: estimates came in reverse order.
    expected = metrics.bss_sdr(estimates[0].flip(0).numpy(), sources[0].numpy()).diagonal()
    assert both[0, :, 2] == pytest.approx(expected, abs=1e-6)


def test_silent_sources_count_nowhere() -> None:
    sources = torch.from_numpy(speech_like(2, 4000))[None].clone()
    sources[:, 0] = 0
    estimates = torch.stack([sources[:, 1], 0.1 * sources[:, 1]], dim=1) + 1e-3 * torch.randn(1, 2, 4000)
    values = metrics.score(estimates, sources, sources.sum(dim=1), None, 8000)
    assert np.isnan(values[0, 0, [0, 1, 2, 3, 4, 5]]).all()
    assert np.isfinite(values[0, 1, [0, 2]]).all()
    found = metrics.unpack(metrics.pack(torch.tensor([0]), values))
    assert found is not None
    assert math.isfinite(metrics.figures(found, 8000)["si_sdr"])


def test_stoi_and_pesq_order_estimates() -> None:
    source = speech_like(1, 16000)[0]
    noisy = source + 0.05 * np.random.default_rng(0).normal(size=16000)
    assert metrics.stoi(source, source, 8000) == pytest.approx(1, abs=1e-6)
    assert metrics.stoi(noisy, source, 8000) < 0.99
    assert math.isnan(metrics.stoi(source[:100], source[:100], 8000))
    assert math.isnan(metrics.stoi(source, 0 * source, 8000))
    assert math.isnan(metrics.pesq(source, source, 44100))
    if not metrics.has_pesq():
        pytest.skip("pesq is not installed")
    assert metrics.pesq(noisy, source, 8000) < metrics.pesq(source, source, 8000)
    assert metrics.pesq(1e-4 * noisy, source, 8000) == pytest.approx(metrics.pesq(noisy, source, 8000), abs=0.02)
    assert math.isnan(metrics.pesq(0 * source, source, 8000))


def test_tones_are_scored_although_their_equations_are_singular() -> None:
    tone = np.sin(0.3 * np.arange(4000))[None]
    noisy = tone + 0.1 * np.random.default_rng(0).normal(size=tone.shape)
    assert 10 < metrics.bss_sdr(noisy, tone).item() < 40
