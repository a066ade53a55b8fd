"""What every model must do: fill-up changes nothing, both strands agree, a carried state gives the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core_attn
from attn_genomics.config import MODELS, BiGLAConfig, CNNConfig, HybriDNAConfig, HyenaDNAConfig
from attn_genomics.models.base import Backbone, Shape
from attn_genomics.models.heads import ClassHead
from attn_genomics.models.network import Classifier, LanguageModel
from attn_genomics.tokens import MASK, N, reverse_complement
from attn_shared.app import load

SMALL: dict[str, tuple[str, Any]] = {
    "cnn": ("cnn", CNNConfig(channels=12, kernel=7, layers=2)),
    "bigla": ("bigla", BiGLAConfig(dim=16, layers=2)),
    "bigla, joined": ("bigla", BiGLAConfig(dim=16, layers=1, pool=4)),
    "bigla, causal": ("bigla", BiGLAConfig(dim=16, layers=2, causal=True)),
    "hyenadna": ("hyenadna", HyenaDNAConfig(d_model=16, n_layer=2, l_max=128)),
    "hybridna": ("hybridna", HybriDNAConfig(dim=16, layers=2, every=2, heads=4, head_dim=8, state=8)),
    "hybridna, window": ("hybridna", HybriDNAConfig(dim=16, layers=2, every=2, head_dim=8, state=8, window=10)),
    "hybridna, echo": ("hybridna", HybriDNAConfig(dim=16, layers=2, every=2, head_dim=8, state=8, echo=True)),
}
CAUSAL = [name for name in SMALL if "causal" in name or name.startswith("h")][:-1]
POOLS = ("mean", "max", "last", "attention", "positional")


def backbone(name: str, **options: Any) -> Backbone:
    torch.manual_seed(1)
    model, config = SMALL[name]
    made: Backbone = load(MODELS[model].target)(config, Shape(length=60), **options)
    return lively(made).eval()


def lively(module: nn.Module) -> Any:
    """Weights so large that what is read from elsewhere shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return module


def classifier(name: str, *, pool: Any = "mean", rc: Any = "none", bins: int = 5, hidden: int = 0) -> Classifier:
    made = backbone(name)
    return Classifier(made, ClassHead(made.width, 3, pool=pool, bins=bins, hidden=hidden, dropout=0.0), rc).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    tokens = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))
    tokens[0, 3] = N
    return tokens


