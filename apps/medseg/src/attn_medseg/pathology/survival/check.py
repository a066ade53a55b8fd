"""`medseg data check PATH` of survival: what is wrong with a table and its slides, a sentence each."""

from __future__ import annotations

from pathlib import Path

from attn_medseg.pathology.survival.data import check_options, fit, parts_of, usable
from attn_medseg.pathology.survival.options import SurvivalDataConfig
from attn_medseg.pathology.survival.readers import read_path
from attn_shared.errors import UserError

_MOST = 20


def check_file(path: Path, args: SurvivalDataConfig | None = None) -> list[str]:
    """Problems of a table or folder; every slide of every patient is read."""
    args = args or SurvivalDataConfig()
    try:
        check_options(args)
        corpus = read_path(path, args)
        patients, notes = usable(corpus, args, (), str(path))
    except UserError as error:
        return [str(error)]
    problems = [note for note in notes if "feature file" in note or "missing" in note]
    width = 0
    for one in patients:
        if not one.has_slides:
            continue
        try:
            values = one.patches()
        except UserError as error:
            problems.append(str(error))
            continue
        if width and values.shape[1] != width:
            problems.append(f"{one.name} has {values.shape[1]} features, where others have {width}")
        width = width or values.shape[1]
    try:
        parts, _ = parts_of(patients, args, 0)
        fit(corpus, [one for one in patients if parts.get(one.name) == "train"] or patients, args)
    except UserError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return problems[:_MOST] + ([f"and {len(problems) - _MOST} more problems"] if len(problems) > _MOST else [])
