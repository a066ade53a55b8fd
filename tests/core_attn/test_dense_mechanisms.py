"""Mechanisms with a map over all pairs: against the papers' code, other libraries and the papers' equations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import core_attn
from core_attn.mechanisms.softmax.complex_vector import ComplexVectorAttention
from core_attn.mechanisms.softmax.entropy_scaling import EntropyScalingAttention
from core_attn.mechanisms.softmax.latent import LatentAttention
from core_attn.ops import softmax_attention
from core_attn.positions.rotary import rotary
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = ("relative", "complex_vector", "clipped_softmax", "gated", "temperature")


def _cases(name: str) -> dict[str, Any]:
    cases: dict[str, Any] = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))["cases"]
    return cases


def _options(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    if name == "relative":
        return {"causal": True, "max_distance": facts["distances"] - 1, "shared": True}
    return {k: v for k, v in facts.items() if k not in ("length", "alpha")}


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in NAMES for case in _cases(name)])
def test_outputs_and_gradients_of_the_other_code(name: str, case: str, dtype: torch.dtype, backend: str) -> None:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}
    mixer = core_attn.build(name, dim=8, heads=2, backend=backend, **_options(name, _cases(name)[case])).to(dtype)
    mixer.load_state_dict({k: v.to(dtype) for k, v in golden.items() if "/" not in k and k != "x"})
    x = golden["x"].to(dtype).requires_grad_()
    out = mixer(x)
    weight = torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)
    leaves = {"x": x} | dict(mixer.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    kind = str(dtype).removeprefix("torch.")
    found = {"output": out} | {f"grad.{k}": g for k, g in zip(leaves, gradients, strict=True)}
    for what, got in found.items():
        right = golden[f"{kind}/{what}"]
        assert got.shape == right.shape
        assert _difference(got, right) <= TOLERANCE[dtype], what


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relative", {"max_distance": 3, "shared": True}),
        ("relative", {"max_distance": 0}),
        ("clipped_softmax", {"gamma": -0.1, "zeta": 1.2}),
        ("gated", {"gate": "mlp", "gate_init": None}),
        ("gated", {"gate": "all_heads"}),
        ("temperature", {"kv_heads": 1, "window": 5}),
        ("entropy_scaling", {"train_length": 7}),
        ("mla", {"query_latent": 6, "latent": 5, "rope": 4, "bias": True}),
        ("mla", {"rope": 0, "norm": False}),
    ],
    ids=str,
)
def test_contract_of_options(name: str, options: dict[str, Any]) -> None:
    check_mechanism(name, only=["lengths", "causal", "padding", "precision", "maps", "decoding", "cost"], **options)


# Relative attention


def test_relative_embeddings_have_a_sign_unless_causal() -> None:
    """A table that rewards the token right after the query, and nothing else."""
    mixer = core_attn.build("relative", dim=4, heads=1, max_distance=2)
    with torch.no_grad():
        mixer.k_proj.weight.zero_()
        mixer.q_proj.weight.zero_()
        for p in (mixer.q_proj, mixer.k_proj):
            p.bias.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]) if p is mixer.q_proj else torch.zeros(4))
        mixer.relative.zero_()
        mixer.relative[0, 2 - 1, 0] = 1.0  # distance -1: the key comes after the query
    with core_attn.capture(mixer) as maps:
        mixer(torch.randn(1, 5, 4))
    torch.testing.assert_close(maps[""][0, 0, :4], torch.eye(5)[1:], rtol=0, atol=1e-6)


# Clipped softmax and gates


def test_clipped_rows_are_not_normalised_again() -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("clipped_softmax", dim=8, heads=2, gamma=-0.03, zeta=1.0)
    with core_attn.capture(mixer) as maps:
        mixer(3 * torch.randn(2, 20, 8))
    weights = maps[""]
    assert (weights == 0).float().mean() > 0.1
    assert weights.sum(-1).max() < 1.0
    assert weights.sum(-1).mean() < 0.9


def test_a_head_that_gives_nothing_learns_nothing_and_one_sure_head_gives_all() -> None:
    mixer = core_attn.build("clipped_softmax", dim=8, heads=2, gamma=-0.1, zeta=1.1).double()
    with torch.no_grad():
        mixer.q_proj.weight.zero_()
        mixer.q_proj.bias.zero_()
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    out = mixer(x)
    torch.testing.assert_close(out, mixer.out_proj.bias.expand_as(out), rtol=0, atol=0)
    out.square().sum().backward()
    assert mixer.v_proj.weight.grad is not None
    assert mixer.v_proj.weight.grad.count_nonzero() == 0
    one = mixer(x[:, :1])
    torch.testing.assert_close(one, mixer.out_proj(mixer.v_proj(x[:, :1])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_heads"])
def test_gates_open_as_they_are_told_to(gate: str) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("gated", dim=16, heads=2, gate=gate, gate_init=0.25).double()
    plain = core_attn.build("softmax", dim=16, heads=2).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("gate")})
    with torch.no_grad():
        for name, p in mixer.gate.named_parameters():
            if name.endswith("weight"):
                p.zero_()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = 0.25 * (plain(x) - plain.out_proj.bias) + plain.out_proj.bias
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-7)  # the bias was set in float32


def test_every_head_has_its_own_gate_and_sees_its_own_channels() -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("gated", dim=8, heads=2)
    x = torch.randn(1, 5, 8)
    other = x.clone()
    other[..., 4:] += 1.0
    gates = [
        mixer.side_input(x, x, x=t, query_padding_mask=None, grid=None, generator=None)[0, :, :, 0] for t in (x, other)
    ]
    assert torch.equal(gates[0][0], gates[1][0])
    assert (gates[0][1] != gates[1][1]).all()


# Complex vectors


def _complex_by_definition(mixer: ComplexVectorAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Every angle of every pair: L × M × D of them."""
    source = x if context is None else context
    q, k, v = (
        p(t).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
        for p, t in ((mixer.q_proj, x), (mixer.k_proj, source), (mixer.v_proj, source))
    )
    half = mixer.head_dim // 2
    zq, zk = (torch.complex(t[..., :half], t[..., half:]) for t in (q, k))
    m = torch.arange(x.shape[1]) + source.shape[1] - x.shape[1]
    distance = (m[:, None] - torch.arange(source.shape[1])).double()
    rate = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / mixer.head_dim)
    angle = zq.angle()[:, :, :, None] - zk.angle()[:, :, None]
    angle = mixer.delta[:, None, None] * angle + mixer.phase[:, None, None] + distance[..., None] * rate
    magnitude = [(t.real**2 + t.imag**2 + 1e-9).sqrt() for t in (zq, zk)]
    scores = (magnitude[0][:, :, :, None] * magnitude[1][:, :, None] * angle.cos()).sum(-1)
    if mixer.causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    return mixer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context", [None, 17])
