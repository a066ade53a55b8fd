"""profiling.py: known amounts of memory and work are found, and nothing is left changed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attn_shared.profiling import MIB, Cost, count_flops, machine, measure_cost, measure_costs, peak_memory, samples_of


def test_peak_memory_counts_what_is_held_at_once() -> None:
    with peak_memory() as peak:
        a = torch.zeros(MIB // 4)  # 1 MiB
        b = torch.zeros(2 * MIB // 4)
        del a
        c = torch.zeros(3 * MIB // 4)
        del b, c
        torch.zeros(4 * MIB // 4)
    assert peak.megabytes == 5.0  # b and c


def test_peak_memory_sees_inside_operators() -> None:
    """What an operator allocates and frees inside itself counts: here the copy a product of transposed views makes."""
    x = torch.randn(64, 128, 128)
    with peak_memory() as peak:
        torch.einsum("bij,bkj->ik", x, x)
    assert peak.bytes > 2 * x.numel() * 4


def test_peak_memory_of_a_backward_pass_is_exact() -> None:
    x = torch.randn(256, 1024, requires_grad=True)
    with peak_memory() as peak:
        (x * 2).exp().sum().backward()
    size = x.numel() * 4
    # Forward: x * 2 and its exp. Backward: the result of exp and a gradient, then that gradient and the next.
    assert 2 * size <= peak.bytes <= 2 * size + 4096


def test_flops_of_known_operations() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == (2 * 3 * 5 * 7, ())
    q = torch.randn(2, 4, 16, 8)
    # Two products of L x L x D a head, also where they are fused.
    expected = 2 * (2 * 4 * 16 * 16 * 8) * 2
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))[0] == expected
    assert count_flops(lambda: (q @ q.mT).softmax(-1) @ q)[0] == expected


@pytest.mark.parametrize("n", [64, 96])
def test_flops_of_fourier_transforms(n: int) -> None:
    x = torch.randn(10, n)
    real = round(2.5 * 10 * n * math.log2(n))
    assert count_flops(lambda: torch.fft.rfft(x))[0] == real
    spectrum = torch.fft.rfft(x)
    assert count_flops(lambda: torch.fft.irfft(spectrum, n=n))[0] == pytest.approx(real, abs=1)
    assert count_flops(lambda: torch.fft.fft(x.to(torch.complex64)))[0] == pytest.approx(2 * real, abs=1)


def test_flops_name_operators_they_do_not_know() -> None:
    @torch.library.custom_op("attn_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert count_flops(lambda: twice(torch.ones(3))) == (0, ("attn_test.twice",))


def test_cost_of_a_model(world: Any) -> None:
    config = world.config()
    task, bundle = world.task(config)
    cost = measure_cost(task, bundle, config, seconds=0.2)
    assert cost.parameters == sum(p.numel() for p in task.model.parameters())
    assert cost.flops > 2 * 12 * 4 * 16  # at least the first layer
    assert cost.uncounted == ()
    assert (cost.batch_size, cost.eval_batch_size) == (32, 64)
    assert cost.train_samples_per_s is not None
    assert cost.train_samples_per_s > 0
    assert cost.latency_ms > 0
    assert cost.eval_samples_per_s > 0
    assert cost.device == "cpu"
    weights_and_gradients = 2 * 4 * cost.parameters / MIB
    assert cost.peak_memory_mb > weights_and_gradients
    assert Cost(**json.loads(json.dumps(dataclasses.asdict(cost)))).flops == cost.flops


def test_memory_grows_with_the_batch(world: Any) -> None:
    costs = []
    for batch in (16, 128):
        config = world.config()
        config.trainer.batch_size = batch
        costs.append(measure_cost(*world.task(config), config, seconds=0.0))
    assert costs[1].peak_memory_mb > 4 * costs[0].peak_memory_mb
    assert costs[1].flops == costs[0].flops


def test_nothing_is_changed(world: Any) -> None:
    config = world.config()
    task, bundle = world.task(config)
    task.train()
    task.net.norm.eval()
    task.net.out.weight.grad = grad = torch.full_like(task.net.out.weight, 3.0)
    state = {k: v.clone() for k, v in task.state_dict().items()}
    kept = {k: v.data_ptr() for k, v in task.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    measure_cost(task, bundle, config, seconds=0.0)
    after = task.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert {k: v.data_ptr() for k, v in after.items()} == kept
    assert task.net.out.weight.grad is grad
    assert torch.equal(grad, torch.full_like(grad, 3.0))
    assert task.net.inward.weight.grad is None
    assert task.training
    assert task.net.dropout.training
    assert not task.net.norm.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002


def test_restored_after_an_error(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config()
    first, second = world.task(config), world.task(config)
    first[0].train()
    monkeypatch.setattr(second[0].net, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_costs([(*first, config), (*second, config)], seconds=0.0)
    assert first[0].training
    assert int(first[0].net.norm.num_batches_tracked) == 0


def test_rules_have_nothing_to_train(world: Any) -> None:
    config = world.config(model="zero")
    cost = measure_cost(*world.task(config), config, seconds=0.0)
    assert (cost.parameters, cost.flops, cost.train_samples_per_s) == (0, 0, None)
    assert cost.peak_memory_mb > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(world: Any, precision: str) -> None:
    config = world.config()
    config.trainer.precision = precision
    task, bundle = world.task(config)
    if precision == "64-true":
        task.double()
    cost = measure_cost(task, bundle, config, seconds=0.0)
    plain = measure_cost(*world.task(world.config()), world.config(), seconds=0.0)
    assert (cost.peak_memory_mb > 1.5 * plain.peak_memory_mb) == (precision == "64-true")


def test_samples_of() -> None:
    assert samples_of({"name": "x", "x": torch.zeros(7, 2)}) == 7
    assert samples_of([["a"], torch.zeros(3)]) == 3
    with pytest.raises(ValueError, match="no tensor"):
        samples_of({"a": 1})


def test_machine_names_what_a_timing_depends_on() -> None:
    facts = machine()
    assert {"date", "processor", "cores", "threads", "python", "torch", "core-attn", "attn-shared"} <= set(facts)
    assert all(facts.values())
