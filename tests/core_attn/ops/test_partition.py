"""window_cross_attention: the form by windows against the definition, the definition against a loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core_attn.ops import softmax_attention, window_cross_attention
from core_attn.ops.partition import Windows, reference, tiled
from core_attn.testing.harness import worst


def inputs(
    windows: Windows, *, batch: int = 2, heads: int = 2, channels: int = 4, value: int = 3, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, windows.queries, channels),
        (batch, heads, windows.keys, channels),
        (batch, heads, windows.keys, value),
        (heads, *windows.offsets),
    )
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def outcome(backend: str, leaves: list[Tensor], windows: Windows, **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    out = window_cross_attention(
        *leaves[:3],
        grid=windows.grid,
        window=windows.window,
        factor=windows.factor,
        shift=windows.shift,
        rpb=leaves[3] if len(leaves) > 3 else None,
        backend=backend,
        **options,
    )
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def test_definition_is_the_sum_it_says() -> None:
    """One query at a time, windows by their borders, in Python floats."""
    windows = Windows.of((5, 7), (2, 3), (1, 2), (1, 0))
    q, k, v, rpb = inputs(windows, batch=1, heads=1)
    out = window_cross_attention(
        q, k, v, grid=(5, 7), window=(2, 3), factor=(1, 2), shift=(1, 0), rpb=rpb, scale=0.7, backend="reference"
    )
    rows, columns = [range(0, 1), range(1, 3), range(3, 5)], [range(0, 3), range(3, 4)]
    for i, j in itertools.product(range(5), range(7)):
        mine = [
            (a, b)
            for r, c in itertools.product(rows, columns)
            if i in r and j // 2 in c
            for a, b in itertools.product(r, c)
        ]
        scores = [
            0.7 * sum(x * y for x, y in zip(q[0, 0, 7 * i + j].tolist(), k[0, 0, 4 * a + b].tolist()))
            + rpb[0, i - a + 1, j - 2 * b + 4].item()
            for a, b in mine
        ]
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        for d in range(3):
            expected = sum(w * v[0, 0, 4 * a + b, d].item() for w, (a, b) in zip(weights, mine))
            assert out[0, 0, 7 * i + j, d].item() == pytest.approx(expected, abs=1e-13)


def test_200_random_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of any rank and size, windows, factors, shifts, chunks; queries without keys; NaN under the mask."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: Any, g: torch.Generator = g) -> Any:
            return values[int(torch.randint(len(values), (), generator=g))]

        rank = pick(1, 2, 3)
        sizes = {1: (0, 1, 5, 13, 20), 2: (1, 3, 7, 9), 3: (1, 2, 5, 6)}[rank]
        grid = [pick(*sizes) for _ in range(rank)]
        window, factor = ([pick(1, 2, 3, 5) for _ in range(rank)] for _ in range(2))
        factor = [min(f, 3) for f in factor]
        windows = Windows.of(grid, window, factor, [pick(*range(w)) for w in window])
        monkeypatch.setitem(tiled._SCORES, "cpu", pick(1, 50, 2**18))
        few = pick(0, 2**24)
        monkeypatch.setattr(tiled, "_KEPT_IN_ALL", few)
        monkeypatch.setattr(tiled, "_KEPT", min(few, 4))
        leaves = inputs(windows, batch=pick(0, 1, 3), heads=pick(1, 3), value=pick(1, 4), seed=seed)
        leaves = leaves[: pick(3, 4, 4)]
        if pick(False, True):  # tokens before heads, as projections leave them, and every second channel
            leaves[:3] = [
                x.detach().repeat_interleave(2, -1).transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
                for x in leaves[:3]
            ]
            for x in leaves[:3]:
                x.requires_grad_()
        options: dict[str, Any] = {"scale": pick(None, 2.0)}
        if pick(False, False, True):
            mask = torch.rand(leaves[1].shape[0], windows.keys, generator=g) > 0.4
            if mask.shape[0] > 1:
                mask[0] = False
            options["key_padding_mask"] = mask
        expected = outcome("reference", leaves, windows, **options)
        low = [x.detach().float().requires_grad_() for x in leaves]
        assert worst(outcome("torch", low, windows, **options), expected) < 1e-5, seed
        if "key_padding_mask" in options:
            with torch.no_grad():
                for x in leaves[1:3]:
                    x.masked_fill_(~options["key_padding_mask"][:, None, :, None], math.nan)
        found = outcome("torch", leaves, windows, **options)
        assert all(x.isfinite().all() for x in (*found, *expected)), seed
        assert worst(found, expected) < 1e-12, seed
        scores = reference.scores(
            *(torch.zeros_like(x) for x in leaves[:2]), windows=windows, rpb=None, key_padding_mask=None, scale=1.0
        )
        assert (scores == 0).sum() == scores.shape[0] * scores.shape[1] * windows.pairs, seed


def test_one_window_is_softmax_attention() -> None:
    windows = Windows.of((4, 6), 9, 2)
    q, k, v, _ = inputs(windows)
    found = window_cross_attention(q, k, v, grid=(4, 6), window=9, factor=2)
    torch.testing.assert_close(found, softmax_attention(q, k, v), rtol=0, atol=1e-12)


def test_queries_without_keys_are_zero_with_zero_gradients() -> None:
    windows = Windows.of((6,), 2, 1, 1)  # keys 0 | 1 2 | 3 4 | 5
    leaves = inputs(windows)
    mask = torch.tensor([[True, False, False, True, True, True], [False] * 6])
    for backend in ("torch", "reference"):
        out, dq, dk, dv, _ = outcome(backend, leaves, windows, key_padding_mask=mask)
        assert out[0, :, 1:3].abs().max() == dq[0, :, 1:3].abs().max() == 0
        assert out[0, :, 3:].abs().min() > 0
        assert dk[~mask[:, None].expand(2, 2, 6)].abs().max() == dv[1].abs().max() == 0


def test_bfloat16_no_worse_than_twice_torch() -> None:
    """Where one window is everything, torch's softmax attention in bfloat16 is the measure."""
    windows = Windows.of((7, 9), 9)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs(windows, channels=32, value=32)[:3]]
    exact = [x.detach().double().requires_grad_() for x in low]
    plain, right = (torch.nn.functional.scaled_dot_product_attention(*x) for x in (low, exact))
    probe = torch.sin(torch.arange(right.numel(), dtype=torch.float64)).view(right.shape)
    theirs = [plain, *torch.autograd.grad(plain, low, probe.bfloat16())]
    rights = [right, *torch.autograd.grad(right, exact, probe)]
    found = zip(outcome("torch", low, windows), outcome("reference", exact, windows), theirs, rights)
    for ours, wanted, other, best in found:
        error = (other.double() - best).norm() / best.norm()
        assert (ours.double() - wanted).norm() / wanted.norm() <= 2 * error


