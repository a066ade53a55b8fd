"""Where the kernels' values are tested: on a card, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from core_attn.kernels import interpreted


@pytest.fixture(scope="session")
def device() -> str:
    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return "cuda"
