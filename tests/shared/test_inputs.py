"""Several inputs, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_shared.errors import UserError
from attn_shared.inputs import one_by_one, refuse


def work(name: str) -> list[Path]:
    if name.startswith("bad"):
        raise UserError(f"{name} is damaged")
    return [Path(name + ".out")]


def test_a_bad_input_is_left_out_and_the_others_are_done(capsys):
    written, failed = one_by_one(["a", "bad1", "b", "bad2"], work, str)
    assert written == [Path("a.out"), Path("b.out")]
    assert failed == {"bad1": "bad1 is damaged", "bad2": "bad2 is damaged"}
    assert capsys.readouterr().err == "left out: bad1 is damaged\nleft out: bad2 is damaged\n"
    with pytest.raises(UserError, match=r"^2 of 4 files could not be read, for the reasons above: bad1, bad2$"):
        refuse(failed, 4, what="files", done="read")


def test_a_single_failure_says_its_own_reason(capsys):
    _, failed = one_by_one(["bad"], work, str)
    assert capsys.readouterr().err == ""  # said once, by the error
    with pytest.raises(UserError, match=r"^bad is damaged$"):
        refuse(failed, 1, what="files", done="read")
    with pytest.raises(UserError, match=r"^bad is damaged; the others are there$"):
        refuse(failed, 2, what="files", done="read", others="the others are there")


def test_nothing_failed_nothing_raised():
    written, failed = one_by_one(["a"], work, str)
    assert written == [Path("a.out")]
    assert failed == {}
    refuse(failed, 1, what="files", done="read")


def test_a_mistake_of_ours_is_not_swallowed():
    def broken(_: str) -> list[Path]:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        one_by_one(["a", "b"], broken, str)
