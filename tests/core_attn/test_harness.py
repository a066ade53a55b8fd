"""What the checks measure errors with."""

from __future__ import annotations

import pytest
import torch

from core_attn.testing.harness import Broken, error_of, worst

ZERO, RIGHT = torch.zeros(3), torch.tensor([0.5, -4.0, 2.0])


def test_errors_are_relative_to_the_largest_value_down_to_the_floor() -> None:
    assert error_of(RIGHT + torch.tensor([0.0, 0.0, 1.0]), RIGHT) == 0.25
    assert error_of(ZERO + 1e-9, ZERO) == pytest.approx(1e-3)
    assert error_of(ZERO + 1e-9, ZERO, floor=1.0) == pytest.approx(1e-9)
    assert error_of(torch.empty(0), torch.empty(0)) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_worst_is_found_wherever_it_stands(place: int, value: float) -> None:
    found = [RIGHT.clone() for _ in range(3)]
    assert worst(found, [RIGHT] * 3) == 0
    found[place][1] -= 0.5
    assert worst(found, [RIGHT] * 3) == 0.125
    found[place][0] = value
    assert worst(found, [RIGHT] * 3) == float("inf")
    assert worst([RIGHT] * 3, found) == float("inf")


def test_small_answers_are_not_magnified() -> None:
    assert worst([ZERO + 1e-9], [ZERO]) == pytest.approx(1e-9)
    assert worst([], []) == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(Broken, match="shapes differ"):
        worst([RIGHT], [RIGHT[:2]])
    with pytest.raises(ValueError, match="longer"):
        worst([RIGHT], [RIGHT, RIGHT])
