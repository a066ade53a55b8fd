"""`medseg data check PATH` of bags: what is wrong with a table, a feature file or a folder, a sentence each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from attn_medseg.pathology.bags.data import check_options, parts_of
from attn_medseg.pathology.bags.options import BagsDataConfig
from attn_medseg.pathology.bags.readers import read_path
from attn_shared.errors import UserError

_MOST = 20


def check_file(path: Path, args: BagsDataConfig | None = None) -> list[str]:
    """Problems of a file or folder; every instance of every bag is read."""
    args = args or BagsDataConfig()
    try:
        check_options(args)
        corpus = read_path(path, args)
    except UserError as error:
        return [str(error)]
    problems = [note for note in corpus.notes if "feature file" in note]
    sizes: Counter[int] = Counter()
    for bag in corpus.bags:
        try:
            values = bag.read().features
        except UserError as error:
            problems.append(str(error))
            continue
        if sizes and values.shape[1] not in sizes:
            usual = sizes.most_common(1)[0][0]
            problems.append(f"{bag.name} has {values.shape[1]} features, where others have {usual}")
        sizes[values.shape[1]] += 1
    if path.is_dir() or path.suffix.lower() in (".csv", ".tsv", ".mat"):
        problems += [f"{bag.name} has no label" for bag in corpus.bags if bag.label < 0 and corpus.classes]
        if len(corpus.classes) < 2:
            problems.append(f"{len(corpus.classes)} classes are told; to train, at least two are needed")
        else:
            try:
                parts_of([bag for bag in corpus.bags if bag.label >= 0], args, 0)
            except UserError as error:
                problems.append(str(error))
    return problems[:_MOST] + ([f"and {len(problems) - _MOST} more problems"] if len(problems) > _MOST else [])
