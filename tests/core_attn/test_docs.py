"""docs/adding-a-mechanism.md, followed to the letter: its files written, its commands run, its claims compared."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from core_attn import cli, registry

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-mechanism.md"
BLOCK = re.compile(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty folder to work in, and a registry that forgets the page's mechanism afterwards."""
    registry.load_all()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget_files(monkeypatch):
    """What a new process would do: import the file as it is now."""
    import sys

    for name in [n for n in sys.modules if n.startswith("core_attn_file_efficient")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_page_does_what_it_says(scratch, monkeypatch, capsys):
    blocks = [(kind, note.split(), text) for kind, note, text in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    assert [kind for kind, *_ in blocks].count("python") == 3
    ran = []
    for kind, note, text in blocks:
        if kind == "python" and note:
            (scratch / note[0]).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif "app" not in note:
            command, *printed = text.strip().splitlines()
            program, *arguments = shlex.split(command.removeprefix("$ "))
            assert program == "core-attn"
            forget_files(monkeypatch)
            if "fails" in note:
                source = (scratch / "efficient.py").read_text(encoding="utf-8")
                (scratch / "efficient.py").write_text(
                    source.replace("memory=Growth.LINEAR,", "memory=Growth.LINEAR, padding=True,")
                )
            status = cli.main(arguments)
            out = capsys.readouterr().out
            assert status == (1 if "fails" in note else 0), out
            for line in printed:
                assert line in out
            if "fails" in note:
                assert "4 padding tokens change the outputs of the real ones" in out
            ran.append(arguments[0])
    assert ran == ["check", "check", "check", "bench"]


def test_every_fact_and_check_is_on_the_page():
    from core_attn import MechanismInfo
    from core_attn.testing import CHECKS

    page = PAGE.read_text(encoding="utf-8")
    identity = {"name", "title", "source", "year"}
    for fact in set(MechanismInfo.__dataclass_fields__) - identity:
        assert f"`{fact}`" in page, f"{fact} is not explained"
    for check in (
        "causal",
        "padding",
        "maps",
        "decoding",
        "determinism",
        "batch",
        "growth_time",
        "backends",
        "inputs",
        "cost",
    ):
        assert check in CHECKS
        assert f"`{check}`" in page


def test_the_readme_runs(capsys):
    text = (PAGE.parents[1] / "packages" / "core_attn" / "README.md").read_text(encoding="utf-8")
    code = [body for kind, _, body in BLOCK.findall(text) if kind == "python"]
    assert len(code) == 11
    exec(compile("\n".join(code), "README.md", "exec"), {})
    assert "3 passed, 0 failed" in capsys.readouterr().out
    for command in re.findall(r"^    core-attn (\w+)", text, re.MULTILINE):
        assert command in cli._parser().get_default("commands")