def test_operator_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile and torch.export rely on them."""
    windows = Windows.of((5,), 2, 1, 1)
    q, k, v, rpb = (x.float().detach().requires_grad_() for x in inputs(windows))
    own, other = windows.groups(q.device) or (None, None)
    given = [windows.cut(x, keys=True).detach().requires_grad_() for x in (q, k, v)]
    bias = windows.bias(rpb).detach().requires_grad_()
    torch.library.opcheck(tiled._op._opoverload, (True, *given, bias, own, other, False, 0.5))
    torch.library.opcheck(tiled._op._opoverload, (False, *given, None, None, None, False, 0.5))
    out = window_cross_attention(q, k, v, grid=(5,), window=2)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": (2, 2, 2, 2)}, "1 to 3 axes"),
        ({"grid": (5, 5)}, "takes 25 queries"),
        ({"window": (2, 2, 2)}, "one for each axis"),
        ({"window": 0}, "must be positive"),
        ({"shift": 2}, "shift < window"),
        ({"factor": 2}, "takes 12 queries, 4 keys"),
        ({"rpb": torch.randn(2, 3, 4)}, r"rpb must be floating point of shape \(2, 3, 3\)"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], says: str) -> None:
    q, k, v, _ = inputs(Windows.of((3, 4), 2))
    with pytest.raises(ValueError, match=says) as caught:
        window_cross_attention(q, k, v, **{"grid": (3, 4), "window": 2, **change})
    assert "\n" not in str(caught.value)
