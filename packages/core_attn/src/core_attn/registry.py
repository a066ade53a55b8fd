"""Registry: name -> mechanism class. Filled by the `register` decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from core_attn.contract import Mechanism, MechanismInfo
from core_attn.naming import unknown

M = TypeVar("M", bound=type[Mechanism])

_REGISTRY: dict[str, type[Mechanism]] = {}
_loaded = False


def register(**facts: Any) -> Callable[[M], M]:
    """Class decorator: attach `MechanismInfo(**facts)` and enter the class under its name.

    Raises:
        ValueError: another class holds the name already.
    """
    info = MechanismInfo(**facts)

    def enter(cls: M) -> M:
        # The same class registered again (a notebook cell run twice, importlib.reload) replaces itself.
        held = _REGISTRY.get(info.name)
        if held is not None and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"mechanism name {info.name!r} is taken by {held.__module__}.{held.__qualname__}; choose another name"
            )
        cls.info = info
        _REGISTRY[info.name] = cls
        return cls

    return enter


def load_all() -> None:
    """Import every module under core_attn.mechanisms, so that the registry is complete."""
    global _loaded
    if _loaded:
        return
    package = importlib.import_module("core_attn.mechanisms")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    _loaded = True


def names() -> list[str]:
    """Names of all registered mechanisms, sorted."""
    load_all()
    return sorted(_REGISTRY)


def get(name: str) -> type[Mechanism]:
    """The class registered under `name`.

    Raises:
        UnknownNameError: no such mechanism; the message names the nearest.
    """
    load_all()
    try:
        return _REGISTRY[name]
    except KeyError:
        raise unknown("mechanism", name, _REGISTRY) from None
