"""A trained model with softmax attention made linear: what distillation gains, and what it leaves as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import core_attn
from core_attn.distillation import (
    attention_distillation_loss,
    attention_divergence,
    convert,
    distill,
    hedgehog_from_softmax,
)
from core_attn.mechanisms.linear.hedgehog import HedgehogAttention
from core_attn.mechanisms.softmax.exact import SoftmaxAttention


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script that docs/benchmarks/distillation.md was made with."""
    path = Path(__file__).parents[2] / "benchmarks" / "distillation.py"
    spec = importlib.util.spec_from_file_location("distillation_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(benchmark: ModuleType) -> tuple[nn.Module, object]:
    """A transformer of two layers that has learned in seconds to name the value of a key."""
    task = benchmark.recall(pairs=6, keys=12)
    torch.manual_seed(0)
    model = task.model()
    benchmark.train(model, task, torch.Generator().manual_seed(0), steps=500)
    model.zero_grad()
    return model, task


def test_distillation_recovers_what_conversion_loses(benchmark: ModuleType, trained: tuple) -> None:
    """On held-out sequences: recall of the task, and how far the attention weights are from the teacher's."""
    teacher, task = trained
    plain, student = convert(teacher), convert(teacher)
    losses = distill(student, teacher, benchmark.batches(task, torch.Generator().manual_seed(1), 150))
    recall = {name: benchmark.score(m, task) for name, m in [("softmax", teacher), ("plain", plain), ("own", student)]}
    apart = {name: benchmark.divergence(m, teacher, task) for name, m in [("plain", plain), ("own", student)]}
    assert recall["softmax"] > 0.98
    assert recall["plain"] < 0.5
    assert recall["own"] > recall["plain"] + 0.7 * (recall["softmax"] - recall["plain"])
    assert apart["own"] < apart["plain"] / 2.5
    assert sum(losses[-10:]) < sum(losses[:10])

    # Every layer is closer, and a map that is trained to nothing in particular is not.
    held_out = [task.test(torch.Generator().manual_seed(2))[:, :-1]]
    near, far = (attention_divergence(m, teacher, held_out) for m in (student, plain))
    assert [*near] == ["blocks.0.mixer", "blocks.1.mixer"]
    assert all(near[name] < far[name] for name in near)
    torch.manual_seed(0)
    at_random = convert(teacher)
    with torch.no_grad():
        for layer in (m for m in at_random.modules() if isinstance(m, HedgehogAttention)):
            layer.q_map.normal_()
            layer.k_map.normal_()
    assert benchmark.divergence(at_random, teacher, task) > apart["plain"] / 2

    # It was made with the teacher's sequences read at once; read token by token it says the same.
    tokens = held_out[0][:4]
    x = student.tokens(tokens) + student.places.weight[: tokens.shape[1]]
    layer = student.blocks[0].mixer
    state, outs = layer.init_state(4), []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            out, state = layer.step(token, state)
            outs.append(out)
        assert (torch.cat(outs, dim=1) - layer(x)).abs().max() < 1e-5


def test_nothing_but_feature_maps_changes(benchmark: ModuleType, trained: tuple) -> None:
    teacher, task = trained
    teacher.blocks[0].train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = convert(teacher)
    start = {k: v.clone() for k, v in student.state_dict().items()}
    distill(student, teacher, benchmark.batches(task, torch.Generator().manual_seed(1), 2))
    changed = {k.rpartition(".")[2] for k, v in student.state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {"q_map", "k_map"}
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if k in before)
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
    assert [teacher.training, teacher.blocks[0].training, teacher.blocks[1].training] == [False, True, False]
    assert not any(m._forward_pre_hooks for m in teacher.modules())
    teacher.eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_projections_of_shared_key_heads_are_repeated(kv_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    teacher = core_attn.build("softmax", dim=16, heads=4, kv_heads=kv_heads, causal=causal, bias=kv_heads > 1).double()
    made = hedgehog_from_softmax(teacher, activation="exp").eval()
    assert isinstance(made, HedgehogAttention)
    assert (made.heads, made.causal, made.q_proj.weight.dtype) == (4, causal, torch.float64)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        a, b = (getattr(m, name)(x).unflatten(-1, (-1, 4)) for m in (made, teacher))
        assert torch.equal(a, b.repeat_interleave(a.shape[2] // b.shape[2], dim=2))
    made(x).sum().backward()
    assert teacher.q_proj.weight.grad is None


def test_the_loss_is_least_where_the_weights_are_equal() -> None:
    """Divergence is the loss less the entropy of the teacher's weights; padding and queries without keys count not."""
    torch.manual_seed(0)
    teacher = core_attn.build("softmax", dim=8, heads=2).double()
    student = hedgehog_from_softmax(teacher)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[0, 4:], real[2] = False, False

    class Both(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, key_padding_mask=real)

    apart = attention_divergence(Both(student), Both(teacher), [x])["layer"]
    loss = attention_distillation_loss(student, teacher, x, key_padding_mask=real).item()
    entropies, divergences = [], []
    for sample, count in ((x[0, :4], 4), (x[1], 7)):
        q, k = (p(sample).unflatten(-1, (2, 4)).transpose(0, 1) for p in (teacher.q_proj, teacher.k_proj))
        right = (q @ k.mT / 2).softmax(-1)
        features = [torch.cat([y.softmax(-1), (-y).softmax(-1)], -1) for y in (q, k)]
        learned = features[0] @ features[1].mT
        learned = learned / learned.sum(-1, keepdim=True)
        assert right.shape == (2, count, count)
        entropies.append(-(right * right.log()).sum(-1).flatten())
        divergences.append((right * (right / learned).log()).sum(-1).flatten())
    assert abs(apart - torch.cat(divergences).mean().item()) < 1e-10
    assert abs(loss - apart - torch.cat(entropies).mean().item()) < 1e-10

    # NaN where padding is changes nothing.
    poisoned = x.masked_fill(~real.unsqueeze(-1), float("nan"))
    same = attention_distillation_loss(student, teacher, poisoned, key_padding_mask=real)
    assert abs(same.item() - loss) < 1e-14
    gradients = torch.autograd.grad(same, [student.q_map, student.k_map])
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_cross_attention_and_models_that_are_called_in_a_way_of_their_own() -> None:
    torch.manual_seed(0)
    teacher = core_attn.build("softmax", dim=8, heads=2)

    def call(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0], context=batch[1])

    data = [(torch.randn(4, 5, 8), 3 * torch.randn(4, 11, 8)) for _ in range(60)]
    student = convert(teacher)
    before = attention_divergence(student, teacher, data, run=call)
    distill(student, teacher, data, run=call)
    after = attention_divergence(student, teacher, data, run=call)
    assert [*before] == [""]
    assert after[""] < 0.7 * before[""]


def test_layers_that_are_shared_stay_shared() -> None:
    layer = core_attn.build("softmax", dim=8, heads=2)
    model = nn.Sequential(layer, nn.GELU(), layer)
    made = convert(model)
    assert made[0] is made[2]
    assert isinstance(made[0], HedgehogAttention)
    assert isinstance(model[0], SoftmaxAttention)
    losses = distill(made, model, [torch.randn(2, 6, 8) for _ in range(3)])
    assert len(losses) == 3


def test_what_cannot_be_converted_is_refused_in_one_sentence() -> None:
    softmax = core_attn.build("softmax", dim=8, heads=2)
    windowed = core_attn.build("softmax", dim=8, heads=2, window=3)
    x = torch.randn(1, 4, 8)
    model, other = nn.Sequential(softmax), nn.Sequential(nn.Linear(8, 8), core_attn.build("flow", dim=8, heads=2))
    causal = hedgehog_from_softmax(core_attn.build("softmax", dim=8, heads=2, causal=True))
    for call, says in (
        (lambda: convert(other), "flow"),
        (lambda: convert(nn.Linear(8, 8)), "Linear"),
        (lambda: convert(nn.Sequential(windowed)), "window"),
        (lambda: hedgehog_from_softmax(core_attn.build("softmax", dim=8, heads=2, scale=1.0)), "scale"),
        (lambda: convert(model, activation="relu"), "relu"),
        (lambda: distill(model, model, [x]), "SoftmaxAttention"),
        (lambda: distill(nn.Linear(8, 8), model, [x]), "nothing"),
        (lambda: distill(convert(model), model, [x], run=lambda m, b: b), "called"),
        (lambda: attention_distillation_loss(causal, softmax, x), "causal"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{says}[^\n]*$"):
            call()
