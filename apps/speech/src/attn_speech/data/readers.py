"""From a folder or a table to a `Corpus`: single voices by speaker, or mixtures with their voices."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from attn_shared import datasets
from attn_shared.app import DataCard
from attn_shared.errors import UserError
from attn_shared.seeding import derive
from attn_speech.audio import SUFFIXES, SoundInfo, info
from attn_speech.data.corpus import Corpus, Mixture, Part, Utterance
from attn_speech.data.folders import PARTS, part_of, sound_files, subfolders
from attn_speech.data.options import SpeechDataConfig

SHORTEST = 0.25  # seconds of an utterance
_MIX_FOLDERS = ("mix_clean", "mix", "mixture", "mixtures", "mix_both", "mix_single")
_SOURCE_FOLDERS = (("s1", "s2", "s3"), ("source1", "source2", "source3"), ("spk1", "spk2", "spk3"))
_LIBRISPEECH = re.compile(r"\d+-\d+-\d+")
_FLAT = re.compile(r"(.+?)[_-](mix|mixture|noise|(?:s|source|spk)([1-9]))")
_SEXES = {"f": "F", "female": "F", "w": "F", "woman": "F", "m": "M", "male": "M", "man": "M"}

Fault = Callable[[str], None]
"""What happens to a sentence about one file: raised in training, collected by `data check`."""


def refuse(fault: str) -> None:
    """The fault that stops at once."""
    raise UserError(fault)


def read_any(path: Path, args: SpeechDataConfig, fault: Fault = refuse) -> Corpus:
    """A user's own folder or table, whatever it holds, each speaker in one part.

    Args:
        path: folder or CSV.
        args: rate, mode and number of voices choose among the folders of wsj0-mix and LibriMix.
        fault: gets a sentence for every file that cannot be used; that file is then left out.

    Raises:
        UserError: nothing that can be read as speech; one sentence.
    """
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return read_csv(path, args, fault)
        raise UserError(
            f"{path} is one file, and mixtures need several speakers; name a folder, or a CSV of files and speakers"
        )
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}")
    tables = sorted(path.glob("*.csv"))
    own = [table for table in tables if table.name in ("utterances.csv", "mixtures.csv")]
    if own:
        return read_csv(own[0], args, fault)
    metadata = _libri_mix(path, args)
    if metadata:
        return read_csv(metadata, args, fault)
    root = _mixture_root(path, args)
    if root is not None:
        return read_mixture_folders(root, args, fault)
    if _flat_mixtures(path):
        return read_flat_mixtures(path, args, fault)
    return read_speaker_folders(path, args, fault)


def read_under(card: DataCard, name: str, args: SpeechDataConfig) -> Corpus:
    """A data set that the user put into the data folder, as the card tells.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    path = datasets.folder(card) / name
    if not path.is_dir():
        raise UserError(f"data set {card.name!r} is not at {path}: {card.manual}")
    found = read_any(path, args)
    return Corpus(name=card.name, utterances=found.utterances, mixtures=found.mixtures, notes=found.notes)


# -- single voices ----------------------------------------------------------------------------------------------------


