"""`medseg eval` with `--predictions`, `--protocol` or `--cases`: masks that any tool has written, published protocols,
and a table of cases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_medseg.segment.options import SegmentDataConfig, SegmentTaskConfig
from attn_shared import options
from attn_shared.errors import UserError
from attn_shared.options import Parsed
from core_attn.naming import unknown

if TYPE_CHECKING:
    import numpy as np

    from attn_medseg.segment.protocols import Pair

FLAGS = ("--predictions", "--truth", "--protocol", "--cases")
"""Options that make `eval` this module's."""
_NAMES = ("synapse", "acdc", "isic", "nnunet")
_HELP = """usage: medseg eval RUN [--protocol NAME] [--cases FILE.csv] [options]
       medseg eval --predictions DIR --data NAME_OR_PATH [--protocol NAME] [options]
       medseg eval --predictions DIR --truth DIR [--protocol NAME] [options]

Score a run's model, or masks that are there as files, whatever tool wrote them. DIR holds a mask for each case, called
as the case, its image or its label: NAME.nii.gz, NAME.nrrd, NAME.png, NAME_segmentation.png, …

  --data NAME_OR_PATH   images with their true masks: a data set, or a folder as `train` takes it
  --truth DIR           a folder of true masks alone, called as those of the predictions
  --structures A,B      names of labels 1, 2, … of --truth (default: 1, 2, …)
  --split NAME          train, val, test, or all (default: test; with --truth all there are)
  --protocol NAME       synapse, acdc, isic or nnunet: score as they do (default: as `train` does)
  --cases FILE.csv      also write the scores of every case and structure, both definitions of HD95 included
  --output FILE.json    also write figures and scores as JSON; of nnunet in the form of its summary.json

and every --data_args and --task_args option of `train`."""
_FEW = 3
_NEAR = 1e-2  # millimetres by which a mask may lie beside the true one
_ENDS = ("", "_segmentation", "_mask", "_seg", "_pred")
_TRUE = ("_gt", "_label", "_labels", "_segmentation", "_mask", "_seg")
_OTHERS = ("_overlay", "_probability")  # what `predict` writes beside masks


@dataclass
class _Source:
    """What is scored: pairs of masks one after another, and what they are of."""

    title: str
    data: str
    split: str
    structures: tuple[str, ...]
    unit: str
    axes: int
    pairs: Iterator[Pair]
    protocol: str
    notes: list[str]


def main(argv: Sequence[str]) -> int:
    """Score; the exit status."""
    if any(token in ("-h", "--help") for token in argv):
        print(_HELP)
        return 0
    parsed = options.split(argv)
    own = ("predictions", "data", "truth", "structures", "split", "protocol", "cases", "output")
    known = {name: options.dataclass_options(name, kind) for name, kind in _CONFIGS.items()}
    every = [option.name for found in known.values() for option in found]
    run = parsed.last("predictions") is None
    options.check_options(parsed, [*own, *every], free=("trainer",) if run else ())
    given = {name: parsed.take(name) for name in own}
    if options.MISSING in given.values():
        raise UserError(f"--{next(n for n, v in given.items() if v == options.MISSING)} needs a value")
    protocol, split = given["protocol"], given["split"] or ("all" if given["truth"] else "test")
    if protocol is not None and protocol not in _NAMES:
        raise unknown("protocol", protocol, _NAMES)
    if split not in ("train", "val", "test", "all"):
        raise unknown("split", split, ["train", "val", "test", "all"])
    if run:
        if len(parsed.words) != 1:
            raise UserError("eval needs one run, or --predictions DIR with --data NAME_OR_PATH or --truth DIR")
        if given["truth"] or given["structures"]:
            raise UserError("--truth and --structures belong to --predictions DIR")
        if not Path(parsed.words[0]).exists():
            raise UserError(f"there is no run or checkpoint at {parsed.words[0]}; `train` prints the folder it made")
        source, chosen = _of_run(parsed, given["data"], split)
    else:
        if parsed.words:
            raise UserError(f"eval --predictions scores files and takes no run, got {parsed.words[0]!r}")
        if (given["data"] is None) == (given["truth"] is None):
            raise UserError("scoring files needs their true masks: --data NAME_OR_PATH or --truth DIR")
        folder = Path(str(given["predictions"]))
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        args, chosen = _config(parsed, "data_args"), _config(parsed, "task_args")
        if given["data"] is not None:
            source = _of_data(folder, given["data"], split, args)
        else:
            source = _of_folder(folder, Path(str(given["truth"])), given["structures"], args)
    if chosen.case == "slice":
        raise UserError("protocols and tables of cases are of whole volumes; leave --task_args.case")
    return _report(source, protocol, chosen, given["cases"], given["output"])


