"""Published attention mechanisms behind one contract.

The names below are imported on first use, so that command lines can answer `--help` without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "attention": "core_attn.api",
    "build": "core_attn.api",
    "describe": "core_attn.api",
    "explain": "core_attn.api",
    "list": "core_attn.api",
    "capture": "core_attn.maps",
    "edit": "core_attn.maps",
    "FeatureGate": "core_attn.contract",
    "Growth": "core_attn.contract",
    "MechanismInfo": "core_attn.contract",
    "Pattern": "core_attn.contract",
    "TokenMixer": "core_attn.contract",
    "register": "core_attn.registry",
    "UnknownNameError": "core_attn.naming",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in {"ops", "testing", "mechanisms", "state", "bench", "parallel", "distillation"}:
        return importlib.import_module(f"core_attn.{name}")
    raise AttributeError(f"module 'core_attn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
