"""Random states: where they start, and how they are kept so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from whole numbers and words, such as (seed, "order", epoch). Equal parts, equal seed, anywhere."""
    digest = hashlib.blake2b("\0".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`, such as `generator(seed, epoch, index)` for a sample's augmentation."""
    return torch.Generator().manual_seed(derive(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seed torch (every device), NumPy's and Python's global generators from `parts`."""
    seed = derive(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - apps and their libraries may draw from the global generator
    random.seed(seed)


def get_state() -> dict[str, Any]:
    """The random state of this process in tensors and plain numbers: loads under `weights_only=True`."""
    version, keys, gauss = random.getstate()
    name, np_keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    assert isinstance(np_keys, np.ndarray)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np_keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [int(version), torch.tensor(keys, dtype=torch.int64), gauss],
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Return to a state that `get_state` gave."""
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(cuda) for cuda in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))


def _bytes(state: Tensor) -> Tensor:
    return state.detach().cpu().to(torch.uint8).clone()


@contextmanager
def fork(*parts: int | str) -> Iterator[None]:
    """Inside, the random state is seeded from `parts` (or left as it is); outside, nothing was drawn."""
    state = get_state()
    try:
        if parts:
            seed_everything(*parts)
        yield
    finally:
        set_state(state)
