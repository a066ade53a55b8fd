"""Prediction of survival: tables of genes with slides in, risks and curves out."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_medseg.pathology.pieces import padded
from attn_medseg.pathology.survival.corpus import Corpus, Patient
from attn_medseg.pathology.survival.data import gene_values, patches_of
from attn_medseg.pathology.survival.options import SurvivalDataConfig
from attn_medseg.pathology.survival.readers import read_path
from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse
from attn_shared.runs import slug, write_atomically

if TYPE_CHECKING:
    from attn_medseg.pathology.survival.task import SurvivalTask

RISKS, CURVES, FOLDER = "risks.csv", "survival.csv", "attention"


def predict_files(task: SurvivalTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Write `risks.csv`, a line for each patient, `survival.csv`, a line for each end of an interval, and
    `attention/<patient>.csv` of a model that reads slides, a line for each patch.

    Args:
        inputs: tables as for training, without the time and state or with them, or folders with one.
        options: the fields of `SurvivalPredictOptions`.

    Raises:
        UserError: what could not be read, after all else was written.
    """
    risks: list[list[str]] = []
    curves: list[list[str]] = []
    seen: dict[str, str] = {}

    def work(source: Path) -> list[Path]:
        slides = bool(task.data_state["patches"])
        args = SurvivalDataConfig(features=str(options.get("features") or ""), slides=slides)
        corpus = read_path(source, args, known=False)
        written, broken = [], []
        for patient in corpus.patients:
            if seen.setdefault(slug(patient.name), source.name) != source.name:
                raise UserError(f"{source.name}: a patient called {patient.name} was in {seen[slug(patient.name)]} too")
            try:
                risk, survival, table = _predict(task, patient, corpus)
            except UserError as error:
                broken.append(str(error))
                continue
            ends = task.data_state["edges"][1:]
            median = _median(task.data_state["edges"], survival)
            risks.append([patient.name, source.name, f"{risk:.6g}", median, *(f"{one:.6g}" for one in survival)])
            curves.extend(
                [patient.name, "0" if i < 0 else f"{ends[i]:.6g}", "1" if i < 0 else f"{survival[i]:.6g}"]
                for i in range(-1, len(ends))
            )
            print(f"{patient.name}: risk {risk:.3f}", file=sys.stderr)
            if table and options.get("attention", True):
                target = output / FOLDER / f"{slug(patient.name)}.csv"
                target.parent.mkdir(exist_ok=True)
                write_atomically(target, table)
                written.append(target)
        if broken:
            more = f" (and {len(broken) - 1} more patients)" if len(broken) > 1 else ""
            raise UserError(f"{source.name}: {broken[0]}{more}")
        return written

    written, failed = one_by_one(list(inputs), work, str)
    if risks:
        ends = [f"survival_{one:.6g}" for one in task.data_state["edges"][1:]]
        head = ["case_id", "file", "risk", "median_time", *ends]
        write_atomically(output / RISKS, _text([head, *risks]))
        write_atomically(output / CURVES, _text([["case_id", "time", "survival"], *curves]))
        written[:0] = [output / RISKS, output / CURVES]
    others = f"the other patients were done ({output})" if risks else ""
    refuse(failed, len(inputs), what="files", done="read whole", others=others)
    return written


def _predict(task: SurvivalTask, patient: Patient, corpus: Corpus) -> tuple[float, list[float], str]:
    """Risk, chance of no event at the ends of intervals, and the table of patches."""
    state = task.data_state
    if state["patches"] and "slides" in task.network.needs and not patient.has_slides:
        raise UserError(f"{patient.name} has no feature file, which the model reads; --features names their folder")
    slides = "slides" in task.network.needs
    values = patches_of(patient, state) if slides else np.zeros((1, 1), np.float32)
    x, mask = padded([values])
    if "genes" in task.network.needs:
        genes = torch.from_numpy(gene_values([patient], corpus.genes, state))
    else:
        genes = torch.zeros(1, sum(len(own) for own in state["groups"].values()))
    output = task.output({name: one.to(task.device) for name, one in (("genes", genes), ("x", x), ("mask", mask))})
    survival = output.survival[0].double().cpu().tolist()
    if not all(map(math.isfinite, survival)):
        raise UserError(f"{patient.name}: the model gave chances that are no numbers; its training may have failed")
    if output.attention is None or not slides:
        return float(output.risk[0]), survival, ""
    shares = output.attention[0].double().cpu()
    names = list(state["groups"]) if len(shares) > 1 else ["attention"]
    rows = [[str(number), *(f"{one:.6g}" for one in row)] for number, row in enumerate(shares.mT.tolist())]
    return float(output.risk[0]), survival, _text([["patch", *names], *rows])


def _median(edges: Sequence[float], survival: Sequence[float]) -> str:
    """When the curve, of one hazard within an interval, comes down to a half; empty where it does not."""
    times, values = list(edges), [1.0, *survival]
    for i in range(1, len(values)):
        if values[i] <= 0.5:
            share = math.log(values[i - 1] / 0.5) / math.log(values[i - 1] / max(values[i], 1e-12))
            return f"{times[i - 1] + share * (times[i] - times[i - 1]):.6g}"
    return ""


def _text(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
