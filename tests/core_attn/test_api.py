"""The public face: build, attention, list, describe, explain."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import core_attn
from core_attn import api, registry
from core_attn.naming import UnknownNameError


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, n, 8, generator=generator) for n in (11, 11, 11))


def test_public_names_resolve():
    for name in core_attn.__all__:
        assert getattr(core_attn, name) is not None
    # A submodule of the same name would hide the function once it is imported.
    importlib.import_module("core_attn.maps")
    assert callable(core_attn.capture)
    assert callable(core_attn.edit)
    for name in registry.names():
        function = api.operator_function(registry.get(name).info)
        assert function is None or inspect.isfunction(function), name


def test_build_hands_on_what_it_is_given():
    mixer = core_attn.build("flow", dim=32, heads=4, causal=True, eps=1e-4)
    assert (mixer.dim, mixer.heads, mixer.causal, mixer.eps) == (32, 4, True, 1e-4)
    assert mixer(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    context = torch.randn(2, 9, 32)
    assert core_attn.build("softmax", dim=32, cross=True)(torch.randn(2, 5, 32), context=context).shape == (2, 5, 32)


def test_build_refuses():
    with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
        core_attn.build("sotfmax", dim=8)
    with pytest.raises(UnknownNameError, match="unknown option of prob_sparse 'facter'; did you mean 'factor'"):
        core_attn.build("prob_sparse", dim=8, facter=3)
    with pytest.raises(
        ValueError, match="auto_correlation cannot compute causal self attention; it computes: noncausal"
    ):
        core_attn.build("auto_correlation", dim=8, causal=True)
    with pytest.raises(ValueError, match="flow cannot compute causal cross attention"):
        core_attn.build("flow", dim=8, causal=True, cross=True)
    with pytest.raises(ValueError, match="heads must divide dim"):
        core_attn.build("softmax", dim=10, heads=4)


def test_attention_is_the_operator(qkv):
    q, k, v = qkv
    right = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(core_attn.attention(q, k, v), right)
    torch.testing.assert_close(core_attn.attention(q, k, v, backend="reference"), right)
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    right = torch.softmax((q @ k.mT / 8**0.5).masked_fill(future, float("-inf")), dim=-1) @ v
    torch.testing.assert_close(core_attn.attention(q, k, v, causal=True), right)
    real = torch.arange(11) < torch.tensor([[11], [6]])
    padded = core_attn.attention(q, k, v, key_padding_mask=real)
    torch.testing.assert_close(padded[1:], core_attn.attention(q[1:], k[1:, :, :6], v[1:, :, :6]))


@pytest.mark.parametrize("name", ["flow", "prob_sparse", "auto_correlation"])
def test_attention_of_other_mechanisms(qkv, name):
    function = api.operator_function(registry.get(name).info)
    extra = {"generator": torch.Generator().manual_seed(0)} if name == "prob_sparse" else {}
    again = {"generator": torch.Generator().manual_seed(0)} if name == "prob_sparse" else {}
    assert torch.equal(core_attn.attention(*qkv, mechanism=name, **extra), function(*qkv, **again))


def test_attention_refuses(qkv):
    with pytest.raises(UnknownNameError, match="unknown option of flow_attention 'epsilon'"):
        core_attn.attention(*qkv, mechanism="flow", epsilon=1)
    with pytest.raises(ValueError, match="auto_correlation has no causal form"):
        core_attn.attention(*qkv, mechanism="auto_correlation", causal=True)
    with pytest.raises(ValueError, match="does not support key_padding_mask"):
        core_attn.attention(*qkv, mechanism="auto_correlation", key_padding_mask=torch.ones(2, 11, dtype=torch.bool))
    with pytest.raises(UnknownNameError, match="unknown backend"):
        core_attn.attention(*qkv, backend="refernce")


def names(**filters):
    return [info.name for info in core_attn.list(**filters)]


def test_list_filters():
    assert names() == registry.names()
    assert "auto_correlation" not in names(pattern="causal_self")
    assert "softmax" in names(pattern=["causal_self", "causal_cross"])
    assert set(names(pattern="causal_cross")) <= set(names(pattern="noncausal_cross"))
    assert "flow" in names(constant_state=True)
    assert "softmax" not in names(constant_state=True)
    assert set(names(padding=True)) | set(names(padding=False)) == set(names())
    assert names(grid_rank=7) == []
    with pytest.raises(UnknownNameError, match="did you mean 'causal_self'"):
        core_attn.list(pattern="causal-self")


def test_describe():
    d = core_attn.describe("prob_sparse")
    assert d.info.source == "S83"
    assert d.options["factor"] == 5
    assert d.operator.startswith("prob_sparse_attention(q, k, v, *, ")
    assert d.backends[-1] == "reference"
    text = str(d)
    for part in ("S83, 2021", "noncausal self", "time L log L", "factor=5", "reference", "draws at random"):
        assert part in text
    plain = d.to_dict()
    assert plain["patterns"] == sorted(plain["patterns"])
    assert plain["options"]["factor"] == 5
    for name in registry.names():
        assert registry.get(name).info.title in str(core_attn.describe(name))


def test_explain_in_words():
    e = core_attn.explain("softmax", length=128, causal=True, requires_grad=True, dtype="float64", heads=8, key_heads=2)
    assert e.request.key == (1, 2, 128, 64)
    assert sum(c.chosen for c in e.choices) == 1
    assert e.chosen is not None
    assert all(c.reason for c in e.choices)
    text = str(e)
    assert "float64 on cpu, training, causal" in text
    assert f"{e.chosen} " in text
    assert "RUNS" in text
    assert "cannot" in text, "flash-attn has no float64 and no CPU"


def test_explain_tells_what_then_happens(qkv):
    """The backend it names gives the result of auto, bit for bit."""
    for causal in (False, True):
        chosen = core_attn.explain("softmax", batch=2, heads=4, length=11, head_dim=8, causal=causal).chosen
        auto = core_attn.attention(*qkv, causal=causal)
        assert torch.equal(auto, core_attn.attention(*qkv, causal=causal, backend=chosen))


def test_explain_refuses():
    with pytest.raises(UnknownNameError, match="did you mean 'bias'"):
        core_attn.explain("softmax", length=4, biass=True)
    with pytest.raises(UnknownNameError, match="did you mean 'float32'"):
        core_attn.explain("softmax", length=4, dtype="flaot32")
    with pytest.raises(UnknownNameError, match="unknown mechanism"):
        core_attn.explain("sofmax", length=4)


def test_parameters_follow_kwargs_through_the_bases(toy):
    class Wrapped(toy):
        def __init__(self, *args, window=3, **kwargs):
            super().__init__(*args, **kwargs)

    assert {"dim", "heads", "causal", "dropout", "window"} == set(api.parameters(Wrapped))
    assert "window" not in api.parameters(toy)
