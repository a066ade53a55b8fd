"""The models' options and their list. Plain dataclasses without torch, so that `--help` answers at once."""

from __future__ import annotations

from attn_shared.app import ModelCard

MODELS: dict[str, ModelCard] = {}
