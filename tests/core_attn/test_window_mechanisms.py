"""Mechanisms made of windows, sinks and groups: against official code, against their definitions, and while decoding.

The golden tensors come from the official code run with the stored weights; the .json files beside them say which.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import core_attn
from core_attn.mechanisms.local.masformer import full_layers
from core_attn.state import MixedCache
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def notes(name: str) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))
    return note


def difference(got: Tensor, right: Tensor) -> float:
    return ((got - right).abs().max() / right.abs().max()).item()


def made(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> core_attn.TokenMixer:
    torch.manual_seed(0)
    return core_attn.build(name, **{"dim": 16, "heads": 4, "causal": True, **options}).to(dtype).eval()


def stream(mixer: core_attn.TokenMixer, x: Tensor, sizes: list[int]) -> Tensor:
    state = mixer.init_state(x.shape[0], dtype=x.dtype)
    return torch.cat([mixer.step(piece, state)[0] for piece in x.split(sizes, dim=1)], dim=1)


# Against the official code


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n in ("streaming", "longlora", "duo") for c in notes(n)["cases"]]
)
def test_official_outputs_and_gradients(name: str, case: str, dtype: torch.dtype) -> None:
    golden = load_file(GOLDEN / f"core_{name}.safetensors")
    names = {"streaming": ("sinks", "window"), "longlora": ("group_size", "wrap"), "duo": ("sinks", "window")}[name]
    facts = notes(name)["cases"][case]
    weights = {k.removeprefix("weights/"): v.to(dtype) for k, v in golden.items() if k.startswith("weights/")}
    heads = {"streaming": 2, "longlora": 4, "duo": 4}[name]
    mixer = made(name, dtype, dim=golden["x"].shape[-1], heads=heads, **{k: facts[k] for k in names if k in facts})
    mixer.load_state_dict(weights)
    if case == "full":
        torch.nn.init.ones_(mixer.gates)
    x = golden["x"].to(dtype).requires_grad_()
    out = mixer(x)
    leaves = {"x": x} | dict(mixer.named_parameters())
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    kind = f"{case}/{str(dtype).removeprefix('torch.')}"
    assert difference(out, golden[f"{kind}/output"]) <= TOLERANCE[dtype]
    compared = [n for n in leaves if f"{kind}/grad.{n}" in golden]
    assert len(compared) == {"gated": 1, "full": 0}.get(case, 9)
    if compared:
        flat = [
            torch.cat([g.flatten() for g in side])
            for side in zip(*((found[n], golden[f"{kind}/grad.{n}"]) for n in compared))
        ]
        assert difference(*flat) <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", notes("streaming")["cases"])
def test_steps_through_the_rolling_cache_are_the_official_ones(case: str) -> None:
    golden = load_file(GOLDEN / "core_streaming.safetensors")
    facts = notes("streaming")["cases"][case]
    mixer = made("streaming", dim=8, heads=2, sinks=facts["sinks"], window=facts["window"])
    mixer.load_state_dict({k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")})
    for sizes in (facts["chunks"], [1] * 24, [5, 1, 11, 7]):
        assert difference(stream(mixer, golden["x"], sizes), golden[f"{case}/float64/output"]) <= 1e-12


# Streaming


@pytest.mark.parametrize(("sinks", "window"), [(4, 6), (0, 3), (1, 1), (3, 40)])
def test_streaming_is_the_rolling_cache_recomputed(sinks: int, window: int) -> None:
    """A list of tokens with the middle struck out, each rotated by its place in the list, one query at a time."""
    mixer = made("streaming", sinks=sinks, window=window, dim=12, heads=2)
    x = torch.randn(1, 33, 12, dtype=torch.float64)

    def rotated(u: Tensor, place: int) -> list[float]:
        half = u.shape[0] // 2
        angles = [place * 10000 ** (-i / half) for i in range(half)]
        a, b = u[:half].tolist(), u[half:].tolist()
        turned = [c * math.cos(t) - d * math.sin(t) for c, d, t in zip(a, b, angles)]
        return turned + [c * math.sin(t) + d * math.cos(t) for c, d, t in zip(a, b, angles)]

    with torch.no_grad():
        q, k, v = (mixer.split_heads(p(x))[0] for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = torch.zeros(2, 33, 6, dtype=torch.float64)
        for h in range(2):
            cache: list[int] = []
            for i in range(33):
                cache.append(i)
                if len(cache) > sinks + window:
                    del cache[sinks]
                query = rotated(q[h, i], len(cache) - 1)
                scores = [
                    sum(a * b for a, b in zip(query, rotated(k[h, j], place))) / math.sqrt(6)
                    for place, j in enumerate(cache)
                ]
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
                heads[h, i] = weights @ v[h, cache]
        expected = mixer.out_proj(mixer.merge_heads(heads[None]))
        assert difference(mixer(x), expected) <= 1e-12
        for sizes in ([1] * 33, [1, 5, 2, 17, 8], [30, 1, 1, 1], [33]):
            assert difference(stream(mixer, x, sizes), expected) <= 1e-12


def test_streaming_of_thousands_of_tokens_takes_the_same_bytes_and_stays_right() -> None:
    mixer = made("streaming", torch.float32, dim=8, heads=2, sinks=4, window=16)
    x = torch.randn(1, 2000, 8)
    state = mixer.init_state(1)
    sizes, outs = [], []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            out, state = mixer.step(token, state)
            outs.append(out)
            sizes.append(state.nbytes)
        whole = mixer(x)
    assert len(set(sizes[20:])) == 1
    assert sizes[-1] <= 2 * 4 * 8 * 2 * (16 + 4 + 12)  # keys and values, float32, twice the window, sinks with room
    assert difference(torch.cat(outs, dim=1), whole) <= 1e-3  # float32 angles of positions in the thousands
    exact = made("streaming", dim=8, heads=2, sinks=4, window=16)
    with torch.no_grad():
        assert difference(torch.cat(outs, dim=1).double(), exact(x.double())) <= 1e-5


def test_streaming_options() -> None:
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    plain = made("streaming", rotary=False, sinks=0, window=7)
    softmax = made("softmax", window=7)
    softmax.load_state_dict(plain.state_dict())
    assert difference(plain(x), softmax(x)) <= 1e-12
    # Without anything forgotten it is softmax attention with rotary positions, whatever is a sink.
    assert difference(made("streaming", window=64, sinks=0)(x), made("streaming", window=64, sinks=9)(x)) <= 1e-12
    odd = made("streaming", dim=12, heads=4, window=3, sinks=1)
    assert odd(x[..., :12]).isfinite().all()
    for options, message in (
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"base": 0.0}, "base must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            made("streaming", **options)


# Long Short-attention and MASFormer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("short", [0, 1, 4])
def test_ls_against_a_dense_mask(causal: bool, short: int) -> None:
    mixer = made("ls", causal=causal, window=5, short_heads=short)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    context = torch.randn(2, 41, 16, dtype=torch.float64)
    for source in (x, context):
        q, k, v = (
            mixer.split_heads(p(y)) for p, y in ((mixer.q_proj, x), (mixer.k_proj, source), (mixer.v_proj, source))
        )
        scores = q @ k.mT / 2.0
        distance = torch.arange(source.shape[1]) - (torch.arange(30)[:, None] + source.shape[1] - 30)
        keep = torch.ones(4, 30, source.shape[1], dtype=torch.bool)
        keep[:short] &= distance.abs() < 5
        if causal:
            keep &= distance <= 0
        weights = scores.masked_fill(~keep, -math.inf).softmax(-1)
        expected = mixer.out_proj(mixer.merge_heads(weights @ v))
        found = mixer(x) if source is x else mixer(x, context=context)
        assert difference(found, expected) <= 1e-12


def test_ls_state_of_short_heads_does_not_grow() -> None:
    mixer = made("ls", window=4, short_heads=3)
    state = mixer.init_state(1)
    with torch.no_grad():
        for token in torch.randn(1, 200, 16, dtype=torch.float64).split(1, dim=1):
            mixer.step(token, state)
    short, long = (cache for _, cache in state.parts)
    assert len(short) == 3
    assert short.keys.shape[1] == 3
    assert len(long) == 200
    assert long.keys.shape[1] == 1
    with pytest.raises(ValueError, match="short_heads must lie between 0 and heads = 4, got 5"):
        made("ls", short_heads=5)


def test_masformer_is_softmax_attention_with_or_without_a_window() -> None:
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    for full in (False, True):
        mixer, softmax = made("masformer", window=6, full=full), made("softmax", window=None if full else 6)
        softmax.load_state_dict(mixer.state_dict())
        assert difference(mixer(x), softmax(x)) <= 1e-12
        assert difference(stream(mixer, x, [9, 1, 1, 29]), mixer(x)) <= 1e-12
    check_mechanism("masformer", full=True, only=["decoding", "maps", "causal", "padding", "lengths"])


def test_full_layers() -> None:
    assert full_layers(6, 2) == (False, True, False, False, True, False)
    assert full_layers(4, 1, where="first") == (True, False, False, False)
    assert full_layers(4, 2, where="last") == (False, False, True, True)
    for depth in range(1, 9):
        for full in range(depth + 1):
            assert sum(full_layers(depth, full)) == full
    for depth, full in ((3, 4), (3, -1)):
        with pytest.raises(ValueError, match="full must lie between 0 and depth"):
            full_layers(depth, full)
    with pytest.raises(ValueError, match="where is 'first', 'last' or 'spread', got 'middle'"):
        full_layers(3, 1, where="middle")


# LongLoRA


def groups_of(length: int, size: int, shift: int, wrap: bool) -> list[list[int]]:
    """Tokens of each group in the order causality follows: a padded sequence, cut up by hand."""
    padded = -(-length // size) * size
    places = [*range(shift, padded), *range(shift)] if wrap else [*range(-shift, padded + shift)]
    cut = [places[i : i + size] for i in range(0, len(places), size)]
    return [kept for group in cut if (kept := [t for t in group if 0 <= t < length])]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8, 13, 24, 30])
def test_longlora_is_attention_inside_its_groups(length: int, causal: bool, wrap: bool) -> None:
    mixer = made("longlora", group_size=8, wrap=wrap, causal=causal)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    q, k, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    heads = torch.zeros_like(q)
    for half, shift in ((slice(0, 2), 0), (slice(2, 4), 4)):
        for group in groups_of(length, 8, shift, wrap and shift > 0):
            for place, i in enumerate(group):
                read = group[: place + 1] if causal else group
                weights = (q[:, half, i : i + 1] @ k[:, half, read].mT / 2.0).softmax(-1)
                heads[:, half, i : i + 1] = weights @ v[:, half, read]
    expected = mixer.out_proj(mixer.merge_heads(heads))
    assert difference(mixer(x), expected) <= 1e-12


def test_the_papers_roll_leaks_the_future_and_the_default_does_not() -> None:
    x = torch.randn(2, 32, 16, dtype=torch.float64)
    future = torch.cat([x[:, :28], torch.randn(2, 4, 16, dtype=torch.float64)], dim=1)
    for wrap in (False, True):
        mixer = made("longlora", group_size=8, wrap=wrap)
        changed = (mixer(x) - mixer(future)).abs().amax(dim=(0, 2)) > 0
        assert changed[:4].all().item() is wrap  # the first half group
        assert not changed[4:28].any()
        assert changed[28:].all()
    with pytest.raises(ValueError, match="cannot decode with wrap=True: the first tokens would read the last"):
        made("longlora", wrap=True).init_state(1)


def test_longlora_reads_everything_in_eval_mode_where_asked() -> None:
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    mixer, softmax = made("longlora", group_size=8, full_in_eval=True), made("softmax")
    softmax.load_state_dict(mixer.state_dict())
    assert difference(mixer(x), softmax(x)) <= 1e-12
    assert difference(stream(mixer, x, [9, 1, 20]), softmax(x)) <= 1e-12
    assert difference(mixer.train()(x), made("longlora", group_size=8)(x)) <= 1e-12
    with pytest.raises(ValueError, match="group_size must be even and at least 2, got 7"):
        made("longlora", group_size=7)


# DuoAttention


def test_duo_prunes_heads_by_their_gates() -> None:
    mixer = made("duo", window=5, sinks=2)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.gates.copy_(torch.tensor([0.1, 0.7, 0.5, 1.2]))
    before = mixer(x)
    assert mixer.prune(0.5) is mixer
    assert mixer.retrieval == (1, 3)
    assert mixer.gates.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert not mixer.gates.requires_grad
    after = mixer(x)
    assert difference(after, before) > 1e-2
    fresh = made("duo", window=5, sinks=2)
    fresh.load_state_dict(mixer.state_dict())
    assert difference(fresh(x), after) <= 1e-12
    assert difference(fresh.prune()(x), after) <= 1e-12
    with core_attn.capture(mixer) as maps:
        mixer(x)
    near = maps[""][:, [0, 2]]
    assert (near > 0).sum(-1).amax() == 7
    assert (maps[""][:, [1, 3], -1] > 0).all()


@pytest.mark.parametrize("gates", [[0.0, 1.0, 0.0, 1.0], [1.0] * 4, [0.0] * 4], ids=str)
def test_duo_decodes_with_heads_mixed(gates: list[float]) -> None:
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    mixer = made("duo", window=5, sinks=2)
    with torch.no_grad():
        mixer.gates.copy_(torch.tensor(gates))
        before = mixer.init_state(2, dtype=torch.float64)
        expected = mixer(x)
        mixer.prune()
        assert difference(mixer(x), expected) <= 1e-12
        for sizes in ([1] * 40, [1, 7, 1, 1, 30], [40]):
            assert difference(stream(mixer, x, sizes), expected) <= 1e-12
        state = mixer.init_state(2, dtype=torch.float64)
        mixer.step(x, state)
        assert isinstance(state, MixedCache)
        held = {len(cache) for _, cache in state.parts}
        assert held == {40 if gate else 6 for gate in gates}
        with pytest.raises(ValueError, match="made before prune"):
            mixer.step(x, before)


def test_duo_gates_learn_which_head_must_see_far() -> None:
    """The first token is repeated at the end: heads that may stream lose their gates, and the task keeps some."""
    torch.manual_seed(0)
    mixer = core_attn.build("duo", dim=16, heads=4, causal=True, window=3, sinks=0)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)
    for _ in range(150):
        x = torch.randn(32, 12, 16)
        x[:, :, 0] = 0.0
        x[:, 2, 0] = 6.0  # a mark by which the token can be found
        loss = (mixer(x)[:, -1] - x[:, 2]).square().mean() + 0.3 * mixer.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gates = mixer.gates.detach().clamp(0, 1)
    assert gates.max() > 0.5
    assert gates.min() < 0.5
    assert 0 < len(mixer.prune().retrieval) < 4


# The contract, with options small enough to matter


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("streaming", {"window": 5, "sinks": 2}),
        ("streaming", {"window": 3, "sinks": 0, "rotary": False}),
        ("ls", {"window": 4, "short_heads": 1}),
        ("masformer", {"window": 4}),
        ("longlora", {"group_size": 6}),
        ("duo", {"window": 4, "sinks": 2}),
    ],
    ids=str,
)
def test_contract_of_small_options(name: str, options: dict[str, Any]) -> None:
    checks = ["lengths", "empty_batch", "strides", "causal", "padding", "precision", "maps", "decoding"]
    check_mechanism(name, only=checks, **options)
