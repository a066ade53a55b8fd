"""Files of EEG, one reader for each kind of file. Every one gives a `Recording` in microvolts with known electrodes.

EDF, BDF, EEGLAB, BrainVision and FIF are read by MNE; ARFF and MATLAB files by SciPy; NPZ by NumPy without pickles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_eeg.data.channels import electrode, is_eeg
from attn_eeg.data.recording import Recording
from attn_shared.errors import UserError

MNE_READERS = {
    ".edf": "read_raw_edf",
    ".bdf": "read_raw_bdf",
    ".set": "read_raw_eeglab",
    ".vhdr": "read_raw_brainvision",
    ".fif": "read_raw_fif",
}
SUFFIXES = (*MNE_READERS, ".arff", ".npz", ".mat")
# Scalp EEG has deviations of some 5 to 100 microvolt; outside of these bounds the unit must be another one.
_LEAST, _MOST, _USUAL = 0.1, 5000.0, 20.0
_UNITS = {1e6: "volt", 1e3: "millivolt", 1e-3: "nanovolt", 1e-6: "picovolt"}


def read_file(path: Path, *, channels: Sequence[str] | None = None, rate: float = 0.0) -> Recording:
    """Read one recording.

    Args:
        path: file with a suffix of `SUFFIXES`.
        channels: names of the electrodes of an array file that does not name them.
        rate: sampling rate of a file that does not say it, Hz.

    Returns:
        All EEG channels of the file; label -1, subject the file's stem. Samples that are no numbers are NaN; `notes`
        says what was found.

    Raises:
        UserError: no such file, an unknown kind of file, or contents that are not what they should be; one sentence.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    kind = path.suffix.lower()
    if kind in MNE_READERS:
        return _read_mne(path, MNE_READERS[kind])
    if kind == ".arff":
        return _read_arff(path, rate)
    if kind == ".npz":
        return _read_arrays(path, _load_npz(path), channels, rate)
    if kind == ".mat":
        return _read_arrays(path, load_mat(path), channels, rate)
    raise UserError(
        f"{path}: files of kind {kind or 'without a suffix'} are not known; known are {', '.join(SUFFIXES)}"
    )


def finish(recording: Recording, labels: Sequence[int] | None = None) -> Recording:
    """Check and clean what a reader made: shapes, electrodes, numbers, units. In place; returns it.

    Raises:
        UserError: no sample, no electrode, one name twice, no number at all, or a rate that cannot be.
    """
    r = recording
    data = np.ascontiguousarray(r.data, dtype=np.float32)
    if data.ndim != 2 or data.shape[0] != len(r.channels):
        raise UserError(f"{r.source}: {len(r.channels)} names of electrodes for an array of shape {data.shape}")
    if not data.size:
        raise UserError(f"{r.source} holds no samples of EEG")
    if not (math.isfinite(r.sfreq) and 0 < r.sfreq <= 1e5):
        raise UserError(
            f"{r.source}: a sampling rate of {r.sfreq:g} Hz cannot be; name the right one by --data_args.rate"
        )
    if len(set(r.channels)) < len(r.channels):
        twice = next(name for name in r.channels if r.channels.count(name) > 1)
        raise UserError(f"{r.source}: two signals are electrode {twice}; leave one out")
    numbers = np.isfinite(data)
    if not numbers.all():
        if not numbers.any():
            raise UserError(f"{r.source} holds no number")
        data[~numbers] = np.nan
        share, where = (~numbers).any(axis=0).mean(), _some(r.channels, np.asarray((~numbers).any(axis=1)))
        r.notes.append(f"{share:.1%} of the samples are no numbers (of {where}): windows over them are left out")
    r.data = data
    _check_units(r)
    spread = _deviations(r.data)
    if (flat := spread <= 1e-6 * max(float(np.median(spread)), 1e-12)).any():
        r.notes.append(f"flat: {_some(r.channels, flat)} never changes")
    if labels is not None:
        r.labels = np.asarray(labels, dtype=np.int64)
        if r.labels.shape != data.shape[1:]:
            raise UserError(f"{r.source}: {len(r.labels)} labels for {data.shape[1]} samples")
    return r