_CONFIGS: dict[str, type] = {"data_args": SegmentDataConfig, "task_args": SegmentTaskConfig}


def _config(parsed: Parsed, name: str) -> Any:
    """The options of a group as given, the others as they are by default."""
    known = list(options.dataclass_options(name, _CONFIGS[name]))
    names = {option.name for option in known}
    values = options.typed(known, {}, [f"--{key}={text}" for key, text in parsed.options if key in names])
    return _CONFIGS[name](**{key.removeprefix(f"{name}."): value for key, value in values.items()})


# -- what is scored ---------------------------------------------------------------------------------------------------


def _of_run(parsed: Parsed, data: str | None, split: str) -> tuple[_Source, SegmentTaskConfig]:
    if split == "all":
        raise UserError("--split all is for files; a model is scored on train, val or test")
    if split == "train":
        raise UserError("patches of training are no whole cases; score val or test, or --data_args.test 1")
    from attn_medseg.cli import APP

    if data is not None:
        options.check_data_name(APP, data)
    from attn_shared import trainer

    folder = Path(parsed.words[0])
    if APP.several and trainer.saved_kind(APP, folder).name != "segment":
        raise UserError("--protocol and --cases are for models that segment")
    overrides = dict(parsed.options) | ({"data": data} if data is not None else {})
    task, config = trainer.load_task(APP, folder, overrides=overrides)
    from attn_medseg.segment.task import SegmentTask, case_set

    assert isinstance(task, SegmentTask)
    bundle = trainer.load_data(APP, config, task.data_state)
    part = case_set(bundle, split)
    if part is None:
        raise UserError(f"{config.data} has no {split} split")

    def pairs() -> Iterator[Pair]:
        import torch

        from attn_medseg.segment.protocols import Pair

        for index, case in enumerate(part.cases):
            whole = part.whole(index)
            with torch.no_grad():
                labels = task.labels(whole.prepared)
            yield Pair(
                name=case.name,
                patient=case.patient,
                predicted=labels,
                truth=whole.label,
                spacing=whole.prepared.spacing,
                unit=str(task.data_state["unit"]),
            )

    source = _Source(
        title=f"{config.model} on {config.data}, {split} split",
        data=config.data,
        split=split,
        structures=task.structures,
        unit=str(task.data_state["unit"]),
        axes=int(task.data_state["axes"]),
        pairs=pairs(),
        protocol=bundle.protocol,
        notes=[],
    )
    return source, task.options


def _of_data(folder: Path, data: str, split: str, args: SegmentDataConfig) -> _Source:
    from attn_medseg.cli import APP

    options.check_data_name(APP, data)
    from attn_medseg.segment.data import CaseSet, TrainSet, check_options, load_bundle, load_label
    from attn_medseg.segment.protocols import Pair
    from attn_medseg.segment.readers import load_corpus
    from attn_medseg.segment.readers.files import read_header, spacing_of

    said = ""
    if split == "all":
        check_options(args)
        corpus = load_corpus(data, args)
        cases = tuple(case for case in corpus.cases if case.label is not None)
    else:
        bundle = load_bundle(data, args)
        part: Any = bundle.split(split)
        if not isinstance(part, CaseSet | TrainSet):
            raise UserError(f"{data} has no {split} split")
        corpus, cases, said = part.corpus, part.cases, bundle.protocol
    if not cases:
        raise UserError(f"{data} has no case with a label")
    files = _masks(folder)
    found = {}
    for case in cases:
        paths = [one for one in (case.label, *(() if callable(case.image) else case.image)) if isinstance(one, Path)]
        found[case.name] = _find(files, [case.name, *map(_plain_stem, paths)])
    _complain([name for name, path in found.items() if path is None], len(cases), folder)
    notes: list[str] = []

    def pairs() -> Iterator[Pair]:
        astray = []
        for case in cases:
            path = found[case.name]
            assert path is not None
            truth = load_label(case, corpus)
            affine = read_header(case.label).affine if isinstance(case.label, Path) else None
            if affine is None and callable(case.label):
                affine = case.label().affine
            predicted, other = _labels(path, corpus.values, len(corpus.structures), affine is None)
            _fits(path, predicted, truth, case.name)
            if _apart(affine, other):
                astray.append(case.name)
            spacing = spacing_of(affine if corpus.unit == "mm" else None, truth.ndim)
            yield Pair(
                name=case.name,
                patient=case.patient,
                predicted=predicted,
                truth=truth,
                spacing=spacing,
                unit=corpus.unit,
            )
        _note_astray(astray, notes)

    return _Source(
        title=f"{folder} against {data}, {'all cases' if split == 'all' else f'{split} split'}",
        data=data,
        split=split,
        structures=corpus.structures,
        unit=corpus.unit,
        axes=3 if cases[0].slices >= 0 else corpus.ndim,
        pairs=pairs(),
        protocol=said,
        notes=notes,
    )