def read_speaker_folders(folder: Path, args: SpeechDataConfig, fault: Fault = refuse) -> Corpus:
    """Utterances in a folder for each speaker, perhaps inside of folders train, val and test.

    LibriSpeech's folders (train-clean-100, dev-clean, … / speaker / chapter) are such folders. Where all files lie in
    one folder and are named like LibriSpeech's (speaker-chapter-number), the name tells the speaker.

    Raises:
        UserError: no sound file, or no way to tell the speakers.
    """
    inside = [one for one in subfolders(folder) if sound_files(one)]
    named = [(part, one) for one in inside if (part := part_of(one.name)) is not None]
    # Speakers may have names like Val: folders are parts where all are, or where one is for training.
    split = bool(named) and (len(named) == len(inside) or any(part == "train" for part, _ in named))
    places: list[tuple[Part | None, Path]] = [*named] if split else [(None, folder)]
    notes = []
    if split and len(named) < len(inside):
        others = [one.name for one in inside if part_of(one.name) is None]
        notes.append(f"folders that are no part were left out: {', '.join(others)}")
    found: list[tuple[Part | None, Utterance]] = []
    sexes = _sexes(folder)
    nobodys: list[Path] = []
    for part, place in places:
        for path in sound_files(place):
            steps = path.relative_to(place).parts
            if len(steps) > 1:
                speaker = steps[0]
            elif _LIBRISPEECH.fullmatch(path.stem):
                speaker = path.stem.partition("-")[0]
            else:
                nobodys.append(path)
                continue
            head = _head(path, fault)
            if head is not None:
                found.append((part, _utterance(path, speaker, sexes.get(speaker, ""), head)))
    if nobodys:
        more = f" (and {len(nobodys) - 1} more)" if len(nobodys) > 1 else ""
        fault(
            f"{nobodys[0]}{more}: whose voice is this? Put each speaker's files into a folder of its own, or name "
            "files and speakers in a CSV"
        )
    if not found:
        raise UserError(f"{folder} holds no speech that can be read ({', '.join(SUFFIXES[:4])}, … by speaker)")
    corpus = _by_parts(folder.name, found, args, fault)
    corpus.notes[:0] = notes
    return corpus


def _utterance(path: Path, speaker: str, sex: str, head: SoundInfo) -> Utterance:
    return Utterance(path=path, speaker=speaker, sex=sex, frames=head.frames, rate=head.rate)


def _head(path: Path, fault: Fault) -> SoundInfo | None:
    try:
        return info(path)
    except UserError as error:
        fault(str(error))
        return None


def _sexes(folder: Path) -> dict[str, str]:
    """Speaker -> sex from a speakers.csv or LibriSpeech's SPEAKERS.TXT in the folder or the one above."""
    for place in (folder, folder.parent):
        table = place / "speakers.csv"
        if table.is_file():
            rows = _rows(table)
            if rows and {"speaker", "sex"} <= set(rows[0]):
                return {row["speaker"]: _sex(row["sex"]) for row in rows}
        text = place / "SPEAKERS.TXT"
        if text.is_file():
            cells = (
                line.split("|") for line in text.read_text(encoding="utf-8").splitlines() if not line.startswith(";")
            )
            return {one[0].strip(): _sex(one[1]) for one in cells if len(one) > 2}
    return {}


def _sex(text: str | None) -> str:
    return _SEXES.get((text or "").strip().lower(), "")


def _by_parts(
    name: str, found: Sequence[tuple[Part | None, Utterance]], args: SpeechDataConfig, fault: Fault
) -> Corpus:
    """Utterances in their parts; parts that are missing are taken from the training speakers."""
    corpus = Corpus(name=name)
    parts: dict[Part, list[Utterance]] = {part: [] for part in PARTS}
    short = 0
    for part, one in found:
        if one.frames < SHORTEST * one.rate:
            short += 1
        else:
            parts[part or "train"].append(one)
    if short:
        corpus.notes.append(f"{short} utterances shorter than {SHORTEST:g} s were left out")
    _separate(parts, fault)
    if not parts["train"]:
        # Folders dev and test alone: what there is to learn from is the larger.
        corpus.notes.append("there is no training part")
    shares: dict[Part, float] = {"test": args.test, "val": args.val}
    missing = [part for part in shares if not parts[part]] if parts["train"] else []
    for part in missing:
        taken = _hold_out(parts["train"], shares[part], args, part)
        parts[part] = [one for one in parts["train"] if one.speaker in taken]
        parts["train"] = [one for one in parts["train"] if one.speaker not in taken]
        what = "validation" if part == "val" else part
        if taken:
            corpus.notes.append(f"{len(taken)} speakers held out for {what}")
        elif shares[part] and parts["train"]:
            corpus.notes.append(f"there are too few speakers to hold any out for {what}")
    corpus.utterances.update({part: ones for part, ones in parts.items() if ones})
    _note_rates(corpus, args)
    return corpus