def test_complex_vectors_by_definition(causal: bool, context: int | None) -> None:
    torch.manual_seed(0)
    mixer = ComplexVectorAttention(12, heads=3, causal=causal, bias=True).double()
    nn.init.normal_(mixer.phase)
    x = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, context, 12, dtype=torch.float64) if context else None
    found, expected = mixer(x, context=y), _complex_by_definition(mixer, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    leaves = [x, *mixer.parameters()]
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (found, expected)), strict=True):
        assert _difference(a, b) <= 1e-12


def test_complex_vectors_that_do_not_adapt_are_rotary() -> None:
    torch.manual_seed(0)
    mixer = ComplexVectorAttention(16, heads=2, causal=True, scale=8**-0.5).double()
    nn.init.ones_(mixer.delta)
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    positions = torch.arange(9)
    expected = softmax_attention(rotary(q, positions), rotary(k, positions), v, causal=True)
    found = mixer.attend(q, k, v, key_padding_mask=None, aux=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # 1e-9 under the square root of each magnitude


def test_complex_vectors_keep_their_angles_far_from_the_start() -> None:
    """The scores depend on distances only, in float32 too: a token at 100,000 sees what one at 0 sees."""
    torch.manual_seed(0)
    mixer = ComplexVectorAttention(16, heads=2)
    q, k = torch.randn(2, 1, 2, 5, 8)
    near, far = (mixer.turned(q, at, mixer.phase) @ mixer.turned(k, at).mT for at in (0, 100_000))
    torch.testing.assert_close(far, near, rtol=0, atol=2e-5)


def test_complex_vectors_of_nothing_have_gradients() -> None:
    mixer = ComplexVectorAttention(8, heads=2)
    for value in (0.0, 1e-30):
        x = torch.full((1, 3, 8), value, requires_grad=True)
        mixer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


# Latent attention


def _deepseek(version: int, query_latent: int | None, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """transformers' module and ours with the same weights."""
    if version == 2:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs
        from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as Config

        made = theirs.DeepseekV2Attention
    else:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as Config

        made = theirs.DeepseekV3Attention
    config = Config(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=query_latent,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        attention_bias=bias,
        attn_implementation="sdpa",
    )
    twin = made(config, 0)
    if dtype is torch.float64:  # their own norms compute in float32 whatever the dtype
        twin.kv_a_layernorm = nn.RMSNorm(10, eps=1e-6)
        if query_latent is not None:
            twin.q_a_layernorm = nn.RMSNorm(query_latent, eps=1e-6)
    twin.to(dtype)
    for p in twin.parameters():
        nn.init.normal_(p, std=0.3)
    mixer = LatentAttention(24, heads=3, causal=True, bias=bias, latent=10, query_latent=query_latent, rope=4).to(dtype)
    state = dict(twin.state_dict())
    up = state["kv_b_proj.weight"].unflatten(0, (3, 16))
    found = {
        "k_proj.weight": up[:, :8].flatten(0, 1),
        "v_proj.weight": up[:, 8:].flatten(0, 1),
        "norm.weight": state["kv_a_layernorm.weight"],
        "down_proj.weight": state["kv_a_proj_with_mqa.weight"],
        "out_proj.weight": state["o_proj.weight"],
    }
    if bias:
        found |= {"down_proj.bias": state["kv_a_proj_with_mqa.bias"], "out_proj.bias": state["o_proj.bias"]}
    if query_latent is None:
        found["q_proj.weight"] = state["q_proj.weight"]
    else:
        found |= {
            "q_proj.0.weight": state["q_a_proj.weight"],
            "q_proj.1.weight": state["q_a_layernorm.weight"],
            "q_proj.2.weight": state["q_b_proj.weight"],
        }
        if bias:
            found["q_proj.0.bias"] = state["q_a_proj.bias"]
    mixer.load_state_dict(found)
    return twin, mixer


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("query_latent", [None, 6])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_transformers_deepseek(version: int, query_latent: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    twin, mixer = _deepseek(version, query_latent, bias=version == 3, dtype=dtype)
    x = torch.randn(2, 13, 24, dtype=dtype, requires_grad=True)
    angle = torch.arange(13, dtype=dtype)[:, None] * 10000.0 ** (-torch.arange(0, 4, 2, dtype=dtype) / 4)
    if version == 2:
        embedding: Any = torch.polar(torch.ones_like(angle), angle)[None]
    else:
        embedding = tuple(f(torch.cat([angle, angle], dim=-1))[None] for f in (torch.cos, torch.sin))
    future = torch.full((13, 13), -torch.inf, dtype=dtype).triu(1)[None, None]
    expected = twin(x, attention_mask=future, position_embeddings=embedding)[0]
    found = mixer(x)
    # Version 2 turns its queries and keys in float32 whatever their dtype.
    allowed = 1e-5 if version == 2 else TOLERANCE[dtype]
    assert _difference(found, expected) <= allowed
    pairs = [(x, x), (twin.o_proj.weight, mixer.out_proj.weight), (twin.kv_a_layernorm.weight, mixer.norm.weight)]
    pairs.append((twin.kv_a_proj_with_mqa.weight, mixer.down_proj.weight))
    theirs = torch.autograd.grad(expected.sin().sum(), [a for a, _ in pairs])
    ours = torch.autograd.grad(found.sin().sum(), [b for _, b in pairs])
    for a, b in zip(ours, theirs, strict=True):
        assert _difference(a, b) <= allowed


@pytest.mark.parametrize("query_latent", [None, 6])
def test_absorbed_weights_give_what_the_parallel_form_gives(query_latent: int | None) -> None:
    torch.manual_seed(0)
    mixer = LatentAttention(24, heads=3, causal=True, latent=11, query_latent=query_latent).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    q, compressed = mixer.queries(x, 0), mixer.compressed(x, 0)
    absorbed = mixer.absorbed(q, compressed)
    expanded = mixer.attend(q, *mixer.keys_and_values(compressed), None)
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)
    for a, b in zip(
        *(torch.autograd.grad(o.sin().sum(), [x, mixer.k_proj.weight], retain_graph=True) for o in (absorbed, expanded))
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_latent_state_holds_the_latent_vector_and_the_key_of_the_position_only() -> None:
    mixer = LatentAttention(64, heads=4, causal=True, latent=16, rope=4).eval()
    ways: list[int] = []
    attend = mixer.attend
    mixer.attend = lambda *given: ways.append(given[0].shape[2]) or attend(*given)  # type: ignore[method-assign]
    with torch.no_grad():
        outs, state = [], mixer.init_state(2)
        x = torch.randn(2, 70, 64)
        for piece in x.split([60, 1, 1, 8], dim=1):
            out, state = mixer.step(piece, state)
            outs.append(out)
        assert state.keys.shape == (2, 1, 70, 16 + 4)
        assert state.values.numel() == 0
        assert ways == []  # with as many channels as a head has, reading the latent vectors is never dearer
        torch.testing.assert_close(torch.cat(outs, dim=1), mixer(x), rtol=0, atol=1e-5)
        wide = LatentAttention(64, heads=4, causal=True, latent=48).eval()
        calls: list[int] = []
        expand = wide.keys_and_values
        wide.keys_and_values = lambda c: calls.append(c.shape[2]) or expand(c)  # type: ignore[method-assign]
        outs, state = [], wide.init_state(2)
        for piece in x.split([60, 1, 1, 8], dim=1):
            out, state = wide.step(piece, state)
            outs.append(out)
        assert calls == [60]  # a long prompt is read through keys and values of its heads, single tokens are not
        torch.testing.assert_close(torch.cat(outs, dim=1), wide(x), rtol=0, atol=1e-5)


# Scales that follow the length


def test_temperature_is_softmax_with_sharper_queries() -> None:
    torch.manual_seed(0)
    plain = core_attn.build("softmax", dim=16, heads=2).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    entropy = []
    for temperature in (0.5, 1.0, 2.0):
        mixer = core_attn.build("temperature", dim=16, heads=2, temperature=temperature).double()
        mixer.load_state_dict(plain.state_dict())
        with core_attn.capture(mixer) as maps:
            out = mixer(x)
        entropy.append(-(maps[""] * maps[""].log()).sum(-1).mean().item())
        sharper = core_attn.build("softmax", dim=16, heads=2).double()
        weights = plain.state_dict()
        sharper.load_state_dict(weights | {k: v / temperature for k, v in weights.items() if k.startswith("q_proj")})
        torch.testing.assert_close(out, sharper(x), rtol=0, atol=1e-12)
    assert entropy == sorted(entropy)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_entropy_scaling_by_definition(causal: bool, padded: bool) -> None:
    torch.manual_seed(0)
    mixer = EntropyScalingAttention(12, heads=3, causal=causal, train_length=50).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    real = torch.arange(20) < torch.tensor([[20], [13]]) if padded else torch.ones(2, 20, dtype=torch.bool)
    q, k, v = (
        p(x.masked_fill(~real[..., None], 0)).unflatten(-1, (3, 4)).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    expected = torch.zeros_like(q)
    for b, i in itertools.product(range(2), range(20)):
        read = [j for j in range(20) if real[b, j] and (j <= i or not causal)]
        scale = math.sqrt(math.log(len(read), 50) / 4)
        p = torch.softmax(torch.einsum("hd,hmd->hm", q[b, :, i], k[b, :, read]) * scale, dim=-1)
        expected[b, :, i] = torch.einsum("hm,hmd->hd", p, v[b, :, read])
    expected = mixer.out_proj(expected.transpose(1, 2).flatten(-2))
    found = mixer(x, key_padding_mask=real if padded else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_at_the_length_of_training_entropy_scaling_is_softmax() -> None:
    mixer = core_attn.build("entropy_scaling", dim=16, heads=2, train_length=33).double()
    plain = core_attn.build("softmax", dim=16, heads=2).double()
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x), rtol=0, atol=1e-12)
    assert _difference(mixer(x[:, :9]), plain(x[:, :9])) > 1e-3


@pytest.mark.parametrize("deviation", [1.0, 2.0, 3.0])
def test_entropy_scaling_alleviates_the_change_of_entropy_and_does_not_cancel_it(deviation: float) -> None:
    """Random logits, T = 1,024 tokens in training and 4,096 at hand: what the mechanism does to the rows' entropy."""
    torch.manual_seed(0)
    mixer = EntropyScalingAttention(2, heads=1, train_length=1024).double()

    def entropy(keys: int, scaled: bool) -> float:
        # The first channel of a query picks the logits that stand in the keys' first channel.
        k = torch.randn(64, 1, keys, 2, dtype=torch.float64) * deviation * math.sqrt(2)
        q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(64, 1, 1, 2)
        q = mixer.scaled(q, k, None) if scaled else q
        p = torch.softmax(q @ k.mT / math.sqrt(2), dim=-1)
        return -(p * p.clamp(min=1e-300).log()).sum(-1).mean().item()

    before = entropy(1024, scaled=False)
    assert entropy(1024, scaled=True) == pytest.approx(before, abs=0.05)
    plain, ours = entropy(4096, scaled=False) - before, entropy(4096, scaled=True) - before
    assert 0.1 < ours < plain - 0.05


# Bad options


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: core_attn.build("relative", dim=8, heads=2, max_distance=-1), "max_distance must be at least 0"),
        (lambda: core_attn.build("clipped_softmax", dim=8, heads=2, gamma=0.1), "gamma <= 0"),
        (lambda: core_attn.build("clipped_softmax", dim=8, heads=2, zeta=0.9), "zeta >= 1"),
        (lambda: core_attn.build("gated", dim=8, heads=2, gate="mlp2"), "'all_heads'"),
        (lambda: core_attn.build("gated", dim=8, heads=2, hidden=4), "gate='mlp' only"),
        (lambda: core_attn.build("gated", dim=8, heads=2, gate_init=1.0), "between 0 and 1"),
        (lambda: core_attn.build("temperature", dim=8, heads=2, temperature=0), "temperature must be above 0"),
        (lambda: core_attn.build("entropy_scaling", dim=8, heads=2, train_length=1), "at least 2"),
        (lambda: core_attn.build("complex_vector", dim=6, heads=2), "even number of channels"),
        (lambda: core_attn.build("mla", dim=8, heads=3), "heads must divide dim"),
        (lambda: core_attn.build("mla", dim=8, heads=2, latent=0), "must be positive"),
        (lambda: core_attn.build("mla", dim=8, heads=2, rope=3), "rope must be an even number"),
        (lambda: core_attn.build("mla", dim=8, heads=2).init_state(1), "causal=True"),
        (lambda: core_attn.build("relative", dim=8, heads=2).init_state(1), "causal=True"),
    ],
)
def test_bad_options_are_one_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
