"""Gated attention pooling against the official ACMIL, its definition, and what it owes to bags of different sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from core_attn.mechanisms.pooling.gated import GatedAttentionPooling, top_instances

STORED = load_file(Path(__file__).parents[1] / "golden" / "core_acmil.safetensors")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = {"attention_V.0": "value", "attention_U.0": "gate", "attention_weights": "score"}


def difference(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


def official(dtype: torch.dtype) -> tuple[GatedAttentionPooling, dict[str, Tensor]]:
    """Our pooling with the official weights, and the weights of the layers around it."""
    weights = {k.removeprefix("weight."): v.to(dtype) for k, v in STORED.items() if k.startswith("weight.")}
    pooling = GatedAttentionPooling(8, hidden=6, branches=3, top=10).to(dtype)
    pooling.load_state_dict(
        {
            f"{ours}.{kind}": weights[f"attention.{theirs}.{kind}"]
            for theirs, ours in NAMES.items()
            for kind in ("weight", "bias")
        }
    )
    return pooling, weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", ["eval", "train", "train_small"])
def test_outputs_and_gradients_are_the_official_ones(mode: str, dtype: torch.dtype) -> None:
    """Evaluation, and masked training with the same random draw, of a large bag and one smaller than the top 10."""
    pooling, w = official(dtype)
    pooling.train(mode != "eval")
    x = STORED["small" if mode == "train_small" else "x"].to(dtype).requires_grad_()
    kind = f"{mode}/{str(dtype).removeprefix('torch.')}"
    pooled = pooling(F.linear(x, w["dimreduction.fc1.weight"]).relu(), generator=torch.Generator().manual_seed(7))
    heads = [
        F.linear(pooled.features[:, i], w[f"classifier.{i}.fc.weight"], w[f"classifier.{i}.fc.bias"]) for i in range(3)
    ]
    slide = F.linear(pooled.bag, w["Slide_classifier.fc.weight"], w["Slide_classifier.fc.bias"])
    assert difference(torch.stack([h[0] for h in heads]), STORED[f"{kind}/branches"]) <= TOLERANCE[dtype]
    assert difference(slide, STORED[f"{kind}/slide"]) <= TOLERANCE[dtype]
    right = STORED[f"{kind}/scores"]
    masked = right < -1e8
    assert torch.equal(pooled.scores == -math.inf, masked)
    assert masked.sum() == {"eval": 0, "train": 3 * 6, "train_small": 3 * 3}[mode]
    assert difference(pooled.scores[~masked], right[~masked]) <= TOLERANCE[dtype]
    probe = torch.arange(right.numel(), dtype=dtype).view_as(right).cos()
    loss = torch.stack(heads).sin().sum() + 2 * slide.cos().sum() + (pooled.weights * probe).sum()
    leaves = {"x": x, **dict(pooling.named_parameters())}
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    assert difference(found["x"], STORED[f"{kind}/grad.x"]) <= TOLERANCE[dtype]
    for theirs, ours in NAMES.items():
        for part in ("weight", "bias"):
            gradient = STORED[f"{kind}/grad.attention.{theirs}.{part}"]
            assert difference(found[f"{ours}.{part}"], gradient) <= TOLERANCE[dtype], ours


def test_definition_is_the_sum_it_says() -> None:
    """One branch of one bag, instance by instance, in Python floats."""
    torch.manual_seed(0)
    pooling = GatedAttentionPooling(3, hidden=2, branches=2).double()
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    pooled = pooling(x)
    for k in range(2):
        scores = []
        for n in range(4):
            value, gate = (
                [
                    sum(a * b for a, b in zip(r, x[0, n].tolist())) + c
                    for r, c in zip(f.weight.tolist(), f.bias.tolist())
                ]
                for f in (pooling.value, pooling.gate)
            )
            gated = [math.tanh(a) / (1 + math.exp(-b)) for a, b in zip(value, gate)]
            scores.append(
                sum(a * b for a, b in zip(pooling.score.weight[k].tolist(), gated)) + pooling.score.bias[k].item()
            )
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        for c in range(3):
            expected = sum(w * x[0, n, c].item() for n, w in enumerate(weights))
            assert pooled.features[0, k, c].item() == pytest.approx(expected, abs=1e-13)
    assert difference(pooled.bag, pooled.weights.mean(1, keepdim=True).matmul(x)[:, 0]) < 1e-13


def test_200_random_draws_of_ragged_bags() -> None:
    """A padded bag gives what it gives alone, outputs and gradients, whatever stands under the mask."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        torch.manual_seed(seed)
        pooling = GatedAttentionPooling(5, hidden=4, branches=pick(1, 3), top=pick(0, 10)).double()
        pooling.train(pick(False, True))
        batch, size = pick(1, 2, 4), pick(1, 2, 7, 23)
        mask = torch.rand(batch, size, generator=g) > pick(0.0, 0.3, 0.6)
        x = torch.randn(batch, size, 5, generator=g, dtype=torch.float64)
        if pick(False, True):
            x = x.mT.contiguous().mT
        training = pooling.training and pooling.top
        dirty = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
        pooled = pooling(dirty, mask=mask, generator=g)
        (gradient,) = torch.autograd.grad(pooled.features.sin().sum() + pooled.bag.cos().sum(), dirty)
        assert all(t.isfinite().all() for t in (pooled.features, pooled.bag, pooled.weights, gradient))
        assert pooled.weights[~mask[:, None].expand_as(pooled.weights)].count_nonzero() == 0
        assert gradient[~mask].count_nonzero() == 0
        for i in range(batch):
            real = mask[i]
            if not real.any():
                assert pooled.features[i].count_nonzero() == 0
                continue
            dropped = (pooled.scores[i] == -math.inf)[:, real]
            count = min(10, int(real.sum()))
            assert (dropped.sum(-1) == (int(count * 0.6) if training else 0)).all()
            if training:
                continue
            alone = x[i : i + 1, real].clone().requires_grad_()
            expected = pooling(alone)
            (right,) = torch.autograd.grad(expected.features.sin().sum() + expected.bag.cos().sum(), alone)
            assert difference(pooled.features[i], expected.features[0]) < 1e-12
            assert difference(gradient[i, real], right[0]) < 1e-12