def _of_folder(folder: Path, truth: Path, names: str | None, args: SegmentDataConfig) -> _Source:
    import numpy as np

    from attn_medseg.segment.protocols import Pair
    from attn_medseg.segment.readers.files import is_picture, read_mask, spacing_of
    from attn_medseg.segment.readers.folders import patient_of

    if not truth.is_dir():
        raise UserError(f"there is no folder {truth}")
    true, files = _masks(truth), _masks(folder)
    if not true:
        raise UserError(f"{truth} holds no masks")
    found = {name: _find(files, [name, _bare(name)]) for name in true}
    _complain([name for name, path in found.items() if path is None], len(true), folder)
    pictures = {is_picture(path) for path in true.values()}
    if len(pictures) > 1:
        raise UserError(f"{truth} holds both pictures and volumes; score them apart")
    values: set[int] = set()
    for path in true.values():
        mask = read_mask(path)
        values |= {int(one) for one in np.unique(mask.values)}
        axes = mask.values.ndim
    # Pictures of one structure have it as white.
    coding = {0: 0, 255: 1} if pictures == {True} and values <= {0, 255} else {}
    highest = 1 if coding else max((one for one in values if one < 255), default=0)
    structures = tuple(one.strip() for one in names.split(",")) if names else tuple(map(str, range(1, highest + 1)))
    if len(structures) < max(1, highest):
        raise UserError(f"the masks have labels up to {highest}, --structures names {len(structures)}")
    unit = "px" if pictures == {True} else "mm"
    notes: list[str] = []

    def pairs() -> Iterator[Pair]:
        astray = []
        for name, path in true.items():
            mask, own = read_mask(path, coding), found[name]
            assert own is not None
            predicted, other = _labels(own, coding, len(structures), mask.affine is None)
            labels = np.asarray(mask.values, np.uint8)
            _fits(own, predicted, labels, name)
            if _apart(mask.affine, other):
                astray.append(name)
            yield Pair(
                name=name,
                patient=patient_of(name, args.patient),
                predicted=predicted,
                truth=labels,
                spacing=spacing_of(mask.affine, labels.ndim),
                unit=unit,
            )
        _note_astray(astray, notes)

    return _Source(
        title=f"{folder} against {truth}",
        data=str(truth),
        split="all",
        structures=structures,
        unit=unit,
        axes=axes,
        pairs=pairs(),
        protocol="",
        notes=notes,
    )


def _masks(folder: Path) -> dict[str, Path]:
    """Name -> file of the masks in a folder."""
    from attn_medseg.segment.readers.files import is_image, stem

    files = [one for one in sorted(folder.iterdir()) if one.is_file() and is_image(one)]
    return {stem(one): one for one in files if not stem(one).endswith(_OTHERS)}


def _plain_stem(path: Path) -> str:
    from attn_medseg.segment.readers.files import stem

    return stem(path).removesuffix("_0000")


def _bare(name: str) -> str:
    """The name of a true mask without the end that says what it is."""
    return next((name.removesuffix(end) for end in _TRUE if name.endswith(end)), name)


def _find(files: Mapping[str, Path], names: Sequence[str]) -> Path | None:
    return next((files[name + end] for name in dict.fromkeys(names) for end in _ENDS if name + end in files), None)


def _complain(missing: Sequence[str], count: int, folder: Path) -> None:
    if missing:
        some = ", ".join(missing[:_FEW]) + (", …" if len(missing) > _FEW else "")
        raise UserError(f"{folder} lacks the masks of {len(missing)} of {count} cases: {some}; --split names others")