def _separate(parts: dict[Part, list[Utterance]], fault: Fault) -> None:
    """Nobody may be in two parts."""
    homes: dict[str, Part] = {}
    for part in PARTS:
        for one in parts[part]:
            other = homes.setdefault(one.speaker, part)
            if other != part:
                fault(f"speaker {one.speaker} is in the parts {other} and {part}; a voice may be in one of them only")
                return


def _hold_out(utterances: Sequence[Utterance], share: float, args: SpeechDataConfig, part: Part) -> set[str]:
    """Speakers for another part: `share` of each sex, together at least as many as a mixture has voices."""
    sexes = {one.speaker: one.sex for one in utterances}
    if share in (0, 1):
        return set(sexes) if share else set()
    order = [
        sorted(sexes)[i] for i in np.random.default_rng(derive(args.shuffle, "split", part)).permutation(len(sexes))
    ]
    count = max(args.speakers, round(share * len(order)))
    if len(order) - count < args.speakers:
        return set()
    groups: dict[str, list[str]] = defaultdict(list)
    for speaker in order:
        groups[sexes[speaker]].append(speaker)
    # The k-th of n speakers of a sex stands at (k + 1/2) / n: the first `count` hold every sex by its share.
    ranks = [((k + 0.5) / len(ones), speaker) for ones in groups.values() for k, speaker in enumerate(ones)]
    return {speaker for _, speaker in sorted(ranks)[:count]}


def _note_rates(corpus: Corpus, args: SpeechDataConfig) -> None:
    rates: dict[int, int] = defaultdict(int)
    for rate in [
        *(one.rate for ones in corpus.utterances.values() for one in ones),
        *(one.rate for ones in corpus.mixtures.values() for one in ones),
    ]:
        rates[rate] += 1
    for rate, count in sorted(rates.items()):
        if rate > args.rate:
            corpus.notes.append(f"{count} files of {rate} Hz are resampled to {args.rate} Hz")
        elif rate < args.rate:
            corpus.notes.append(f"{count} files of {rate} Hz have nothing above {rate // 2} Hz")


# -- mixtures in folders ----------------------------------------------------------------------------------------------


def _mixture_root(folder: Path, args: SpeechDataConfig) -> Path | None:
    """The folder that holds mix and s1, s2, … or folders of parts with these; None where there is none.

    Below wsj0-mix's and LibriMix's roots it is the one for the rate, the mode and the number of voices asked for.
    """
    if _has_mixtures(folder):
        return folder
    rate = f"wav{args.rate // 1000}k"
    below = [
        (f"{args.speakers}speakers", rate, args.mode),
        (rate, args.mode),
        (args.mode,),
        (f"Libri{args.speakers}Mix", rate, args.mode),
    ]
    for steps in below:
        inner = folder.joinpath(*steps)
        if inner.is_dir() and _has_mixtures(inner):
            return inner
    return None


def _has_mixtures(folder: Path) -> bool:
    return _sources(folder) is not None or any(
        part_of(one.name) and _sources(one) is not None for one in subfolders(folder)
    )


def _sources(folder: Path) -> tuple[Path, ...] | None:
    """The folders s1, s2, … of a folder of mixtures, or None.

    Speakers may be called s1 and s2: without a folder of mixtures beside them there must be no other folder, and the
    same file names in each.
    """
    inside = {one.name for one in subfolders(folder)}
    for names in _SOURCE_FOLDERS:
        found = tuple(folder / name for name in names if name in inside)
        if len(found) < 2:
            continue
        alone = inside <= {*names, "noise"}
        if inside & set(_MIX_FOLDERS) or (alone and len({_names(one) for one in found}) == 1):
            return found
    return None


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in sound_files(folder))


