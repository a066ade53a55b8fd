"""What torchaudio computes too. It is used where it can be imported; the other side gives the same numbers.

Beside a CPU build of torch, torchaudio may be installed and still fail to load its library.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def torchaudio() -> ModuleType | None:
    """`torchaudio.functional`, or None where it is not installed or cannot be loaded."""
    try:
        import torchaudio.functional as found
    except (ImportError, OSError, RuntimeError):
        return None
    module: ModuleType = found
    return module


def spectrogram(samples: Tensor, window: int, hop: int, *, own: bool | None = None) -> Tensor:
    """Magnitudes of the short-time Fourier transform, Hann window, frames centred on the first sample and on.

    Args:
        samples: (…, T); zeros are taken to lie on either side.
        window: samples of a window, and of the transform.
        hop: samples between windows.
        own: True = by `torch.stft`; False = by torchaudio; None = torchaudio where it is there.

    Returns:
        (…, window // 2 + 1, 1 + T // hop).
    """
    hann = torch.hann_window(window, dtype=samples.dtype, device=samples.device)
    functional = None if own else torchaudio()
    if functional is None:
        if own is False:
            raise ImportError("torchaudio cannot be imported here")
        flat = samples.reshape(-1, samples.shape[-1])
        found = torch.stft(flat, window, hop, window=hann, center=True, pad_mode="constant", return_complex=True).abs()
        return found.reshape(*samples.shape[:-1], *found.shape[-2:])
    result: Tensor = functional.spectrogram(samples, 0, hann, window, hop, window, 1.0, False, pad_mode="constant")
    return result
