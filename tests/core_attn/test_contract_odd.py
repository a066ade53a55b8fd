"""Every second registered mechanism against the contract; the others are in `test_contract_even.py`."""

from __future__ import annotations

import pytest

from core_attn import registry
from core_attn.testing import check_mechanism


@pytest.mark.parametrize("name", registry.names()[1::2])
def test_contract(name):
    check_mechanism(name)
