"""channel_attention: the form on channels-last tokens against the definition, the definition against a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.ops import channel_attention
from core_attn.testing.harness import worst


def inputs(length: int, *, batch: int = 2, heads: int = 3, channels: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, n) for n in [channels] * 3] + [(heads,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = channel_attention(*leaves[:3], temperature=leaves[3], backend=backend, **options)
    if "key_padding_mask" in options:  # what stands at padding means nothing
        out = out.masked_fill(~options["key_padding_mask"][:, None, :, None], 0.0)
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def test_definition_is_the_sum_it_says() -> None:
    """One channel, one token at a time, in Python floats."""
    q, k, v, temperature = inputs(3, batch=1, heads=1)
    out = channel_attention(q, k, v, temperature=temperature, backend="reference")

    def unit(x: Tensor) -> list[float]:
        norm = math.sqrt(sum(y * y for y in x.tolist()))
        return [y / norm for y in x.tolist()]

    for d in range(5):
        scores = [
            temperature.item() * sum(a * b for a, b in zip(unit(q[0, 0, :, d]), unit(k[0, 0, :, e]))) for e in range(5)
        ]
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        for token in range(3):
            expected = sum(w * v[0, 0, token, e].item() for e, w in enumerate(weights))
            assert out[0, 0, token, d].item() == pytest.approx(expected, abs=1e-13)


def test_200_random_draws() -> None:
    """Any sizes, strides; samples that are all padding; NaN under the mask."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        leaves = inputs(
            pick(0, 1, 2, 7, 19, 53),
            batch=pick(0, 1, 3),
            heads=pick(1, 2, 6),
            channels=pick(1, 3, 8),
            seed=seed,
        )
        if pick(False, True):
            leaves[:3] = [
                x.detach().repeat_interleave(2, -1).transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
                for x in leaves[:3]
            ]
            for x in leaves[:3]:
                x.requires_grad_()
        options: dict[str, Any] = {}
        if pick(False, True):
            mask = torch.rand(leaves[1].shape[0], leaves[1].shape[2], generator=g) > 0.4
            if mask.shape[0] > 1:
                mask[0] = False
            options["key_padding_mask"] = mask
        expected = outcome("reference", leaves, **options)
        if options:
            with torch.no_grad():
                for x in leaves[:3]:
                    x.masked_fill_(~options["key_padding_mask"][:, None, :, None], float("nan"))
        found = outcome("torch", leaves, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-12, seed


def test_float32_and_bfloat16() -> None:
    """bfloat16 against torch's softmax attention in bfloat16, over as many channels and tokens."""
    leaves = inputs(64, channels=64)
    expected = outcome("reference", leaves)
    assert worst(outcome("torch", [x.detach().float().requires_grad_() for x in leaves]), expected) < 1e-5
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in low]
    right = torch.nn.functional.scaled_dot_product_attention(*exact[:3])
    error = (torch.nn.functional.scaled_dot_product_attention(*low[:3]).double() - right).norm() / right.norm()
    ours, wanted = outcome("torch", low)[0], outcome("reference", exact)[0]
    assert (ours.double() - wanted).norm() / wanted.norm() <= 2 * error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.randn(2, 3, 5, 5)}, "of one shape"),
        ({"v": torch.randn(2, 3, 6, 4)}, "of one shape"),
        ({"temperature": torch.ones(2)}, "one number a head"),
        ({"key_padding_mask": torch.ones(2, 6)}, "must be boolean"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    q, k, v, temperature = (x.float() for x in inputs(6))
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "temperature": temperature, **change}
    with pytest.raises(ValueError, match=says) as caught:
        channel_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert "\n" not in str(caught.value)
