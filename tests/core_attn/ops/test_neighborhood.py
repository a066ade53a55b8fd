"""Neighbourhood attention: the rule against NATTEN's, the tiles against the definition, and what bad input says."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core_attn.dispatch import BackendError
from core_attn.ops import neighborhood_attention
from core_attn.ops.neighborhood import reference, tiled
from core_attn.testing import growth

DRAWS = 200


def _windows(rng: random.Random, longest: tuple[int, int, int]) -> dict[str, Any]:
    """A grid with sides up to `longest` by rank, and options that fit it."""
    rank = rng.choice([1, 1, 2, 2, 3])
    grid = [rng.randint(1, longest[rank - 1]) for _ in range(rank)]
    dilation = [min(rng.choice([1, 1, 2, 3]), n) for n in grid]
    kernel = [rng.randint(1, n // d) for n, d in zip(grid, dilation)]
    return {
        "grid": grid,
        "kernel_size": kernel,
        "dilation": dilation,
        "stride": [rng.choice([1, rng.randint(1, k)]) for k in kernel],
        "causal": [rng.random() < 0.3 for _ in kernel],
    }


def _strided(x: Tensor, how: int) -> Tensor:
    """The same values in another layout."""
    if how == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    return x


def _difference(got: Tensor, right: Tensor) -> float:
    assert got.shape == right.shape
    assert got.dtype == right.dtype
    if not got.numel():
        return 0.0
    assert got.isfinite().all()
    return ((got - right).abs().max() / right.abs().max().clamp(min=1e-6)).item()


def test_the_rule_equals_natten() -> None:
    functional = pytest.importorskip("natten.functional")
    rng = random.Random(0)
    torch.manual_seed(0)
    seen = 0
    for _ in range(100):
        window = _windows(rng, (40, 12, 6))
        if min(window["kernel_size"]) < 2 or window["kernel_size"] == window["grid"]:
            continue  # NATTEN's smallest window is 2; the largest it hands to a kernel that no CPU has
        seen += 1
        grid = window["grid"]
        q, k, v = (torch.randn(1, *grid, 2, 8) for _ in range(3))
        options = {key: tuple(window[key]) for key in ("kernel_size", "dilation", "stride")}
        function = getattr(functional, f"na{len(grid)}d")
        right = function(q, k, v, **options, is_causal=tuple(window["causal"]), backend="flex-fna")
        q, k, v, right = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v, right))
        for backend in ("torch", "reference"):
            assert _difference(neighborhood_attention(q, k, v, **window, backend=backend), right) <= 1e-5, window
    assert seen > 35


def test_200_random_draws() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    worst = 0.0
    for _ in range(DRAWS):
        window = _windows(rng, (61, 14, 7))
        if rng.random() < 0.03:
            window["grid"][0] = 0
        length = math.prod(window["grid"])
        batch, groups, shared = rng.choice([0, 1, 2]), rng.choice([1, 2]), rng.choice([1, 2, 3])
        width, extra = rng.choice([1, 4, 8]), rng.choice([0, 1, 5])
        value = rng.choice([width, 5])

        def draw(*shape: int, rng: random.Random = rng) -> Tensor:
            return _strided(torch.randn(*shape, dtype=torch.float64), rng.randrange(3)).requires_grad_()

        leaves = {
            "q": draw(batch, groups * shared, length, width),
            "k": draw(batch, groups, length, width),
            "v": draw(batch, groups, length, value),
        }
        if rng.random() < 0.5:
            rpb = torch.randn(groups * shared, *(2 * k - 1 for k in window["kernel_size"]), dtype=torch.float64)
            if rng.random() < 0.3:  # with few offsets, some rows have nothing left to read
                rpb[torch.rand_like(rpb) < 0.4] = -math.inf
            leaves["rpb"] = rpb.requires_grad_()
        if rng.random() < 0.5:
            leaves |= {"extra_k": draw(batch, groups, extra, width), "extra_v": draw(batch, groups, extra, value)}
        found = []
        for backend in ("torch", "reference"):
            out = neighborhood_attention(**leaves, **window, backend=backend)
            weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            gradients = torch.autograd.grad((out * weight).sum(), [*leaves.values()], allow_unused=True)
            found.append([out, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), gradients))])
        scale = max((x.abs().max().item() for x in found[1] if x.numel()), default=1.0)
        for name, got, right in zip(["output", *leaves], *found):
            assert got.shape == right.shape, (name, window)
            assert got.isfinite().all(), (name, window)
            if got.numel():
                worst = max(worst, ((got - right).abs().max() / max(scale, 1.0)).item())
                assert worst <= 1e-12, (name, window)


def test_pieces_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    window: dict[str, Any] = {"grid": (11, 13), "kernel_size": (3, 4), "dilation": (2, 1), "stride": (1, 2)}
    q, k, v = (torch.randn(2, 2, 143, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    found = []
    for scores in (1, 3000, 2**30):
        monkeypatch.setitem(tiled._SCORES, "cpu", scores)
        out = neighborhood_attention(q, k, v, **window, rpb=rpb, backend="torch")
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, rpb))])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_window_as_large_as_the_grid_is_softmax_attention() -> None:
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    got = neighborhood_attention(q, k, v, grid=(5, 6), kernel_size=(5, 6))
    assert _difference(got, F.scaled_dot_product_attention(q, k, v)) <= 1e-12


def test_stride_as_large_as_the_window_is_attention_in_blocks() -> None:
    q, k, v = (torch.randn(1, 2, 36, 8, dtype=torch.float64) for _ in range(3))
    got = neighborhood_attention(q, k, v, grid=(36,), kernel_size=9, stride=9)
    blocks = (x.unflatten(2, (4, 9)) for x in (q, k, v))
    assert _difference(got, F.scaled_dot_product_attention(*blocks).flatten(2, 3)) <= 1e-12


def test_extra_keys_share_the_softmax() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    extra = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(2)]
    got = neighborhood_attention(q, k, v, grid=(3, 3), kernel_size=3, extra_k=extra[0], extra_v=extra[1])
    right = F.scaled_dot_product_attention(q, *(torch.cat(pair, dim=2) for pair in zip((k, v), extra)))
    assert _difference(got, right) <= 1e-12


def test_precision_beside_scaled_dot_product_attention() -> None:
    torch.manual_seed(0)
    window: dict[str, Any] = {"grid": (14, 15), "kernel_size": (7, 5)}
    mask = reference.allowed((14, 15), (7, 5), (1, 1), (1, 1), (False, False))
    exact = [torch.randn(2, 4, 210, 32).to(torch.bfloat16).double().requires_grad_() for _ in range(3)]

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in exact]
        out = function(*leaves)
        return [out.double(), *(g.double() for g in torch.autograd.grad(out.double().square().sum(), leaves))]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, **window, backend="torch")

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    right = run(theirs, torch.float64)
    for a, b in zip(run(ours, torch.float32), right):
        assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5
    for a, b, c in zip(run(ours, torch.bfloat16), run(theirs, torch.bfloat16), right):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


def test_autocast_compile_and_the_operators_registration() -> None:
    window: dict[str, Any] = {"grid": (6, 7), "kernel_size": 3}
    q, k, v = (torch.randn(1, 2, 42, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert neighborhood_attention(q, k, v, **window).dtype is torch.bfloat16

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, **window, backend="torch")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v))
    numbers = ([6, 7], [3, 3], [1, 2], [1, 2], [False, True], 0.5)
    extra = torch.randn(1, 2, 3, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    for options in ((None, None, None), (rpb, extra, extra.detach().clone().requires_grad_())):
        torch.library.opcheck(tiled._op, (q, k, v, *options, *numbers))


def test_memory_is_linear() -> None:
    def peak(side: int) -> int:
        q, k, v = (torch.randn(1, 2, side * side, 16, requires_grad=True) for _ in range(3))

        def step() -> None:
            neighborhood_attention(q, k, v, grid=(side, side), kernel_size=7, backend="torch").sum().backward()

        return growth.count(step).peak_bytes

    assert peak(128) <= 4.2 * peak(64)


def test_no_second_derivative_is_an_error_that_says_so() -> None:
    q = torch.randn(1, 1, 9, 4, requires_grad=True)
    out = neighborhood_attention(q, q, q, grid=(9,), kernel_size=3, backend="torch")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 3, 1, 1)}, "one to three"),
        ({"grid": (4, 3)}, "holds 12 tokens"),
        ({"kernel_size": 4}, "must fit into the grid"),
        ({"kernel_size": 2, "dilation": 2}, "must fit into the grid"),
        ({"kernel_size": (3, 3, 3)}, "each of the 2 axes"),
        ({"kernel_size": 0}, "positive integer"),
        ({"dilation": 0}, "dilation"),
        ({"stride": 4}, "stride must be at most"),
        ({"causal": (True,)}, "causal must be"),
        ({"rpb": torch.zeros(2, 5, 4)}, r"\(2, 5, 5\)"),
        ({"extra_k": torch.zeros(1, 2, 3, 4)}, "belong together"),
        ({"extra_k": torch.zeros(1, 2, 3, 5), "extra_v": torch.zeros(1, 2, 3, 4)}, "do not fit"),
        ({"extra_k": torch.zeros(1, 2, 3, 4).double(), "extra_v": torch.zeros(1, 2, 3, 4)}, "dtype"),
        ({"q": torch.zeros(1, 2, 9, 5)}, "do not fit"),
        ({"q": torch.zeros(2, 9, 4)}, "must have shape"),
        ({"q": torch.zeros(1, 3, 9, 4)}, "must divide"),
        ({"q": torch.zeros(1, 2, 9, 4).double()}, "one floating dtype"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 2, 9, 4)
    call: dict[str, Any] = {"q": q, "k": q, "v": q, "grid": (3, 3), "kernel_size": 3} | change
    with pytest.raises((ValueError, BackendError), match=message) as caught:
        neighborhood_attention(**call)
    assert "\n" not in str(caught.value)
