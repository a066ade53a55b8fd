"""Every second registered mechanism against the contract; the others are in `test_contract_odd.py`.

Two files, so that `pytest -n 2 --dist loadfile` gives each process its half.
"""

from __future__ import annotations

import pytest

from core_attn import registry
from core_attn.testing import check_mechanism


@pytest.mark.parametrize("name", registry.names()[0::2])
def test_contract(name):
    check_mechanism(name)
