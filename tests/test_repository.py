"""The shape of the repository itself: who imports whom, and what the packages promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    path.parent.name: path.parent
    for pattern in ("packages/*/src/*/__init__.py", "shared/src/*/__init__.py", "apps/*/src/*/__init__.py")
    for path in ROOT.glob(pattern)
}
APPS = {name for name, path in PACKAGES.items() if path.is_relative_to(ROOT / "apps")}


def imported_packages(path: Path) -> set[str]:
    """Top-level names imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_imports_point_one_way(name: str) -> None:
    allowed = {"core_attn": set(), "attn_shared": {"core_attn"}}.get(name, {"core_attn", "attn_shared"}) | {name}
    for path in PACKAGES[name].rglob("*.py"):
        wrong = (imported_packages(path) & set(PACKAGES)) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: {name} may import only {allowed}"


# Packages that `core-attn bench` times beside ours where somebody has installed them, and names where not.
TIMED_BESIDE = {"natten", "local_attention"}


def test_the_core_needs_torch_alone() -> None:
    third_party = {"torch", "triton", "flash_attn"}
    for path in PACKAGES["core_attn"].rglob("*.py"):
        allowed = third_party | {"core_attn"} | (TIMED_BESIDE if path.parent.name == "bench" else set())
        extra = imported_packages(path) - set(sys.stdlib_module_names) - allowed
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


# Distributions whose import has another name.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "scikit_learn": "sklearn",
    "imbalanced_learn": "imblearn",
    "pillow": "PIL",
    "simpleitk": "SimpleITK",
    "onedl_mmcv": "mmcv",
    "onedl_mmengine": "mmengine",
    "onedl_mmsegmentation": "mmseg",
}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_every_import_is_declared(name: str) -> None:
    project = tomllib.loads((PACKAGES[name].parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project.get("optional-dependencies", {}).values() for one in extra),
    ]
    declared = {re.split(r"[\[<>=~! ]", item)[0].lower().replace("-", "_") for item in wanted}
    declared |= {IMPORTED_AS[name] for name in declared & set(IMPORTED_AS)}
    optional = {"triton", "flash_attn", "resource"}
    for path in PACKAGES[name].rglob("*.py"):
        used = imported_packages(path) - set(sys.stdlib_module_names) - {name} - optional
        if name == "core_attn" and path.parent.name == "bench":
            used -= TIMED_BESIDE
        assert used <= declared, (
            f"{path.relative_to(ROOT)} imports {used - declared}, which pyproject.toml does not name"
        )


def test_torch_is_pinned_exactly() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in pins
    assert all("==" in line for line in pins if line and not line.startswith("#"))


@pytest.mark.parametrize("app", sorted(APPS))
def test_make_has_the_targets_of_every_app(app: str) -> None:
    short = app.removeprefix("attn_")
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    for command in ("train", "eval", "compare"):
        assert f"{command}-{short}" in listing


def test_ci_runs_the_readme_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_text_of_child_processes_names_its_encoding() -> None:
    """Libraries change the locale of the process they are in, and so what text is where no encoding is named."""
    unnamed = ("text=" + "True", "universal_newlines=" + "True")
    found = [
        path.relative_to(ROOT)
        for folder in ("packages", "shared", "apps", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in unnamed)
    ]
    assert found == []
