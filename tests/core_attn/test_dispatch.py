"""The choice of a backend: order, reasons, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core_attn import dispatch
from core_attn.dispatch import Backend, BackendError, Operator, Request
from core_attn.naming import UnknownNameError


def plus(n: int):
    def run(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, dropout: float = 0.0) -> Tensor:
        return q + n

    return run


@pytest.fixture
def operator() -> Iterator[Operator]:
    made = Operator(
        "toy_attention",
        [
            Backend("narrow", plus(1), lambda r: "heads wider than 4" if r.query[-1] > 4 else None),
            Backend("costly", plus(2), pass_over=lambda r: "not worth it when causal" if r.causal else None),
            Backend("plain", plus(3), lambda r: "it has no dropout" if r.dropout else None),
        ],
    )
    yield made
    del dispatch._OPERATORS["toy_attention"]


def tensors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(1, 2, 3, channels) for _ in range(3))


@pytest.mark.parametrize(
    ("channels", "causal", "dropout", "expected"),
    [
        (4, False, 0.0, "narrow"),
        (8, False, 0.0, "costly"),
        (8, True, 0.0, "plain"),
        (8, True, 0.5, "costly"),  # the one that runs, although passed over
    ],
)
def test_auto_takes_the_first_that_runs_and_is_worth_it(operator, channels, causal, dropout, expected):
    q, k, v = tensors(channels)
    number = {"narrow": 1, "costly": 2, "plain": 3}[expected]
    assert operator(q, k, v, causal=causal, dropout=dropout).unique().item() == number
    choices = operator.explain(Request.of(q, k, v, causal=causal, dropout=dropout))
    assert [c.backend for c in choices] == ["narrow", "costly", "plain"]
    assert [c.backend for c in choices if c.chosen] == [expected]


def test_explain_says_why_each_other_does_not_run(operator):
    q, k, v = tensors(8)
    narrow, costly, plain = operator.explain(Request.of(q, k, v, causal=True))
    assert (narrow.runs, narrow.reason) == (False, "heads wider than 4")
    assert (costly.runs, costly.reason) == (True, "not worth it when causal")
    assert plain.chosen
    _, costly, plain = operator.explain(Request.of(q, k, v))
    assert costly.chosen
    assert plain.reason == "slower than costly for these inputs"


def test_a_backend_asked_for_runs_though_auto_would_pass_it_over(operator):
    assert operator(*tensors(4), causal=True, backend="costly").unique().item() == 2


def test_a_backend_that_cannot_run_is_an_error_with_the_reason_and_the_others(operator):
    with pytest.raises(
        BackendError, match=r"'narrow' of toy_attention cannot run.*wider than 4.*would run: costly, plain"
    ):
        operator(*tensors(8), backend="narrow")
    assert issubclass(BackendError, ValueError)


def test_no_backend_at_all_names_every_reason():
    only = Operator(
        "toy_dead", [Backend("a", plus(1), lambda r: "too small"), Backend("b", plus(2), lambda r: "too big")]
    )
    try:
        with pytest.raises(BackendError, match=r"a: too small; b: too big"):
            only(*tensors(4))
        assert not any(c.chosen or c.runs for c in only.explain(Request.of(*tensors(4))))
        with pytest.raises(BackendError, match="no other backend would run either"):
            only(*tensors(4), backend="a")
    finally:
        del dispatch._OPERATORS["toy_dead"]


def test_unknown_backend_is_answered_with_the_nearest(operator):
    with pytest.raises(UnknownNameError, match=r"unknown backend of toy_attention 'plane'; did you mean 'plain'"):
        operator(*tensors(4), backend="plane")


def test_two_backends_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two backends of one name"):
        Operator("toy_twice", [Backend("a", plus(1)), Backend("a", plus(2))])
    assert "toy_twice" not in dispatch._OPERATORS


def test_request_holds_the_facts_of_a_call():
    q = torch.zeros(2, 4, 5, 8, dtype=torch.bfloat16)
    k = torch.zeros(2, 2, 7, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(5, 7, requires_grad=True)
    request = Request.of(q, k, k, bias=bias, mask=torch.ones(5, 7) > 0, window=(3, None), dropout=0.1, extra=3)
    assert (request.query, request.key, request.value) == ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    assert (request.dtype, request.device, request.grouped) == (torch.bfloat16, "cpu", True)
    assert request.requires_grad
    assert request.bias
    assert request.bias_requires_grad
    assert request.mask
    assert not request.key_padding
    assert (request.window, request.dropout, request.options) == ((3, None), 0.1, {"extra": 3})
    with torch.no_grad():
        request = Request.of(q, k, k, bias=bias)
    assert not request.requires_grad
    assert not request.bias_requires_grad


def test_dispatch_is_traced_away_in_one_graph(operator):
    def call(q: Tensor) -> Tensor:
        return operator(q, q, q, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    q = torch.zeros(1, 2, 3, 8)
    torch.testing.assert_close(compiled(q), call(q))


def test_every_operator_is_found_by_name():
    found = dispatch.operators()
    assert "softmax_attention" in found
    assert list(found) == sorted(found)
    assert dispatch.operator("softmax_attention") is found["softmax_attention"]
    for operator in found.values():
        assert "reference" in [b.name for b in operator.backends], f"{operator.name} has no definition to compare with"
    with pytest.raises(UnknownNameError, match="did you mean 'softmax_attention'"):
        dispatch.operator("softmax_atention")
