"""MossFormer's attention as a mechanism: its options. What it must keep by default is tested over the registry."""

from __future__ import annotations

import pytest
import torch

import core_attn
from core_attn.testing import check_mechanism

# What an option can change.
CHECKED = ["lengths", "causal", "padding", "backends", "maps"]


@pytest.mark.parametrize(
    "options", [{"group": 5, "expansion": 2}, {"rotary_channels": 0, "heads": 1, "dropout": 0.3}], ids=str
)
def test_contract_with_options(options: dict[str, float]) -> None:
    check_mechanism("joint", only=CHECKED, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
def test_every_token_is_reached_though_groups_are_small(causal: bool) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("joint", dim=8, heads=2, group=4, causal=causal).double()
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 12].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()


def test_bad_options_are_one_sentence() -> None:
    for options, words in (
        ({"heads": 3}, "heads must divide dim"),
        ({"group": 0}, "group must be a positive"),
        ({"expansion": 0}, "expansion must be a positive"),
        ({"rotary_channels": 3}, "even number of channels"),
        ({"dropout": 1.0}, "dropout must lie"),
    ):
        with pytest.raises(ValueError, match=words):
            core_attn.build("joint", dim=8, **{"heads": 2, **options})