def test_masked_are_among_the_highest_and_each_is_drawn() -> None:
    scores = torch.randn(1, 1, 40)
    highest = set(scores[0, 0].topk(10).indices.tolist())
    times = torch.zeros(40)
    for seed in range(300):
        masked = top_instances(scores, 10, 0.6, generator=torch.Generator().manual_seed(seed))
        assert masked.sum() == 6
        times += masked[0, 0]
    assert set(times.nonzero().flatten().tolist()) == highest
    assert ((times[list(highest)] - 180).abs() < 40).all()  # 0.6 of 300, four deviations


def test_compiles() -> None:
    pooling = GatedAttentionPooling(6, branches=2, top=4)
    x, mask = torch.randn(3, 9, 6), torch.rand(3, 9) > 0.3
    for training in (False, True):
        compiled = torch.compile(pooling.train(training), backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        found = compiled(x, mask=mask)
        torch.manual_seed(0)
        assert torch.allclose(found.weights.sum(-1), pooling(x, mask=mask).weights.sum(-1))


@pytest.mark.parametrize(
    ("options", "call", "says"),
    [
        ({"branches": 0}, {}, "must be positive"),
        ({"drop": 1.0}, {}, r"lie in \[0, 1\)"),
        ({}, {"x": torch.randn(9, 6)}, "instances"),
        ({}, {"mask": torch.ones(3, 9)}, "must be boolean"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], call: dict[str, Any], says: str) -> None:
    given = {"x": torch.randn(3, 9, 6), **call}
    with pytest.raises(ValueError, match=says) as caught:
        GatedAttentionPooling(6, **options)(given.pop("x"), **given)
    assert "\n" not in str(caught.value)