def _labels(
    path: Path, values: Mapping[int, int], structures: int, picture: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Predicted labels and the affine: as the data's files have them, as numbers of structures, or white as the one.

    Args:
        picture: the true mask's axes are height, width and perhaps slice, as pictures and arrays have them. Files of
            volumes have width first.
    """
    import numpy as np

    from attn_medseg.segment.corpus import Image
    from attn_medseg.segment.readers.files import is_picture, read_image

    image = read_image(path)
    if picture and not is_picture(path):
        image = Image(values=image.values.swapaxes(1, 2))
    found = image.values[0]
    if image.values.shape[0] > 1 and (image.values != found).any():
        raise UserError(f"{path.name} has {image.values.shape[0]} channels; a mask has one, of whole numbers")
    kinds = {float(one) for one in np.unique(found)}
    if kinds <= set(range(structures + 1)) and not (values and kinds <= set(values) and kinds - {0.0}):
        return found.astype(np.uint8), image.affine
    if kinds <= set(values):
        out = np.zeros(found.shape, np.uint8)
        for one in kinds:
            out[found == one] = values[int(one)]
        return out, image.affine
    if structures == 1 and len(kinds - {0.0}) == 1:
        return (found > 0).astype(np.uint8), image.affine
    strange = min(kinds - set(values) - set(range(structures + 1)))
    raise UserError(f"{path.name} holds the value {strange:g}, which is no label from 0 to {structures}")


def _fits(path: Path, predicted: np.ndarray, truth: np.ndarray, name: str) -> None:
    if predicted.shape != truth.shape:
        sizes = [" x ".join(map(str, one.shape)) for one in (predicted, truth)]
        raise UserError(f"{path.name} is of {sizes[0]} voxels, the mask of {name} of {sizes[1]}")


def _apart(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and float(abs(one - other).max()) > _NEAR


def _note_astray(names: Sequence[str], notes: list[str]) -> None:
    if names:
        notes.append(
            f"{len(names)} predictions lie elsewhere in space than their masks by what their files say, such as "
            f"{names[0]}; they were compared voxel by voxel"
        )


# -- figures ----------------------------------------------------------------------------------------------------------


def _report(
    source: _Source, protocol: str | None, chosen: SegmentTaskConfig, cases: str | None, output: str | None
) -> int:
    import numpy as np

    from attn_medseg.models.base import IGNORE
    from attn_medseg.segment import metrics
    from attn_medseg.segment.protocols import PROTOCOLS, CaseScores, Pair, nnunet_summary, told_phase
    from attn_medseg.segment.task import policy, told
    from attn_shared.runs import write_atomically

    rule = PROTOCOLS[protocol] if protocol is not None else None
    scored: list[CaseScores] = []
    sums: dict[str, Any] = {}
    names: dict[int, str] = {}
    patients: dict[str, int] = {}
    for number, pair in enumerate(source.pairs):
        names[number] = pair.name
        hidden = pair.truth == IGNORE
        if hidden.any():
            pair = Pair(
                **{
                    **vars(pair),
                    "predicted": np.where(hidden, 0, pair.predicted),
                    "truth": np.where(hidden, 0, pair.truth),
                }
            )
        if rule is not None:
            scored.append(rule.case(pair, source.structures))
        if rule is None or cases is not None:
            part = metrics.score(
                pair.predicted,
                pair.truth,
                len(source.structures),
                pair.spacing,
                unit="mm" if pair.unit == "mm" else "px",
            )
            sums |= metrics.pack(number, patients.setdefault(pair.patient, len(patients)), [part])
    rows, rules = metrics.unpack(sums), policy(chosen)
    if rule is not None:
        figures, says = rule.figures(scored, source.structures), rule.says
        if protocol == "acdc" and (guessed := sum(not told_phase(one) for one in scored)):
            source.notes.append(
                f"the phase of {guessed} frames is not told; a patient's first is taken for ED, its last for ES"
            )
    else:
        assert rows is not None
        figures = metrics.figures(rows, source.structures, rules, resamples=chosen.bootstrap)
        says = f"{told(chosen)[0].upper()}{told(chosen)[1:]}."
    print("\n".join(one for one in (source.title, source.protocol if rule is None else "", says) if one))
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"  {name:{width}}  {value:.6g}")
    for note in source.notes:
        print(note)
    if cases is not None:
        assert rows is not None
        volume = "ml" if source.unit == "mm" and source.axes == 3 else "voxels"
        text = metrics.table(rows, names, source.structures, rules, source.unit, volume)
        _save(Path(cases), text, write_atomically)
    if output is not None:
        result: dict[str, Any] = {
            "scored": source.title,
            "data": source.data,
            "split": source.split,
            "protocol": protocol or "own",
            "definition": says,
            "metrics": figures,
        }
        if protocol == "nnunet":
            result |= nnunet_summary(scored, source.structures)
        elif rule is not None:
            result["cases"] = [
                {"case": one.name, "patient": one.patient, "scores": {n: dict(v) for n, v in one.scores.items()}}
                for one in scored
            ]
        _save(Path(output), json.dumps(_without_nan(result), indent=2, ensure_ascii=False) + "\n", write_atomically)
    return 0


def _save(target: Path, text: str, write: Any) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, text)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None


def _without_nan(value: Any) -> Any:
    """What is no number as null, which JSON knows."""
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
