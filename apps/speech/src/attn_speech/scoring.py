"""`speech eval --estimates DIR --data NAME_OR_PATH`: figures of voices that some program has written as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from attn_shared import options
from attn_shared.errors import UserError
from attn_speech.export import data_config, data_options

if TYPE_CHECKING:
    import numpy as np

    from attn_speech.metrics import Measures

_HELP = """usage: speech eval --estimates DIR --data NAME_OR_PATH [options]

Score voices that are there as files against the true ones. For a mixture called NAME, DIR holds s1/NAME.wav,
s2/NAME.wav, … or NAME_voice1.wav, NAME_voice2.wav, … (as `speech predict` writes them) or NAME_s1.wav, …, in any order
of voices and as WAV, FLAC or OGG of any rate.

  --data NAME_OR_PATH   mixtures with their voices, best as files: `speech mix` writes those that are made on the way
  --split NAME          train, val or test (default: test)
  --measures NAME       si_sdr, sdr or all (default: all)
  --output FILE.json    also write the figures, and those of every mixture, as JSON

and every --data_args option of `train`; --data_args.test 1 takes all of a folder that is not divided into parts."""
_SUFFIXES = (".wav", ".flac", ".ogg")
_FEW = 3
_FAR = 0.1  # seconds by which an estimate may be longer or shorter than its mixture


def main(argv: Sequence[str]) -> int:
    """Score the files; the exit status."""
    if any(token in ("-h", "--help") for token in argv):
        print(_HELP)
        return 0
    parsed = options.split(argv)
    options.check_options(parsed, [*data_options(), "estimates", "data", "split", "measures", "output"])
    if parsed.words:
        raise UserError(f"eval --estimates scores files and takes no run, got {parsed.words[0]!r}")
    given = {name: parsed.take(name) for name in ("estimates", "data", "split", "measures", "output")}
    if options.MISSING in given.values():
        raise UserError("--estimates, --data, --split, --measures and --output need a value")
    split, measures = given["split"] or "test", given["measures"] or "all"
    if split not in ("train", "val", "test"):
        raise UserError(f"--split is {split!r}; it may be train, val or test")
    if measures not in ("si_sdr", "sdr", "all"):
        raise UserError(f"--measures is {measures!r}; it may be si_sdr, sdr or all")
    if given["estimates"] is None or given["data"] is None:
        raise UserError("scoring needs --estimates DIR and --data NAME_OR_PATH, the mixtures with their true voices")
    folder = Path(given["estimates"])
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    config = data_config(parsed)

    import numpy as np
    import torch

    from attn_speech import metrics
    from attn_speech.data.bundle import load_bundle
    from attn_speech.data.mixing import Mixtures

    bundle = load_bundle(given["data"], config)
    part = bundle.split(split)
    if not isinstance(part, Mixtures):
        raise UserError(f"{given['data']} has no {split} split")
    pieces = [part.piece(index) for index in range(len(part))]
    files = [_find(folder, piece.name, config.speakers) for piece in pieces]
    missing = [piece.name for piece, found in zip(pieces, files) if not found]
    if missing:
        some = ", ".join(missing[:_FEW]) + (", …" if len(missing) > _FEW else "")
        raise UserError(
            f"{folder} lacks the voices of {len(missing)} of {len(pieces)} mixtures ({some}): it should hold "
            f"s1/NAME.wav, s2/NAME.wav or NAME_voice1.wav, NAME_voice2.wav for each"
        )
    entries: dict[str, torch.Tensor] = {}
    uneven = 0
    for index, paths in enumerate(files):
        mixture, sources = part.samples(index)
        voices, fitted = _voices(paths, config.rate, len(mixture))
        uneven += fitted
        batch = [torch.from_numpy(np.ascontiguousarray(x))[None] for x in (voices, sources, mixture)]
        values = metrics.score(batch[0], batch[1], batch[2], None, config.rate, measures=cast("Measures", measures))
        entries |= metrics.pack(torch.tensor([index]), values)
    scores = metrics.unpack(entries)
    assert scores is not None
    figures = metrics.figures(scores, config.rate)
    print(f"{folder} against {given['data']}, {split} split\n{bundle.protocol}")
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"  {name:{width}}  {value:.6g}")
    if uneven:
        print(f"{uneven} estimates were not exactly as long as their mixture; they were cut, or filled with silence")
    if given["output"]:
        from attn_shared.runs import write_atomically

        gain, own = scores.of("si_sdri"), scores.of("si_sdr")
        rows = [
            {"mixture": piece.name, "si_sdr": _plain(own[i]), "si_sdri": _plain(gain[i])}
            for i, piece in enumerate(pieces)
        ]
        target = Path(given["output"])
        target.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "estimates": str(folder),
            "data": given["data"],
            "split": split,
            "protocol": bundle.protocol,
            "metrics": figures,
            "mixtures": rows,
        }
        write_atomically(target, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if value != value else float(value) for value in values]


def _find(folder: Path, name: str, voices: int) -> list[Path]:
    """The files of a mixture's estimates; empty where one is missing."""
    for pattern in ("s{number}/{name}", "{name}_voice{number}", "{name}_s{number}"):
        stems = [pattern.format(number=number, name=name) for number in range(1, voices + 1)]
        found = [next((p for end in _SUFFIXES if (p := folder / (stem + end)).is_file()), None) for stem in stems]
        if None not in found:
            return [path for path in found if path is not None]
    return []


def _voices(paths: Sequence[Path], rate: int, size: int) -> tuple[np.ndarray, int]:
    """(C, size) samples, and how many of the files were of another length.

    Raises:
        UserError: a file that cannot be read, or is of quite another length.
    """
    import numpy as np

    from attn_speech import audio

    found, uneven = np.zeros((len(paths), size), np.float32), 0
    for row, path in enumerate(paths):
        samples, own = audio.read(path)
        samples = audio.resample(samples, own, rate)
        if abs(len(samples) - size) > _FAR * rate:
            raise UserError(f"{path} lasts {len(samples) / rate:.2f} s and its mixture {size / rate:.2f} s")
        uneven += len(samples) != size
        found[row, : len(samples)] = samples[:size]
    return found, uneven
