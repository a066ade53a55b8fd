"""`speech mix DATA --output DIR`: a data set's fixed mixtures and their voices as files, for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_shared import options
from attn_shared.errors import UserError
from attn_speech.data.options import SpeechDataConfig

_HELP = """usage: speech mix DATA --output DIR [--split test] [--data_args.X VALUE]…

Write the mixtures of a data set as WAV files: folders mix, s1, s2 (s3) in a folder called as the split (32-bit float,
so that mixtures are exactly the sums they were). DATA is a data set's name, or a folder or CSV of one's own.

  --output DIR     where the folders go
  --split NAME     val or test (default: test)

and every --data_args option of `train`. `speech eval --estimates OUT --data DIR` scores what another program makes of
them."""


def main(argv: Sequence[str]) -> int:
    """Write the files; the exit status."""
    if any(token in ("-h", "--help") for token in argv):
        print(_HELP)
        return 0
    parsed = options.split(argv)
    options.check_options(parsed, [*data_options(), "output", "split"])
    if len(parsed.words) != 1:
        raise UserError(f"mix takes one data set, got {len(parsed.words)}; `speech data list` shows them")
    split, output = parsed.take("split") or "test", parsed.take("output")
    if split not in ("val", "test"):
        raise UserError(f"--split is {split!r}; it may be val or test, whose mixtures are fixed")
    if output in (None, options.MISSING):
        raise UserError("mix needs --output DIR, the folder for the mixtures")
    config = data_config(parsed)

    from attn_speech import audio
    from attn_speech.data.bundle import load_bundle
    from attn_speech.data.mixing import Mixtures

    bundle = load_bundle(parsed.words[0], config)
    part = bundle.split(split)
    if not isinstance(part, Mixtures):
        raise UserError(f"{parsed.words[0]} has no {split} split")
    folder = Path(str(output)) / split
    for index in range(len(part)):
        mixture, voices = part.samples(index)
        # The same voices may meet twice.
        name = f"{index:05d}_{part.piece(index).name}".replace("/", "_") + ".wav"
        audio.write(folder / "mix" / name, mixture, config.rate, subtype="FLOAT")
        for number, voice in enumerate(voices, 1):
            audio.write(folder / f"s{number}" / name, voice, config.rate, subtype="FLOAT")
    print(folder)
    return 0


def data_options() -> list[str]:
    """Names of the options of the data."""
    return [option.name for option in options.dataclass_options("data_args", SpeechDataConfig)]


def data_config(parsed: options.Parsed) -> SpeechDataConfig:
    """The options of the data as given, the others as they are by default."""
    known = list(options.dataclass_options("data_args", SpeechDataConfig))
    names = {option.name for option in known}
    values = options.typed(known, {}, [f"--{name}={text}" for name, text in parsed.options if name in names])
    return SpeechDataConfig(**{name.removeprefix("data_args."): value for name, value in values.items()})