def _some(names: Sequence[str], chosen: np.ndarray, most: int = 6) -> str:
    found = [name for name, is_so in zip(names, chosen) if is_so]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _deviations(data: np.ndarray) -> np.ndarray:
    """(C, T) -> (C,) standard deviation of what are numbers; 0 where none is."""
    known = np.isfinite(data)
    count = np.maximum(known.sum(axis=1), 1)
    values = np.where(known, data, 0.0).astype(np.float64)
    centred = np.where(known, values - (values.sum(axis=1) / count)[:, None], 0.0)
    return np.sqrt((centred**2).sum(axis=1) / count)


def _check_units(r: Recording) -> None:
    """Deviations far outside of what a scalp gives mean another unit than microvolt: convert, and say so."""
    spread = float(np.median(_deviations(r.data)))
    if spread == 0 or _LEAST <= spread <= _MOST:
        return
    factor = min(_UNITS, key=lambda f: abs(math.log(spread * f / _USUAL)))
    if not _LEAST <= spread * factor <= _MOST:
        r.notes.append(f"unit unknown: a deviation of {spread:.3g} microvolt is not EEG in any usual unit")
        return
    r.notes.append(
        f"unit mixed up: a deviation of {spread:.3g} microvolt cannot be EEG, {spread * factor:.3g} can; taken as "
        f"{_UNITS[factor]} and converted"
    )
    r.data *= np.float32(factor)
    if r.baseline is not None:
        r.baseline = r.baseline * np.float32(factor)


# -- MNE ---------------------------------------------------------------------------------------------------------------


def _read_mne(path: Path, reader: str) -> Recording:
    import mne

    if path.suffix.lower() in (".edf", ".bdf"):
        _check_edf_size(path)
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            raw = getattr(mne.io, reader)(path, preload=False, verbose="error")
            chosen = [
                number
                for number, (name, kind) in enumerate(zip(raw.ch_names, raw.get_channel_types()))
                if kind in ("eeg", "misc") and is_eeg(name)
            ]
            if not chosen:
                raise UserError(f"{path} holds no EEG channel, only {', '.join(raw.ch_names[:8]) or 'nothing'}")
            data = raw.get_data(picks=chosen, verbose="error") * 1e6
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever the parser met first
        raise UserError(f"{path} cannot be read as {path.suffix[1:].upper()}: {_first_line(error)}") from None
    names = [electrode(raw.ch_names[number]) for number in chosen]
    return finish(
        Recording(
            subject=path.stem,
            data=data,
            sfreq=float(raw.info["sfreq"]),
            channels=names,
            source=str(path),
            trial=path.stem,
        )
    )