def read_mixture_folders(folder: Path, args: SpeechDataConfig, fault: Fault = refuse) -> Corpus:
    """Folders mix, s1, s2 (s3, noise), the same file name in each; perhaps inside of tr, cv, tt or train, val, test.

    Raises:
        UserError: no mixture that can be read.
    """
    places: list[tuple[Part | None, Path]]
    if _sources(folder) is not None:
        places = [(None, folder)]
    else:
        places = [(part_of(one.name), one) for one in subfolders(folder) if part_of(one.name)]
    found: list[tuple[Part | None, Mixture]] = []
    for part, place in places:
        sources = _sources(place)
        if sources is None:
            fault(f"{place} holds no folders s1 and s2 of single voices")
            continue
        mixes = next((place / name for name in _MIX_FOLDERS if (place / name).is_dir()), None)
        noise = place / "noise"
        for first in sound_files(sources[0]):
            name = first.relative_to(sources[0])
            files = tuple(one / name for one in sources)
            one = _mixture(
                name.with_suffix("").as_posix(),
                mixes / name if mixes else None,
                files,
                noise / name if (noise / name).is_file() else None,
                fault,
            )
            if one is not None:
                found.append((part, one))
        if mixes:
            known = {path.relative_to(sources[0]) for path in sound_files(sources[0])}
            for path in sound_files(mixes):
                if path.relative_to(mixes) not in known:
                    fault(f"{path} has no {sources[0].name}/{path.relative_to(mixes)} beside it")
    if not found:
        raise UserError(f"{folder} holds no mixture that can be read")
    return _mixtures_by_parts(_title(folder), found, args)


def read_flat_mixtures(folder: Path, args: SpeechDataConfig, fault: Fault = refuse) -> Corpus:
    """One folder of files NAME_mix, NAME_s1, NAME_s2 (NAME_s3, NAME_noise); also NAME_mixture and NAME_source1.

    Raises:
        UserError: no mixture that can be read.
    """
    found: list[tuple[Part | None, Mixture]] = []
    for name, files in _flat_mixtures(folder).items():
        sources = tuple(files[f"s{i}"] for i in range(1, 4) if f"s{i}" in files)
        one = _mixture(name, files.get("mix"), sources, files.get("noise"), fault)
        if one is not None:
            found.append((None, one))
    if not found:
        raise UserError(f"{folder} holds no mixture that can be read")
    return _mixtures_by_parts(folder.name, found, args)