@pytest.mark.parametrize("name", SMALL)
def test_what_fills_up_changes_nothing(name: str) -> None:
    lengths = torch.tensor([37, 60, 1])
    tokens = drawn(3, 60)
    filled = torch.where(torch.arange(60) < lengths[:, None], tokens, N)
    net = classifier(name, pool="positional", rc="equivariant")
    with torch.no_grad():
        together = net(tokens, lengths)  # whatever stands behind a row
        torch.testing.assert_close(net(filled, lengths), together, rtol=0, atol=1e-5)
        alone = torch.cat([net(row[None, :n], n[None]) for row, n in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_heads_do_not_read_what_fills_up(pool: Any) -> None:
    head = ClassHead(4, 3, pool=pool, bins=5, hidden=0, dropout=0.0)
    features, counts = torch.randn(3, 12, 4), torch.tensor([12, 1, 7])
    together = head(features, torch.arange(12) < counts[:, None])
    alone = torch.cat([head(row[None, :n]) for row, n in zip(features, counts, strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, "mean") for name in SMALL), *(("bigla", pool) for pool in POOLS[1:]), ("cnn", "last")]
)
def test_equivariant_classes_are_those_of_the_other_strand(name: str, pool: Any) -> None:
    tokens, lengths = drawn(2, 60), torch.tensor([37, 60])
    net = classifier(name, pool=pool, rc="equivariant", hidden=7)
    with torch.no_grad():
        one, other = net(tokens, lengths), net(reverse_complement(tokens, lengths), lengths)
        plain = classifier(name, pool=pool)
        assert (plain(tokens, lengths) - plain(reverse_complement(tokens, lengths), lengths)).abs().max() > 1e-3
    assert (one - other).abs().max() <= 1e-6
    assert one.std() > 1e-3


def test_average_is_the_mean_of_both_strands() -> None:
    tokens, lengths = drawn(4, 60), torch.tensor([37, 60, 59, 41])
    net, plain = classifier("bigla", rc="average"), classifier("bigla")
    turned = reverse_complement(tokens, lengths)
    expected = (plain(tokens, lengths).softmax(1) + plain(turned, lengths).softmax(1)) / 2
    torch.testing.assert_close(net.probabilities(tokens, lengths), expected)
    torch.testing.assert_close(net.probabilities(turned, lengths), expected)


def test_positions_head_is_the_mean_of_each_part() -> None:
    head = ClassHead(2, 3, pool="positional", bins=3, hidden=0, dropout=0.0)
    features = torch.arange(14.0).view(1, 7, 2)
    parts = [features[0, 0:3], features[0, 2:5], features[0, 4:7]]  # of 7 places: 0 to 2.3, 2.3 to 4.7, 4.7 to 7
    torch.testing.assert_close(head.summary(features, None)[0], torch.cat([part.mean(0) for part in parts]))
    short = head.summary(features, torch.arange(7)[None] < 2)[0]
    torch.testing.assert_close(short, torch.cat([features[0, 0], features[0, :2].mean(0), features[0, 1]]))


@pytest.mark.parametrize("name", SMALL)
def test_causal_models_read_nothing_later(name: str) -> None:
    made = backbone(name)
    tokens = drawn(1, 50)
    later = tokens.clone()
    later[0, 30] = (later[0, 30] + 1) % 4
    with torch.no_grad():
        changed = (made(tokens) - made(later)).abs().amax(-1)[0]
    before = changed[: 30 // made.strides]
    assert made.causal == (name in CAUSAL)
    if made.causal:
        assert before.max() <= 1e-5 < changed[30]
    else:
        assert before.max() > 1e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_a_carried_state_gives_the_same(name: str) -> None:
    model = LanguageModel(backbone(name)).eval()
    assert model.objective == "next"
    assert model.decodes
    # Keys and values of attention without a window grow with what was read, as HyenaDNA's history does.
    assert model.streams == (name in ("bigla, causal", "hybridna, window"))
    tokens = drawn(2, 60)
    with torch.no_grad():
        state, found = model.init_state(2), []
        for piece in tokens.split([1, 20, 1, 1, 37], dim=1):
            scores, state = model.step(piece, state)
            found.append(scores)
        torch.testing.assert_close(torch.cat(found, 1), model.scores(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bigla", "hyenadna", "hybridna"])
def test_recomputing_changes_no_gradient(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = LanguageModel(backbone(name)).train()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        model.backbone.blocks.recompute = recompute  # type: ignore[union-attr]
        model.loss(drawn(2, 40), torch.Generator().manual_seed(3)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# -- the language of genomes ------------------------------------------------------------------------------------------


def test_next_bits_are_the_cross_entropy() -> None:
    model = LanguageModel(backbone("hybridna")).eval()
    tokens, lengths = drawn(2, 40), torch.tensor([40, 25])
    bits = model.bits(tokens, lengths)
    scores = model.scores(tokens)
    expected = F.cross_entropy(scores[:, :-1].transpose(1, 2), tokens[:, 1:].clamp(max=3), reduction="none") / math.log(
        2
    )
    assert bits[0, 0] == 2
    assert bits[0, 3] == 0  # N
    assert (bits[1, 25:] == 0).all()
    torch.testing.assert_close(bits[0, 4:], expected[0, 3:])
    torch.testing.assert_close(bits[1, 1:25], expected[1, :24])
    told = tokens[:, 1:] < N
    torch.testing.assert_close(model.loss(tokens), (expected * told).sum() / told.sum() * math.log(2))


@pytest.mark.parametrize("rc", ["none", "average", "equivariant"])
def test_masked_bits_never_see_the_base_itself(rc: Any) -> None:
    model = LanguageModel(backbone("bigla"), rc=rc).eval()
    assert model.objective == "masked"
    assert model.passes == 7
    tokens = drawn(2, 40, seed=5)
    found = model.log_probabilities(tokens)
    torch.testing.assert_close(found.exp2().sum(-1), torch.ones(2, 40))
    other = tokens.clone()
    other[1, 20] = (other[1, 20] + 1) % 4
    torch.testing.assert_close(model.log_probabilities(other)[1, 20], found[1, 20])
    assert (model.log_probabilities(other)[1, 21] - found[1, 21]).abs().max() > 1e-4
    hidden = tokens.clone()
    hidden[:, 20 % 7 :: 7] = torch.where(tokens[:, 20 % 7 :: 7] < N, MASK, tokens[:, 20 % 7 :: 7])
    if rc == "none":
        told = F.cross_entropy(model.scores(hidden)[:, 20], tokens[:, 20], reduction="none") / math.log(2)
        torch.testing.assert_close(model.bits(tokens)[:, 20], told)


def test_both_strands_of_a_language_model_cost_the_same() -> None:
    tokens, lengths = drawn(3, 40), torch.tensor([40, 29, 33])
    turned = reverse_complement(tokens, lengths)
    masked = LanguageModel(backbone("bigla"), rc="equivariant").eval()
    mask = torch.arange(40) < lengths[:, None]
    one, other = masked.scores(tokens, mask), masked.scores(turned, mask)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(other[row, :n].flip(0, 1), one[row, :n], rtol=0, atol=1e-6)
    following = LanguageModel(backbone("bigla, causal"), rc="average").eval()
    one, other = following.bits(tokens, lengths), following.bits(turned, lengths)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(other[row, :n].flip(0), one[row, :n])


def test_what_is_hidden() -> None:
    model = LanguageModel(backbone("bigla"), mask=0.15)
    tokens = drawn(200, 300)
    tokens[:, ::10] = N
    shown, chosen = model.hide(tokens, torch.Generator().manual_seed(0))
    assert not chosen[tokens == N].any()
    assert torch.equal(shown[~chosen], tokens[~chosen])
    assert abs(chosen[tokens < N].float().mean() - 0.15) < 0.005
    told = shown[chosen]
    assert abs((told == MASK).float().mean() - 0.8) < 0.01
    assert abs((told == tokens[chosen]).float().mean() - 0.125) < 0.01  # left, or replaced by itself
    again = model.hide(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], shown)
    assert model.loss(torch.full((2, 9), N)).item() == 0


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="objective masked"):
        LanguageModel(backbone("bigla"), objective="next")
    with pytest.raises(ValueError, match="no equivariant form"):
        LanguageModel(backbone("hyenadna"), rc="equivariant")
    with pytest.raises(ValueError, match="has strides"):
        LanguageModel(backbone("bigla, joined"))
    with pytest.raises(ValueError, match="at most l_max=128"):
        backbone("hyenadna")(drawn(1, 129))
    with pytest.raises(ValueError, match="carries no state"):
        backbone("bigla").init_state(1)
    with pytest.raises(ValueError, match="1 for a causal model"):
        load(MODELS["bigla"].target)(BiGLAConfig(causal=True, pool=2), Shape(length=9))


# -- other mixers -----------------------------------------------------------------------------------------------------


def mixers(model: str) -> list[str]:
    card = MODELS[model]
    groups = (card.mixer_patterns, *card.mixer_alternatives)
    names = {info.name for group in groups for info in core_attn.list(pattern=group)}
    return sorted(names)


@pytest.mark.parametrize("name", ["bigla", "hyenadna", "hybridna"])
def test_mixers_of_each_sort(name: str) -> None:
    """One that can read both ways, and one that reads back only."""
    assert {"softmax", "gla", "mamba2", "hyena"} <= set(mixers(MODELS[SMALL[name][0]].name))
    tokens, lengths = drawn(2, 60), torch.tensor([60, 23])
    mask = torch.arange(60) < lengths[:, None]
    for mixer in ("softmax", "gla"):
        made = backbone(name, mixer=mixer)
        with torch.no_grad():
            together = made(tokens, mask)
            for row, n in enumerate(lengths.tolist()):
                alone = made(tokens[row : row + 1, :n])[0]
                torch.testing.assert_close(together[row, :n], alone, rtol=0, atol=2e-5, msg=mixer)


def test_a_mixer_of_one_direction_reads_both_ways() -> None:
    made = backbone("bigla", mixer="gla")
    tokens = drawn(1, 50)
    other = tokens.clone()
    other[0, 25] = (other[0, 25] + 1) % 4
    changed = (made(tokens) - made(other)).abs().amax(-1)[0]
    assert changed[:10].min() > 0
    assert changed[40:].min() > 0
