"""Names and classes: registered ones, and those in files of the user's own."""

from __future__ import annotations

import pytest

from core_attn import registry
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.naming import UnknownNameError, nearest

FACTS = {
    "title": "A toy",
    "source": "",
    "year": 2020,
    "patterns": frozenset({Pattern.NONCAUSAL_SELF}),
    "time": Growth.LINEAR,
    "memory": Growth.LINEAR,
}

FILE = """
from core_attn.contract import Growth, Pattern, TokenMixer
from core_attn.registry import register

LOADED = []


@register(
    name="{name}", title="A toy", source="", year=2020, patterns=frozenset({{Pattern.NONCAUSAL_SELF}}),
    time=Growth.LINEAR, memory=Growth.LINEAR,
)
class Identity(TokenMixer):
    def __init__(self, dim, *, causal=False, scale=1.0):
        super().__init__(dim, causal=causal)
        self.scale = scale

    def forward(self, x, **call):
        self.check_inputs(x, **call)
        return self.scale * x


class Bare(TokenMixer):
    pass
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    registry.load_all()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my mixers.py"
    path.write_text(FILE.format(name="identity"))
    return path


def test_names_are_sorted_and_complete():
    names = registry.names()
    assert names == sorted(names)
    assert {"softmax", "prob_sparse", "auto_correlation", "flow"} <= set(names)
    assert all(registry.get(name).info.name == name for name in names)


def test_a_name_is_taken_once():
    @registry.register(name="mine", **FACTS)
    class Mine(TokenMixer):
        pass

    with pytest.raises(ValueError, match=r"'mine' is taken by .*Mine; choose another name"):

        @registry.register(name="mine", **FACTS)
        class Other(TokenMixer):
            pass

    assert registry.get("mine") is Mine


def test_a_class_defined_again_replaces_itself():
    def cell():
        @registry.register(name="mine", **FACTS)
        class Mine(TokenMixer):
            pass

        return Mine

    cell()
    again = cell()
    assert registry.get("mine") is again


@pytest.mark.parametrize(("wrong", "right"), [("sofmax", "softmax"), ("Prob-Sparse", "prob_sparse"), ("auto", "auto_")])
def test_mistyped_names(wrong, right):
    with pytest.raises(UnknownNameError, match=f"unknown mechanism '{wrong}'; did you mean '{right}"):
        registry.get(wrong)


def test_nothing_near():
    with pytest.raises(UnknownNameError, match="there are: agent, auto_correlation, "):
        registry.get("zzzz")
    assert nearest("zzzz", ["softmax"]) == []


def test_a_file_of_ones_own(mine):
    import core_attn

    spec = f"{mine}:Identity"
    cls = registry.get(spec)
    assert registry.get(spec) is cls, "one file gives one class, however often it is asked for"
    assert cls.info.name == "identity"
    assert registry.short_name(spec) == "Identity"
    assert registry.short_name("softmax") == "softmax"
    mixer = core_attn.build(spec, dim=4, scale=2.0)
    assert mixer.scale == 2.0
    with pytest.raises(UnknownNameError, match="did you mean 'scale'"):
        core_attn.build(spec, dim=4, scael=2.0)


def test_files_that_will_not_do(mine, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        registry.get(str(tmp_path / "missing.py") + ":Identity")
    with pytest.raises(UnknownNameError, match="did you mean 'Identity'"):
        registry.get(f"{mine}:identity")
    with pytest.raises(ValueError, match=r"Bare .* declares no facts"):
        registry.get(f"{mine}:Bare")
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\n1 / 0\n")
    with pytest.raises(ValueError, match="cannot be imported: ZeroDivisionError: division by zero"):
        registry.get(f"{broken}:X")
    taken = tmp_path / "taken.py"
    taken.write_text(FILE.format(name="flow"))
    with pytest.raises(ValueError, match="name 'flow' is taken"):
        registry.get(f"{taken}:Identity")
    assert registry.get("flow").__module__ == "core_attn.mechanisms.linear.flow"
