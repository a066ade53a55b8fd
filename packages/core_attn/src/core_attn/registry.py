"""Registry: name -> mechanism class. Filled by the `register` decorator.

A class in a file of the user's own is named `path/to/file.py:ClassName` wherever a registered name is taken.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
    """The class registered under `name`, or the class `ClassName` of `path/to/file.py:ClassName`.

    The second form imports that file, so it runs the file's code: give it only files you trust.

    Raises:
        UnknownNameError: no such mechanism, or no such class in the file; the message names the nearest.
        ValueError: there is no such file, it cannot be imported, or the class is not a registered mechanism.
    """
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_file(Path(file), attribute)
    load_all()
    try:
        return _REGISTRY[name]
    except KeyError:
        raise unknown("mechanism", name, _REGISTRY) from None


def short_name(name: str) -> str:
    """What a mechanism is called in tables and file names: `name`, or `ClassName` of `path/to/file.py:ClassName`."""
    file, colon, attribute = name.rpartition(":")
    return attribute if colon and file.endswith(".py") else name


def _from_file(path: Path, attribute: str) -> type[Mechanism]:
    module = _import_file(path)
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Mechanism) and value.__module__ == module.__name__
    }
    if attribute not in classes:
        raise unknown(f"mechanism in {path}", attribute, classes)
    cls = classes[attribute]
    if "info" not in vars(cls):
        raise ValueError(f"{attribute} in {path} declares no facts; put @register(...) on the class")
    return cls


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; a mechanism of your own is named path/to/file.py:ClassName")
    # One module a file, so that building twice gives one class. The name must not meet an installed module's.
    key = f"core_attn_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    load_all()  # so that a name this project uses already is refused here, not at a later load
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
