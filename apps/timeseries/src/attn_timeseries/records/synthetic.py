"""Synthetic stays in intensive care, deterministic, for testing models of irregular records.

Each stay has three hidden numbers, each standard normal: how ill the patient is, how worried the staff are, and what
the notes tell. Illness moves values (heart rate, blood pressure, lactate …); the notes' number chooses words. Worry
never touches a value: it decides how often things are measured. The label's log-odds is a sum of the three.

With `missingness="random"` another stay's worry decides how often things are measured. Everything else is drawn alike,
so the patterns of measuring are the same as a whole and tell nothing of the label.
"""

from __future__ import annotations

import numpy as np

from attn_timeseries.records.cards import RecordsDataConfig
from attn_timeseries.records.corpus import Corpus, Stay, assemble

# Name, usual value, deviation between stays, effect of illness in deviations, measurements an hour, effect of worry on
# the logarithm of that.
VARIABLES: tuple[tuple[str, float, float, float, float, float], ...] = (
    ("heart rate", 86.0, 9.0, 0.5, 0.5, 0.3),
    ("mean blood pressure", 77.0, 8.0, -0.5, 0.5, 0.3),
    ("respiratory rate", 19.0, 3.0, 0.4, 0.5, 0.3),
    ("oxygen saturation", 97.0, 1.5, -0.3, 0.5, 0.3),
    ("temperature", 36.8, 0.5, 0.2, 0.4, 0.3),
    ("lactate", 1.8, 0.6, 0.6, 0.25, 0.6),
    ("creatinine", 1.1, 0.4, 0.3, 0.2, 0.6),
    ("glucose", 128.0, 20.0, 0.0, 0.3, 0.6),
)
ILLNESS, WORRY, NOTES, INTERCEPT = 1.2, 1.2, 0.9, -1.0
DRIFT, NOISE = 0.3, 0.02  # of the slow drift within a stay and of a measurement, in deviations between stays
_BAD = ("worsening", "confused", "pressors started", "poor urine output", "family meeting", "guarded")
_GOOD = ("improving", "comfortable", "tolerating diet", "out of bed", "weaning oxygen", "stable overnight")
_NEUTRAL = ("seen on rounds", "lines in place", "skin intact", "medications reviewed", "turned every two hours")
STAYS_A_PATIENT = 1.25


def make(args: RecordsDataConfig) -> Corpus:
    """The stays of `args.stays`, `args.missingness`, `args.synthetic_seed` and `args.hours`."""
    rng = np.random.default_rng([198, args.synthetic_seed])
    count = args.stays
    patients = max(2, round(count / STAYS_A_PATIENT))
    patient = np.sort(np.concatenate([np.arange(patients), rng.integers(0, patients, max(0, count - patients))]))
    patient = patient[:count]
    # Half of a patient's illness is the patient's own, so that splitting by stay would leak.
    illness = np.sqrt(0.5) * rng.normal(size=patients)[patient] + np.sqrt(0.5) * rng.normal(size=count)
    worry, told = rng.normal(size=count), rng.normal(size=count)
    odds = ILLNESS * illness + WORRY * worry + NOTES * told + INTERCEPT
    label = (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(np.float32)
    shown = worry if args.missingness == "signal" else rng.permutation(worry)

    names = [f"p{p:05d}_{i:05d}" for i, p in enumerate(patient)]
    table = np.array([row[1:] for row in VARIABLES]).T
    usual, between, effect, rate, pull = table
    expected = rate * np.exp(pull * shown[:, None] - pull**2 / 2) * args.hours  # (stays, V)
    many = rng.poisson(expected)
    stay, variable = np.divmod(np.repeat(np.arange(many.size), many.ravel()), len(VARIABLES))
    hours = np.floor(rng.uniform(0, args.hours, len(stay)) * 4) / 4  # in steps of a quarter of an hour
    # A stay's path: its own level, illness that shows more and more, and a slow drift.
    ramp = rng.uniform(0.3, 1.0, count) * args.hours
    drift = DRIFT * rng.normal(size=(count, len(VARIABLES)))
    level, phase = rng.normal(size=(count, len(VARIABLES))), rng.uniform(0, 2 * np.pi, (count, len(VARIABLES)))
    shows = np.clip(hours / ramp[stay], 0.3, 1.0)
    path = effect[variable] * illness[stay] * shows + np.sqrt(1 - effect[variable] ** 2) * level[stay, variable]
    path += drift[stay, variable] * np.sin(2 * np.pi * hours / 24 + phase[stay, variable]) + NOISE * rng.normal(
        size=len(stay)
    )
    value = usual[variable] + between[variable] * path
    notes = [_notes(rng, float(one), args.hours) for one in told]
    series = assemble(names, stay, hours, variable, value, len(VARIABLES))
    stays = [
        Stay(
            name=name,
            patient=f"p{p:05d}",
            hours=times,
            values=values,
            note_hours=note_hours,
            notes=texts,
            label=label[i : i + 1],
        )
        for i, (name, p, (times, values), (note_hours, texts)) in enumerate(zip(names, patient, series, notes))
    ]
    tells = "tells" if args.missingness == "signal" else "does not tell"
    return Corpus(
        source="synthetic_records",
        variables=[row[0] for row in VARIABLES],
        labels=["died"],
        stays=stays,
        found=[f"synthetic; how often a stay is measured {tells} of its label"],
    )


def _notes(rng: np.random.Generator, told: float, hours: float) -> tuple[np.ndarray, np.ndarray]:
    """None to four notes, whose words are bad more often the larger `told` is."""
    count = int(rng.integers(0, 5))
    times = np.sort(np.round(rng.uniform(0, hours, count), 2))
    bad = rng.random((count, 3)) < 1 / (1 + np.exp(-1.5 * told))
    words = rng.integers(0, 6, (count, 3))
    filler = rng.integers(0, len(_NEUTRAL), count)
    texts = [
        f"{_NEUTRAL[other]}; {', '.join((_BAD if b else _GOOD)[w] for b, w in zip(*row))}."
        for other, *row in zip(filler, bad, words)
    ]
    return times, np.array(texts, dtype=object)
