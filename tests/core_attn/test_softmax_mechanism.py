"""The mechanism `softmax`: against torch's own module, its options, decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import core_attn
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.state import FullCache, WindowCache
from core_attn.testing import check_mechanism


def torch_twin(mixer: SoftmaxAttention) -> nn.MultiheadAttention:
    """torch's module with the same weights."""
    twin = nn.MultiheadAttention(mixer.dim, mixer.heads, batch_first=True, dtype=mixer.q_proj.weight.dtype)
    with torch.no_grad():
        for target, name in ((twin.in_proj_weight, "weight"), (twin.in_proj_bias, "bias")):
            target.copy_(torch.cat([getattr(p, name) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]))
        twin.out_proj.load_state_dict(mixer.out_proj.state_dict())
    return twin


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_torch_multihead_attention(causal, cross, padded):
    torch.manual_seed(0)
    length, context = 13, 19 if cross else 13
    mixer = SoftmaxAttention(24, heads=3, causal=causal).double()
    twin = torch_twin(mixer)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, context, 24, dtype=torch.float64) if cross else None
    keep = torch.arange(context) < torch.tensor([[context], [context - 4]]) if padded else None
    future = torch.ones(length, context, dtype=torch.bool).triu(1 + context - length) if causal else None
    source = x if y is None else y
    expected, maps = twin(
        x,
        source,
        source,
        attn_mask=future,
        key_padding_mask=None if keep is None else ~keep,
        average_attn_weights=False,
    )
    with core_attn.capture(mixer) as captured:
        out = mixer(x, context=y, key_padding_mask=keep)
    if padded and not cross:
        # Queries under the mask are nobody's business; torch projects them as they are, we zero them.
        out, expected, maps = out[keep], expected[keep], maps.transpose(1, 2)[keep]
        captured_map = captured[""].transpose(1, 2)[keep]
    else:
        captured_map = captured[""]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(captured_map, maps, rtol=0, atol=1e-12)
    pairs = zip(
        *(torch.autograd.grad(o.sin().sum(), [x, net.out_proj.weight]) for o, net in ((out, mixer), (expected, twin)))
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_grouped_heads_equal_full_heads_with_repeated_keys():
    torch.manual_seed(0)
    grouped = SoftmaxAttention(24, heads=6, kv_heads=2, causal=True)
    full = SoftmaxAttention(24, heads=6, causal=True)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(grouped(x), full(x), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in grouped.parameters()) == sum(p.numel() for p in full.parameters()) - 2 * 16 * 25


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 2}, {"window": 5}, {"window": (3, None), "kv_heads": 1}, {"scale": 0.5, "bias": False}],
    ids=str,
)
def test_output_is_the_map_times_the_values(options):
    def make(dim: int, *, heads: int = 4, causal: bool = False) -> SoftmaxAttention:
        return SoftmaxAttention(dim, heads=heads, causal=causal, **options)

    for mixer in (make(16), make(16, causal=True)):
        x = torch.randn(2, 9, 16)
        with core_attn.capture(mixer) as maps:
            out = mixer(x)
        v = mixer.split_heads(mixer.v_proj(x))
        v = v.repeat_interleave(4 // v.shape[1], dim=1)
        torch.testing.assert_close(out, mixer.out_proj(mixer.merge_heads(maps[""] @ v)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("prompt", [1, 7, 30])
def test_prompt_and_steps_equal_the_full_forward(backend, window, kv_heads, prompt):
    torch.manual_seed(0)
    mixer = SoftmaxAttention(16, heads=4, kv_heads=kv_heads, causal=True, window=window, backend=backend).eval()
    x = torch.randn(2, 30, 16)
    with torch.no_grad():
        state = mixer.init_state(2)
        assert isinstance(state, WindowCache if window else FullCache)
        first, state = mixer.step(x[:, :prompt], state)
        outs = [first]
        for i in range(prompt, 30):
            out, state = mixer.step(x[:, i : i + 1], state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), mixer(x), rtol=0, atol=1e-6)


def test_decoding_is_differentiable():
    torch.manual_seed(0)
    mixer = SoftmaxAttention(8, heads=2, causal=True, window=3).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    state = mixer.init_state(1)
    outs: list[Tensor] = []
    for i in range(6):
        out, state = mixer.step(x[:, i : i + 1], state)
        outs.append(out)
    (stepwise,) = torch.autograd.grad(torch.cat(outs, 1).sin().sum(), x)
    (whole,) = torch.autograd.grad(mixer(x).sin().sum(), x)
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-12)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    mixer = SoftmaxAttention(16, heads=4, dropout=0.5)
    x = torch.randn(2, 9, 16)
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))


def test_autocast_gives_bfloat16_near_float32():
    torch.manual_seed(0)
    mixer = SoftmaxAttention(16, heads=4, window=4, backend="torch")
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x)
        out.float().sum().backward()
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), mixer(x), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads, got kv_heads=3 and heads=4"),
        ({"kv_heads": 0}, "kv_heads must divide heads"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": (-1, 2)}, "window must be a positive integer or"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(16, heads=4, **options)


def test_backend_and_state_errors():
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        SoftmaxAttention(16, heads=4, backend="spda")(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="built with causal=True"):
        SoftmaxAttention(16, heads=4).init_state(1)


@pytest.mark.parametrize("options", [{"heads": 4, "kv_heads": 2}, {"window": 5}], ids=str)
def test_the_contract_holds_for_grouped_heads_and_windows(options):
    claims = ["shape", "lengths", "batch", "causal", "maps", "decoding", "gradients", "strides"]
    if "window" not in options:
        # Padding behind the context moves the positions a window of cross attention is measured from.
        claims.append("padding")
    check_mechanism("softmax", only=claims, **options)