def _flat_mixtures(folder: Path) -> dict[str, dict[str, Path]]:
    """Name -> what ("mix", "s1", "s2", …, "noise") -> file, of names with two voices or more."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        match = _FLAT.fullmatch(path.stem)
        if match and path.suffix.lower() in SUFFIXES:
            name, what, number = match.groups()
            found[name][f"s{number}" if number else what.removesuffix("ture")] = path
    return {name: files for name, files in found.items() if {"s1", "s2"} <= set(files)}


def _title(folder: Path) -> str:
    """The name of a data set: not that of a folder like wav8k/min."""
    for one in (folder, *folder.parents):
        if one.name not in ("min", "max") and not re.fullmatch(r"wav\d+k|\dspeakers", one.name):
            return one.name
    return folder.name


def _mixture(
    name: str,
    mixture: Path | None,
    sources: tuple[Path, ...],
    noise: Path | None,
    fault: Fault,
    *,
    speakers: tuple[str, ...] = (),
    sexes: tuple[str, ...] = (),
) -> Mixture | None:
    """A mixture whose files were looked at; None where one of them is faulty."""
    files = [one for one in (mixture, *sources, noise) if one is not None]
    heads = [_head(one, fault) for one in files]
    known = [head for head in heads if head is not None]
    if len(known) < len(files):
        return None
    if len({head.rate for head in known}) > 1:
        rates = ", ".join(sorted({f"{head.rate} Hz" for head in known}))
        fault(f"mixture {name}: its files have different sampling rates ({rates})")
        return None
    lengths = [head.frames for head in known]
    # Some makers of mixtures round differently: a hundredth of a second does no harm.
    if max(lengths) - min(lengths) > known[0].rate // 100:
        fault(f"mixture {name}: its files have different lengths, {min(lengths)} to {max(lengths)} samples")
        return None
    return Mixture(
        name=name,
        mixture=mixture,
        sources=sources,
        noise=noise,
        speakers=speakers or _named_speakers(name.rpartition("/")[2], len(sources)),
        sexes=sexes,
        frames=min(lengths),
        rate=known[0].rate,
    )


def _named_speakers(name: str, count: int) -> tuple[str, ...]:
    """Speakers by the names that wsj0-mix and LibriMix give to files; () of other names.

    "01aa010k_1.3053_01po0310_-1.3053" is of 01a and 01p, "4077-13754-0001_5142-33396-0065" of 4077 and 5142.
    """
    cells = name.split("_")
    if len(cells) == count and all(_LIBRISPEECH.fullmatch(cell) for cell in cells):
        return tuple(cell.partition("-")[0] for cell in cells)
    words, numbers = cells[::2], cells[1::2]
    if len(words) == len(numbers) == count and all(re.fullmatch(r"-?\d+(\.\d+)?", one) for one in numbers):
        return tuple(word[:3] for word in words)
    return ()


def _mixtures_by_parts(name: str, found: Sequence[tuple[Part | None, Mixture]], args: SpeechDataConfig) -> Corpus:
    corpus = Corpus(name=name)
    parts: dict[Part, list[Mixture]] = {part: [] for part in PARTS}
    loose = [one for part, one in found if part is None]
    for part, one in found:
        if part is not None:
            parts[part].append(one)
    if loose:
        order = np.random.default_rng(derive(args.shuffle, "split mixtures")).permutation(len(loose))
        test = min(len(loose), max(1, round(args.test * len(loose)))) if args.test else 0
        val = min(len(loose) - test, max(1, round(args.val * len(loose)))) if args.val else 0
        shares = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
        for part in PARTS:
            parts[part] += [loose[i] for i in sorted(shares[part])]
        if sum(map(bool, parts.values())) > 1:
            corpus.notes.append("mixtures were shared out by chance: the same voice may be in two parts")
    corpus.mixtures.update({part: ones for part, ones in parts.items() if ones})
    known = {part: {who for one in ones for who in one.speakers if who} for part, ones in parts.items()}
    if shared := known["train"] & known["test"]:
        corpus.notes.append(f"{len(shared)} of the {len(known['test'])} voices of the test part are in training too")
    _note_rates(corpus, args)
    return corpus


# -- tables -----------------------------------------------------------------------------------------------------------


def _libri_mix(folder: Path, args: SpeechDataConfig) -> Path | None:
    """LibriMix's table of the test mixtures, noise left out where there is a choice; None where there is none."""
    rate = f"wav{args.rate // 1000}k"
    for steps in ((), (rate, args.mode), (f"Libri{args.speakers}Mix", rate, args.mode)):
        tables = sorted(folder.joinpath(*steps, "metadata").glob("mixture_*.csv"))
        tables += sorted(folder.joinpath(*steps).glob("mixture_*.csv"))
        clean = [table for table in tables if table.stem.endswith("mix_clean")] or tables
        if clean:
            return clean[0]
    return None


