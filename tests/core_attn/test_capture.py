"""Reading and editing maps: the result never changes by reading, and no tap outlives its block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import core_attn


class Block(nn.Module):
    """Two mixers, the second used twice."""

    def __init__(self, toy, **options):
        super().__init__()
        self.first = toy(16, heads=2, causal=True, **options)
        self.second = toy(16, heads=4, **options)

    def forward(self, x, context):
        x = x + self.first(x)
        x = x + self.second(x, context=context)
        return x + self.second(x)


@pytest.fixture
def model(toy):
    torch.manual_seed(0)
    return Block(toy)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, 16, generator=generator), torch.randn(3, 5, 16, generator=generator)


def taps(model):
    return [m._tap for m in model.modules() if isinstance(m, core_attn.TokenMixer) and m._tap is not None]


def test_maps_by_name_and_call(model, data):
    plain = model(*data)
    with core_attn.capture(model) as maps:
        assert torch.equal(model(*data), plain)
    assert sorted(maps) == ["first", "second"]
    assert maps["first"].shape == (3, 2, 7, 7)
    assert [tuple(m.shape) for m in maps.calls["second"]] == [(3, 4, 7, 5), (3, 4, 7, 7)]
    assert maps["second"] is maps.calls["second"][-1]
    torch.testing.assert_close(maps["first"].sum(-1), torch.ones(3, 2, 7))
    assert maps["first"].triu(1).count_nonzero() == 0
    assert not maps["first"].requires_grad
    assert not taps(model)


def test_bitwise_in_training_with_dropout_and_gradients(toy, data):
    torch.manual_seed(0)
    model = Block(toy, dropout=0.4).train()

    def train_step():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(*data)
        out.square().sum().backward()
        return [out, *[p.grad.clone() for p in model.parameters()]]

    plain = train_step()
    with core_attn.capture(model):
        read = train_step()
    assert all(torch.equal(a, b) for a, b in zip(plain, read, strict=True))


def test_reading_draws_nothing_from_the_random_state(variant, data):
    def attention_map(self, q, k, *, key_padding_mask, aux):
        return aux * torch.softmax(q @ k.mT, dim=-1) + 0 * torch.rand(())

    random = variant(
        {
            "draw": lambda self, q, k, generator: torch.rand(()),
            "attention_map": attention_map,
            "attend": lambda self, q, k, v, *, key_padding_mask, aux: aux * torch.softmax(q @ k.mT, dim=-1) @ v,
        }
    )
    mixer = random(16, heads=2)
    torch.manual_seed(1)
    plain = [mixer(data[0]), mixer(data[0])]
    torch.manual_seed(1)
    with core_attn.capture(mixer) as maps:
        read = [mixer(data[0]), mixer(data[0])]
    assert torch.equal(plain[1], read[1])
    assert not torch.equal(plain[0], plain[1])
    # The map is of the very draw that the forward used.
    scale = [m.sum(-1).mean() for m in maps.calls[""]]
    torch.manual_seed(1)
    torch.testing.assert_close(torch.stack(scale), torch.stack([torch.rand(()), torch.rand(())]))


def test_nested_and_after_an_exception(model, data):
    with core_attn.capture(model) as outer:
        with core_attn.capture(model.first) as inner:
            model(*data)
        model(*data)
        assert len(taps(model)) == 2
    assert (len(outer.calls["first"]), len(inner.calls[""])) == (2, 1)
    assert not taps(model)

    with pytest.raises(RuntimeError, match="boom"), core_attn.capture(model):
        raise RuntimeError("boom")
    with pytest.raises(ZeroDivisionError), core_attn.edit(model, lambda name, a: 1 / 0):
        model(*data)
    assert not taps(model)


def test_blocks_may_end_in_any_order(model, data):
    first, second = core_attn.capture(model), core_attn.capture(model)
    a, b = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(*data)
    second.__exit__(None, None, None)
    assert not a.calls
    assert len(b) == 2
    assert not taps(model)


def test_edit_weights_and_scores(model, data):
    plain = model(*data)
    with core_attn.edit(model, lambda name, a: a):
        torch.testing.assert_close(model(*data), plain)
    with core_attn.edit(model, lambda name, s: s, stage="scores"):
        torch.testing.assert_close(model(*data), plain)

    def no_head(name, a):
        return torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:]], dim=1) if name == "first" else a

    with core_attn.edit(model, no_head), core_attn.capture(model) as maps:
        edited = model(*data)
    assert not torch.allclose(edited, plain)
    assert maps["first"][:, 0].count_nonzero() == 0, "capture shows the maps that were used"

    # Head 0 silenced by hand: its channels of the output projection read zeros.
    mixer = model.first
    with torch.no_grad():
        mixer.out_proj.weight[:, : mixer.head_dim] = 0
    torch.testing.assert_close(model(*data), edited)


def test_scores_keep_their_masks(model, data):
    with core_attn.edit(model, lambda name, s: s * 0, stage="scores") as skipped, core_attn.capture(model) as maps:
        model.first(data[0])
    assert skipped == {}
    # 0 * -inf is NaN: the edit's own doing, shown as it is and not hidden.
    assert maps["first"].isnan().any()
    with (
        core_attn.edit(model, lambda name, s: torch.where(s.isinf(), s, 0.0), stage="scores"),
        core_attn.capture(model) as maps,
    ):
        model.first(data[0])
    rows = torch.ones(7, 7).tril()
    torch.testing.assert_close(maps["first"][0, 0], rows / rows.sum(-1, keepdim=True))


def test_edits_are_differentiable(toy, data):
    mixer = toy(16, heads=2)
    strength = torch.tensor(0.5, requires_grad=True)
    with core_attn.edit(mixer, lambda name, a: strength * a):
        mixer(data[0]).sum().backward()
    assert strength.grad is not None
    assert mixer.q_proj.weight.grad.abs().sum() > 0


def test_errors(model, variant, data):
    with pytest.raises(ValueError, match="holds no token mixer"), core_attn.capture(nn.Linear(2, 2)):
        pass
    unreadable = variant(maps=False)(16, heads=2)
    with pytest.raises(ValueError, match="toy has no attention map"), core_attn.capture(unreadable):
        pass
    both = nn.ModuleDict({"no": unreadable, "yes": model.first})
    with core_attn.capture(both) as maps:
        both["yes"](data[0])
        both["no"](data[0])
    assert list(maps) == ["yes"]
    assert list(maps.skipped) == ["no"]
    with pytest.raises(KeyError, match="no attention map"):
        maps["no"]
    with pytest.raises(ValueError, match="'weights' or 'scores'"), core_attn.edit(model, lambda n, a: a, stage="rows"):
        pass
    with pytest.raises(ValueError, match="must return a tensor of shape"), core_attn.edit(model, lambda n, a: a[0]):
        model(*data)


def test_mechanism_without_scores(variant, data):
    from core_attn.mechanisms.heads import MultiHeadMixer

    mixer = variant({"attention_scores": MultiHeadMixer.attention_scores})(16, heads=2)
    with pytest.raises(ValueError, match="stage='weights'"), core_attn.edit(mixer, lambda n, a: a, stage="scores"):
        pass


def test_copies_and_compiled_models(toy, data):
    mixer = toy(16, heads=2)
    compiled = torch.compile(nn.Sequential(mixer), backend="eager")
    plain = compiled(data[0])
    with core_attn.capture(compiled) as maps:
        torch.testing.assert_close(compiled(data[0]), plain)
    assert list(maps) == ["0"]
    torch.testing.assert_close(compiled(data[0]), plain)
    assert len(maps.calls["0"]) == 1, "nothing is read once the block has ended"
    assert copy.deepcopy(mixer)._tap is None
    torch.compiler.reset()
