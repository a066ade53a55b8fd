"""Skips this folder where mmsegmentation is not installed."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def registry() -> Any:
    """mmseg's registry of models, with ours in it."""
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed here; `make test-mmseg` makes its environment")
    from mmseg.registry import MODELS

    import attn_medseg.mmseg  # noqa: F401

    return MODELS
