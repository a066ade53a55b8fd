"""joint_attention: groups against definition, definition against a loop and against the official code's numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core_attn.naming import UnknownNameError
from core_attn.ops import joint_attention
from core_attn.testing.harness import worst

GOLDEN = Path(__file__).parents[2] / "golden"


def outcome(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and all gradients, for a loss that treats no two elements alike."""
    q, k, v, lin_q, lin_k = leaves
    out = joint_attention(q, k, v, lin_q=lin_q, lin_k=lin_k, backend=backend, **options)
    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def draw(*shape: int, channels: int, value: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, lin_q, lin_k."""
    widths = (channels, channels, value, channels + 1, channels + 1)
    return [torch.randn(*shape, w, dtype=torch.float64).to(dtype).requires_grad_() for w in widths]


def test_definition_is_the_sum_it_says() -> None:
    """One query at a time, one key at a time."""
    torch.manual_seed(0)
    q, k, v, lin_q, lin_k = draw(1, 1, 7, channels=3, value=2)
    for causal in (False, True):
        out = joint_attention(q, k, v, lin_q=lin_q, lin_k=lin_k, group=3, causal=causal, backend="reference")
        for i in range(7):
            expected = torch.zeros(2, dtype=torch.float64)
            for j in range(7):
                if i // 3 == j // 3 and (j <= i or not causal):
                    expected += max(0.0, (q[0, 0, i] @ k[0, 0, j] / 3).item()) ** 2 * v[0, 0, j]
                if not causal or j // 3 < i // 3:
                    expected += lin_q[0, 0, i] @ lin_k[0, 0, j] * v[0, 0, j] / (3 if causal else 7)
            torch.testing.assert_close(out[0, 0, i], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["whole", "rest", "causal", "masked"])
def test_equals_the_official_code(case: str, dtype: torch.dtype, backend: str) -> None:
    note = json.loads((GOLDEN / "core_joint.json").read_text(encoding="utf-8"))["cases"][case]
    golden = {
        k.split("/", 1)[1]: t for k, t in load_file(GOLDEN / "core_joint.safetensors").items() if k.startswith(case)
    }
    leaves = [golden[name].to(dtype).unsqueeze(1).requires_grad_() for name in ("q", "k", "v", "lin_q", "lin_k")]
    options = {"group": note["group"], "causal": note["causal"]}
    if case == "masked":
        # The official code masks keys, and divides by all tokens.
        options |= {"key_padding_mask": golden["mask"].bool(), "count": torch.full((2,), leaves[0].shape[2])}
    out = joint_attention(*leaves[:3], lin_q=leaves[3], lin_k=leaves[4], backend=backend, **options)
    found = [out, *torch.autograd.grad(out, leaves, golden["dout"].to(dtype).unsqueeze(1))]
    expected = [golden[name].unsqueeze(1) for name in ("out", "dq", "dk", "dv", "dlin_q", "dlin_k")]
    assert worst(found, expected) < (1e-12 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_200_random_draws(causal: bool) -> None:
    """Any sizes, strides, options; sequences without keys; NaN under the mask."""
    for seed in range(100):
        torch.manual_seed(seed)

        def pick(*values: int) -> int:
            return values[int(torch.randint(len(values), ()))]

        batch, heads, length, group = pick(0, 1, 3), pick(1, 2), pick(0, 1, 2, 7, 19, 32, 53), pick(1, 2, 8, 16, 60)
        leaves = draw(batch, heads, length, channels=pick(1, 3, 8), value=pick(1, 4, 6))
        if pick(0, 1):
            leaves = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
        options: dict[str, Any] = {"group": group, "causal": causal}
        if pick(0, 1):
            mask = torch.rand(batch, length) > 0.3
            if batch:
                mask[0] = False
            with torch.no_grad():
                for x in (leaves[1], leaves[2], leaves[4]):
                    x.masked_fill_(~mask[:, None, :, None], torch.nan)
            options["key_padding_mask"] = mask
        if pick(0, 1):
            options["count"] = torch.arange(1, batch + 1)
        expected = outcome("reference", leaves, **options)
        assert not any(x.isnan().any() for x in expected)
        assert worst(outcome("torch", leaves, **options), expected) < 1e-12, (seed, options)
        low = [x.detach().float().requires_grad_() for x in leaves]
        assert worst(outcome("torch", low, **options), expected) < 1e-5, (seed, options)


def test_sequences_without_keys_read_zeros() -> None:
    leaves = draw(2, 1, 9, channels=3, value=4)
    mask = torch.tensor([[False] * 9, [True] * 9])
    for causal, backend in itertools.product((False, True), ("torch", "reference")):
        found = outcome(backend, leaves, group=4, causal=causal, key_padding_mask=mask)
        assert all((x[0] == 0).all() for x in found)
        assert (found[0][1] != 0).any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_drops_weights_of_the_quadratic_part_only(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v, lin_q, lin_k = (x.detach() for x in draw(1, 1, 64, channels=4, value=64))
    v[0, 0] = torch.eye(64)  # so that the output is the map itself
    zero = torch.zeros_like(lin_q)
    whole = joint_attention(q, k, v, lin_q=zero, lin_k=lin_k, group=16, backend=backend)
    torch.manual_seed(1)
    dropped = joint_attention(q, k, v, lin_q=zero, lin_k=lin_k, group=16, dropout=0.25, backend=backend)
    open_ = whole > 0
    gone = (dropped == 0) & open_
    assert 0.15 < gone.sum() / open_.sum() < 0.35
    torch.testing.assert_close(dropped[open_ & ~gone], whole[open_ & ~gone] / 0.75)
    far = joint_attention(zero[..., :4], k, v, lin_q=lin_q, lin_k=lin_k, group=16, dropout=0.25, backend=backend)
    torch.testing.assert_close(far[0, 0], lin_q[0, 0] @ lin_k[0, 0].mT / 64)


def test_dropped_weights_have_the_gradients_of_the_definition() -> None:
    for causal in (False, True):
        leaves, both = draw(2, 2, 21, channels=3, value=4), []
        for backend in ("torch", "reference"):
            torch.manual_seed(2)
            both.append(outcome(backend, leaves, group=8, causal=causal, dropout=0.4))
        assert worst(*both) < 1e-12


def test_opcheck() -> None:
    flat = [x.flatten(0, 1) for x in draw(2, 1, 11, channels=3, value=4)]
    for share in (torch.full((2,), 1 / 11, dtype=torch.float64), None):
        torch.library.opcheck(torch.ops.core_attn.joint_grouped.default, (*flat, share, None, 4))


def test_bad_input_is_one_sentence() -> None:
    q, k, v, lin_q, lin_k = draw(1, 1, 4, channels=2, value=2)
    for options, words in (
        ({"group": 0}, "group must be a positive"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"lin_k": lin_k[..., :1]}, "lin_q and lin_k must have shape"),
        ({"lin_q": lin_q.float(), "lin_k": lin_k.float()}, "q, lin_q and lin_k must have one floating dtype"),
        ({"count": torch.ones(2)}, "count must have shape"),
    ):
        with pytest.raises(ValueError, match=words):
            joint_attention(q, k, v, **{"lin_q": lin_q, "lin_k": lin_k, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its own sequence"):
        joint_attention(q[:, :, :2], k, v, lin_q=lin_q, lin_k=lin_k)
    with pytest.raises(UnknownNameError, match="torch"):
        joint_attention(q, k, v, lin_q=lin_q, lin_k=lin_k, backend="troch")
