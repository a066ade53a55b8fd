"""Names of electrodes: one spelling for what files spell in many ways."""

from __future__ import annotations

import re
from typing import Any

# Positions of the 10-20, 10-10 and 10-5 systems are letters of a line and a number or z.
_LINE_NAMES = (
    "Fp N AF AFF AFp F FFC FFT FT FTT FC FCC C CCP CP CPP T TTP TP TPP P PPO PO POO O OI I FFT TT TPP Iz Nz M A"
)
_CANONICAL = {line.upper(): line for line in _LINE_NAMES.split()}
# Names of the first 10-20 system, and what the 10-10 system calls the same places.
_RENAMED = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
_NOT_EEG = re.compile(
    r"^(ECG|EKG|EOG|[HV]EOG\w*|EMG\w*|GSR|EDA|RESP\w*|PLETH|TEMP\w*|STATUS|STI\w*|TRIG\w*|MARKER|EVENT\w*|TIME\w*|COUNTER|"
    r"INTERPOLATED|PHOTIC|SPO2|PULSE|DC\d*|EDF ANNOTATIONS|BDF ANNOTATIONS|ANNOTATIONS|A[12]-A[12]|M[12]|A[12])$"
)


def electrode(name: str) -> str:
    """The usual spelling of an electrode's name: "EEG FP1-REF" and "Fp1." are "Fp1", "T3" is "T7".

    Names of no known place stay as they are, without their decoration.
    """
    text = re.sub(r"^EEG[\s:_-]*", "", name.strip(), flags=re.IGNORECASE)
    text = re.sub(r"[\s_-]+(REF|LE|AR|AVG|AVE|A1|A2|M1|M2|Cz)$", "", text, flags=re.IGNORECASE) or text
    text = text.strip(" .:_-") or name.strip()
    found = re.fullmatch(r"([A-Za-z]+?)(\d{1,2}|[zZ])(h?)", text)
    if found is None or found[1].upper() not in _CANONICAL:
        return text
    spelt = _CANONICAL[found[1].upper()] + found[2].lower() + found[3]
    return _RENAMED.get(spelt, spelt)


def is_eeg(name: str) -> bool:
    """False for names of other signals: heart, eyes, muscles, references by themselves, triggers."""
    text = name.strip()
    kind = re.match(r"^(ECG|EKG|EOG|EMG|RESP|MISC|STIM)", text, flags=re.IGNORECASE)
    bare = re.sub(r"^EEG[\s:_-]*", "", text, flags=re.IGNORECASE).strip(" .:_")
    return kind is None and _NOT_EEG.match(bare.upper()) is None


def standard_montage() -> Any:
    """Places of the electrodes of the 10-05 system on a head, as MNE has them; it calls one montage by two names."""
    import mne

    known = mne.channels.get_builtin_montages()
    return mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in known else "standard_1005")