def read_csv(path: Path, args: SpeechDataConfig, fault: Fault = refuse) -> Corpus:
    """A table of utterances (file, speaker; perhaps sex, split) or of mixtures.

    Tables of mixtures have the columns mixture, source_1, source_2, …, perhaps noise, speaker_1, sex_1, …, split and
    name. LibriMix's have mixture_path, source_1_path, … and one table a part, which are found beside each other. Files
    are named relative to the table, or to a folder above it.

    Raises:
        UserError: no such columns, or no row that can be used.
    """
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    columns = {column.removesuffix("_path").lower() for column in rows[0] if column}
    if {"file", "speaker"} <= columns:
        return _read_utterances(path, rows, args, fault)
    if {"source_1", "source_2"} <= columns:
        return _read_mixtures(path, args, fault)
    raise UserError(
        f"{path} needs the columns file and speaker (a row an utterance), or mixture, source_1 and source_2 (a row a "
        f"mixture); it has {', '.join(sorted(columns)) or 'none'}"
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [
                {key.strip(): (value or "").strip() for key, value in row.items() if key is not None}
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV: {error}") from None


def _part(path: Path, number: int, row: dict[str, str], fault: Fault) -> Part | None:
    text = row.get("split", "")
    found = part_of(text) if text else None
    if text and found is None:
        fault(f"{path}, line {number}: split is train, val or test, got {text!r}")
    return found


def _read_utterances(path: Path, rows: Iterable[dict[str, str]], args: SpeechDataConfig, fault: Fault) -> Corpus:
    found: list[tuple[Part | None, Utterance]] = []
    for number, row in enumerate(rows, 2):
        part = _part(path, number, row, fault)
        if not row["file"] or not row["speaker"]:
            fault(f"{path}, line {number}: {'file' if not row['file'] else 'speaker'} is empty")
            continue
        file = _find(path, row["file"])
        head = _head(file, fault)
        if head is not None:
            found.append((part, _utterance(file, row["speaker"], _sex(row.get("sex")), head)))
    if not found:
        raise UserError(f"{path} names no file that can be read")
    named = sum(part is not None for part, _ in found)
    if 0 < named < len(found):
        fault(f"{path}: {len(found) - named} rows have no split; fill the column in every row or in none")
    return _by_parts(path.parent.name if path.stem == "utterances" else path.stem, found, args, fault)


def _find(table: Path, name: str) -> Path:
    """A file that a table names: as it says, or its last steps below the table's folder or one above.

    LibriMix's tables hold the paths of the machine that made them.
    """
    said = Path(name).expanduser()
    if said.is_absolute() and said.exists():
        return said
    places = [table.parent, *list(table.parent.parents)[:2]]
    for place in places:
        if not said.is_absolute() and (place / said).exists():
            return place / said
    for place in places:
        for count in range(min(len(said.parts), 5), 0, -1):
            tail = place.joinpath(*said.parts[-count:])
            if tail.exists():
                return tail
    return said if said.is_absolute() else table.parent / said


def _read_mixtures(path: Path, args: SpeechDataConfig, fault: Fault) -> Corpus:
    found: list[tuple[Part | None, Mixture]] = []
    for whole, table in _sisters(path):
        for number, row in enumerate(_rows(table), 2):
            cells = {key.lower().removesuffix("_path"): value for key, value in row.items()}
            part = _part(table, number, row, fault) or whole
            names = [cells[f"source_{i}"] for i in range(1, 10) if cells.get(f"source_{i}")]
            if len(names) < 2:
                fault(f"{table}, line {number}: a mixture needs two voices or more")
                continue
            noise = cells.get("noise")
            mixture = cells.get("mixture")
            count = len(names)
            one = _mixture(
                cells.get("name") or cells.get("mixture_id") or Path(mixture or names[0]).stem,
                _find(table, mixture) if mixture else None,
                tuple(_find(table, name) for name in names),
                _find(table, noise) if noise else None,
                fault,
                speakers=_listed(cells, "speaker", count) or _named_speakers(cells.get("mixture_id", ""), count),
                sexes=tuple(_sex(text) for text in _listed(cells, "sex", count)),
            )
            if one is not None:
                found.append((part, one))
    if not found:
        raise UserError(f"{path} names no mixture that can be read")
    return _mixtures_by_parts(_title(path.parent.parent) if path.parent.name == "metadata" else path.stem, found, args)


def _sisters(path: Path) -> list[tuple[Part | None, Path]]:
    """The tables of all parts: LibriMix's mixture_train-100_mix_clean.csv has mixture_dev_mix_clean.csv beside it."""
    cells = path.stem.split("_")
    if len(cells) < 3 or cells[0] != "mixture" or part_of(cells[1]) is None:
        return [(None, path)]
    found: dict[Part, Path] = {}
    for table in sorted(path.parent.glob("mixture_*.csv")):
        steps = table.stem.split("_")
        part = part_of(steps[1]) if steps[2:] == cells[2:] else None
        # Of train-100 and train-360 the one that was named, else the first.
        if part is not None and (part not in found or table == path):
            found[part] = table
    return list(found.items())


def _listed(cells: dict[str, str], name: str, count: int) -> tuple[str, ...]:
    values = tuple(cells.get(f"{name}_{i}", "") for i in range(1, count + 1))
    return values if any(values) else ()
