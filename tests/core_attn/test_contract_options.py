"""Mechanisms with other than their default options against the contract."""

from __future__ import annotations

import pytest

from core_attn.testing import check_mechanism


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prob_sparse", {"factor": 1}),
        ("softmax", {"heads": 1}),
        ("flow", {"clamp": False}),
        ("softmax", {"bias": False}),
    ],
)
def test_contract_with_options(name, options):
    check_mechanism(name, only=["shape", "lengths", "batch", "causal", "padding", "maps", "decoding"], **options)


def test_the_papers_selection_leaks_the_future():
    """Informer's decoder ranks all queries together, so the future chooses which past queries attend."""
    report = check_mechanism("prob_sparse", selection="paper", only=["causal"], raise_on_failure=False)
    assert not report.passed