def _check_edf_size(path: Path) -> None:
    """Refuse an EDF or BDF file that is shorter than its header says: the end of the recording is lost."""
    size = 3 if path.suffix.lower() == ".bdf" else 2
    with path.open("rb") as file:
        head = file.read(256)
        try:
            if len(head) < 256:
                raise ValueError
            header, records, signals = int(head[184:192]), int(head[236:244]), int(head[252:256])
            if not 0 < signals < 10_000 or header != 256 * (signals + 1):
                raise ValueError
            file.seek(256 + 216 * signals)
            counts = file.read(8 * signals)
            samples = sum(int(counts[8 * i : 8 * i + 8]) for i in range(signals))
        except ValueError:
            raise UserError(f"{path} is damaged: it does not begin with the header of an EDF or BDF file") from None
    there = (path.stat().st_size - header) // max(1, size * samples)
    if records > 0 and there < records:
        raise UserError(
            f"{path} is cut short: it holds {max(0, there)} of the {records} records that its header promises"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# -- arrays ------------------------------------------------------------------------------------------------------------

_DATA = ("data", "eeg", "EEG", "X", "x", "signal", "signals")
_RATE = ("sfreq", "fs", "srate", "rate", "sampling_rate", "Fs", "FS")
_NAMES = ("channels", "ch_names", "channel_names", "labels_eeg", "chan")


def _load_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise UserError(f"{path} cannot be read as NPZ: {_first_line(error)}") from None


def load_mat(path: Path) -> dict[str, Any]:
    """Variables of a MATLAB file up to version 7.

    Raises:
        UserError: damaged, or of version 7.3 (HDF5).
    """
    from scipy.io import loadmat

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = loadmat(path, squeeze_me=False, struct_as_record=False)
    except NotImplementedError:
        raise UserError(f"{path} is a MATLAB file of version 7.3; save it as version 7: save(..., '-v7')") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read as a MATLAB file: {_first_line(error)}") from None
    return {name: value for name, value in found.items() if not name.startswith("__")}


def _read_arrays(path: Path, arrays: Mapping[str, Any], channels: Sequence[str] | None, rate: float) -> Recording:
    name = next((key for key in _DATA if key in arrays), None)
    if name is None:
        tables = [key for key, value in arrays.items() if getattr(value, "ndim", 0) == 2 and min(value.shape) > 1]
        if len(tables) != 1:
            raise UserError(
                f"{path}: which of its arrays is the EEG? Name it 'data', of shape (electrodes, samples); "
                f"it has {', '.join(arrays) or 'none'}"
            )
        name = tables[0]
    data = np.asarray(arrays[name])
    if data.ndim != 2 or data.dtype.kind not in "fiu":
        raise UserError(f"{path}: array {name!r} must be numbers of shape (electrodes, samples), got {data.shape}")
    names = next((_texts(arrays[key]) for key in _NAMES if key in arrays), None) or list(channels or ())
    if names and len(names) != data.shape[0] and len(names) == data.shape[1]:
        data = data.T
    if not names:
        raise UserError(f"{path} does not name its {data.shape[0]} electrodes; add an array 'channels' of their names")
    if len(names) != data.shape[0]:
        raise UserError(f"{path}: {len(names)} names of electrodes for an array of shape {data.shape}")
    found = next((float(np.ravel(arrays[key])[0]) for key in _RATE if key in arrays and np.size(arrays[key])), rate)
    if not found:
        raise UserError(f"{path} does not say its sampling rate; add 'sfreq', or give --data_args.rate")
    data = data.astype(np.float32)
    if "scale" in arrays:
        data *= np.float32(np.ravel(arrays["scale"])[0])
    keep = [i for i, n in enumerate(names) if is_eeg(n)]
    labels = arrays.get("labels")
    return finish(
        Recording(
            subject=path.stem,
            trial=path.stem,
            data=data[keep],
            sfreq=found,
            channels=[electrode(names[i]) for i in keep],
            source=str(path),
        ),
        None if labels is None or np.size(labels) != data.shape[1] else np.ravel(labels).astype(np.int64).tolist(),
    )


def _texts(value: Any) -> list[str]:
    """Names out of an array of texts, of a MATLAB cell array, or of one text with commas."""
    flat = [np.ravel(item)[0] if isinstance(item, np.ndarray) and item.size else item for item in np.ravel(value)]
    texts = [str(item).strip() for item in flat]
    return [t.strip() for t in texts[0].split(",")] if len(texts) == 1 and "," in texts[0] else texts


def _read_arff(path: Path, rate: float) -> Recording:
    """ARFF: an attribute an electrode, a row a sample; one nominal attribute, where there is one, is the label."""
    from scipy.io import arff

    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            rows, meta = arff.loadarff(file)
    except Exception as error:
        raise UserError(f"{path} cannot be read as ARFF: {_first_line(error)}") from None
    kinds = dict(zip(meta.names(), meta.types()))
    names = [name for name, kind in kinds.items() if kind == "numeric" and is_eeg(name)]
    nominal = [name for name, kind in kinds.items() if kind == "nominal"]
    if not names or not len(rows):
        raise UserError(f"{path} holds no numeric attribute with values")
    if not rate:
        raise UserError(f"{path}: ARFF does not say its sampling rate; give it by --data_args.rate")
    labels = None
    if len(nominal) == 1:
        values = [value.encode() for value in meta[nominal[0]][1]]
        labels = [values.index(value) for value in rows[nominal[0]]]
    return finish(
        Recording(
            subject=path.stem,
            trial=path.stem,
            data=np.stack([rows[name] for name in names]).astype(np.float32),
            sfreq=rate,
            channels=[electrode(name) for name in names],
            source=str(path),
        ),
        labels,
    )
