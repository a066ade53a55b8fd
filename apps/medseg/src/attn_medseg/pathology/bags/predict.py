"""Prediction of bags: tables and feature files in, probabilities of the bags and attention on their instances out."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_medseg.pathology import features, tables
from attn_medseg.pathology.bags.corpus import Bag
from attn_medseg.pathology.bags.data import standardised
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_medseg.pathology.bags.readers import read_path
from attn_medseg.pathology.pieces import padded
from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse
from attn_shared.runs import slug, write_atomically

if TYPE_CHECKING:
    from attn_medseg.pathology.bags.task import BagsTask

TABLE = "bags.csv"
FOLDER = "attention"


def predict_files(task: BagsTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Write `bags.csv`, a line for each bag, and `attention/<bag>.csv`, a line for each instance.

    Args:
        inputs: tables of instances, `.mat` files, feature files, or folders of these.
        options: the fields of `BagsPredictOptions`.

    Raises:
        UserError: what could not be read, after all else was written; or two bags of one name.
    """
    sources = _sources(inputs)
    attention = bool(options.get("attention", True))
    rows: list[list[str]] = []
    seen: dict[str, str] = {}

    def work(source: Path) -> list[Path]:
        found = read_path(source, BagsDataConfig())
        written, broken = [], []
        for bag in found.bags:
            if seen.setdefault(slug(bag.name), source.name) != source.name:
                raise UserError(f"{source.name}: a bag called {bag.name} was in {seen[slug(bag.name)]} too")
            try:
                row, table = _predict(task, bag)
            except UserError as error:
                broken.append(str(error))
                continue
            rows.append([bag.name, source.name, *row])
            if attention:
                target = output / FOLDER / f"{slug(bag.name)}.csv"
                target.parent.mkdir(exist_ok=True)
                write_atomically(target, table)
                written.append(target)
        if broken:
            more = f" (and {len(broken) - 1} more bags)" if len(broken) > 1 else ""
            raise UserError(f"{source.name}: {broken[0]}{more}")
        return written

    written, failed = one_by_one(sources, work, str)
    if rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["bag", "file", "instances", "predicted", *(f"probability_{one}" for one in task.classes)])
        writer.writerows(rows)
        write_atomically(output / TABLE, text.getvalue())
        written.insert(0, output / TABLE)
    refuse(
        failed, len(sources), what="files", done="read", others=f"the other bags were done ({output})" if rows else ""
    )
    return written


def _sources(inputs: Sequence[Path]) -> list[Path]:
    """Files and folders with a table as they are; the feature files of other folders."""
    found: list[Path] = []
    for path in inputs:
        if not path.is_dir() or tables.tables_in(path):
            found.append(path)
            continue
        inside = sorted(features.listing(path).values())
        if not inside:
            raise UserError(f"{path} holds neither feature files ({', '.join(features.SUFFIXES)}) nor a table of bags")
        found += inside
    return found


def _predict(task: BagsTask, bag: Bag) -> tuple[list[str], str]:
    """Cells of the bag's line, and the table of its instances."""
    read = bag.read()
    values = standardised(read.features, task.data_state, bag.name)
    x, mask = padded([values])
    output = task.output({"x": x.to(task.device), "mask": mask.to(task.device)})
    chance = output.logits[0].double().softmax(dim=-1).cpu()
    if not torch.isfinite(chance).all():
        raise UserError(f"{bag.name}: the model gave scores that are no numbers; its training may have failed")
    said = task.classes[int(chance.argmax())]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = read.coords is not None
    branches = output.weights[0].double().cpu()
    several = len(branches) > 1
    head = ["instance", *(["x", "y"] if places else []), "attention"]
    writer.writerow([*head, *(f"branch_{i}" for i in range(1, len(branches) + 1) if several)])
    for number, amount in enumerate(output.attention[0].double().cpu().tolist()):
        name = bag.names[number] if bag.names else str(number)
        place = [f"{one:g}" for one in read.coords[number]] if read.coords is not None else []
        each = [f"{one:.6g}" for one in branches[:, number].tolist()] if several else []
        writer.writerow([name, *place, f"{amount:.6g}", *each])
    print(f"{bag.name}: {said} ({float(chance.max()):.3f}), {len(values)} instances", file=sys.stderr)
    return [str(len(values)), said, *(f"{one:.6g}" for one in chance.tolist())], text.getvalue()
