"""Where the kernels' values are tested: on a card, or on the CPU in Triton's interpreter; and what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from core_attn.kernels import Launch, interpreted
from core_attn.testing.kernels import launches

Picker = Callable[[ModuleType, torch.dtype, int, tuple[str, ...]], list[tuple[str, Launch]]]


@pytest.fixture(scope="session")
def device() -> str:
    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return "cuda"


@pytest.fixture(scope="session")
def one_config_each() -> Picker:
    """Of a backend's launches one for each of some examples and each kernel: for 8.0 its first config, else its last.

    Compiling them all takes minutes; the slow tests do.
    """

    def pick(
        module: ModuleType, dtype: torch.dtype, capability: int, examples: tuple[str, ...]
    ) -> list[tuple[str, Launch]]:
        found: dict[tuple[str, str], tuple[str, Launch]] = {}
        for name, launch in launches(module, dtype, capability):
            key = name.split("-")[0], launch.function.__name__
            if key[0] in examples and (capability != 80 or key not in found):
                found[key] = name, launch
        return list(found.values())

    return pick
