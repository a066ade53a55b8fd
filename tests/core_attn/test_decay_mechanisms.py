"""Lightning attention, TransNormerLLM, retention and Mamba-2 against what their papers' own code computes.

The golden tensors come from the official code run with the stored weights; the .json files beside them say which.
Mamba-2 is also compared live with the mixer of transformers, and all four with their papers' equations written densely.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import core_attn
from core_attn.ops import scalar_decay_attention
from core_attn.testing import check_mechanism

GOLDEN = Path(__file__).parents[1] / "golden"
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}
NAMES = ("lightning", "transnormer_llm", "retention", "mamba2")
# Checks that an option cannot change, and the slow ones.
SKIPPED = ["compile", "export", "determinism", "strides", "inputs", "state_dict", "growth_time", "growth_memory"]


def _cases(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))["cases"]
    return found


def _golden(name: str, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    return {k.removeprefix(f"{case}/"): v.to(dtype) for k, v in stored.items() if k.startswith(f"{case}/")}


def _ours(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The official code's weights, or their gradients, under the names of our parameters."""
    found: dict[str, Tensor] = {}
    for key, value in golden.items():
        if not key.startswith(prefix):
            continue
        module, _, kind = key.removeprefix(prefix).rpartition(".")
        if module == "qkvu_proj":
            found |= {f"{n}_proj.{kind}": x for n, x in zip("qkvu", value.chunk(4), strict=True)}
        elif module == "lrpe":
            found["theta"] = value[:, 0]
        else:
            own = {"o_proj": "out_proj", "g_proj": "gate_proj"}.get(module, module)
            found[f"{own.replace('output_gate', 'gate_proj')}.{kind}"] = value
    return found


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in ("lightning", "transnormer_llm", "retention") for case in _cases(name)]
)
def test_official_outputs_and_gradients(name: str, case: str, dtype: torch.dtype, backend: str) -> None:
    golden = _golden(name, case, dtype)
    mixer = core_attn.build(name, causal=True, backend=backend, **_cases(name)[case]).to(dtype)
    mixer.load_state_dict(_ours(golden, "weight."))
    x = golden["x"].requires_grad_()
    out = mixer(x)
    _close(out, golden["output"], dtype, "output")
    parameters = dict(mixer.named_parameters())
    gradients = torch.autograd.grad((out * _wave(out)).sum(), [x, *parameters.values()])
    right = {"x": golden["grad.x"], **_ours(golden, "grad.weight.")}
    for key, got in zip(["x", *parameters], gradients, strict=True):
        _close(got, right[key], dtype, key)
    with torch.no_grad():
        state, outs = mixer.init_state(1, dtype=dtype), []
        for piece in x.split([1, 3, x.shape[1] - 4], dim=1):
            read, state = mixer.step(piece, state)
            outs.append(read)
    _close(torch.cat(outs, dim=1), golden["output"], dtype, "steps")


@pytest.mark.parametrize("backend", ["torch", "recurrent", "reference"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("case", _cases("ssd"))
def test_official_minimal_ssd(case: str, dtype: torch.dtype, backend: str) -> None:
    """`ssd_minimal_discrete`: C reads, B writes, X is what is written, A the log-decays; states are (P, N) there."""
    golden = _golden("ssd", case, dtype)
    names = [n for n in ("X", "A", "B", "C", "S") if n in golden]
    leaves = {n: golden[n].requires_grad_() for n in names}
    first = leaves["S"][:, 0].mT if "S" in leaves else None
    found = scalar_decay_attention(
        *(leaves[n].transpose(1, 2) for n in "CBX"),
        log_decay=leaves["A"].transpose(1, 2),
        scale=1.0,
        initial_state=first,
        return_state=True,
        backend=backend,
    )
    out, final = found[0].transpose(1, 2), found[1].mT
    _close(out, golden["Y"], dtype, "Y")
    _close(final, golden["final"], dtype, "final state")
    loss = (out * _wave(out)).sum() + (final * torch.arange(final.numel()).to(dtype).sin().view_as(final)).sum()
    for name, got in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        _close(got, golden[f"grad.{name}"], dtype, name)


@pytest.fixture(scope="module")
def transformers_mamba2() -> Any:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    def make(**options: Any) -> nn.Module:
        return Mamba2Mixer(Mamba2Config(**options), layer_idx=0)

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 4, "groups": 2, "d_state": 5},
        {"heads": 2, "expand": 1, "d_conv": 3, "bias": True, "conv_bias": False},
        {"heads": 1, "d_conv": 1},
    ],
    ids=["default", "groups", "biases", "one head"],
)
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_mamba2_agrees_with_transformers(
    transformers_mamba2: Any, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole mixer with copied weights; made to keep float64, where its own code rounds to float32.

    With a bias of the input projection, its convolution reads that bias at padded tokens, and ours reads zeros.
    """
    torch.manual_seed(0)
    dim, length = 16, 70
    mixer = core_attn.build("mamba2", dim=dim, causal=True, **{"heads": 8, "d_state": 16, "eps": 1e-6, **options})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = transformers_mamba2(
        hidden_size=dim,
        num_heads=mixer.heads,
        head_dim=mixer.head_dim,
        state_size=mixer.d_state,
        n_groups=mixer.groups,
        expand=mixer.inner // dim,
        conv_kernel=mixer.d_conv,
        use_bias=mixer.out_proj.bias is not None,
        use_conv_bias=mixer.conv1d.bias is not None,
        layer_norm_epsilon=1e-6,
        chunk_size=16,
        num_hidden_layers=1,
    )
    theirs.load_state_dict({k.replace("norm_weight", "norm.weight"): v for k, v in mixer.state_dict().items()})
    mixer, theirs = mixer.to(dtype), theirs.to(dtype).eval()
    assert len([*theirs.parameters()]) == len([*mixer.parameters()])
    x = torch.randn(2, length, dim, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :9] = False
    for keys in (None, mask) if mixer.in_proj.bias is None else (None,):
        with monkeypatch.context() as patch:
            if dtype is torch.float64:
                patch.setattr(Tensor, "float", Tensor.double)
                patch.setattr(torch, "float32", torch.float64)
            right = theirs(x, attention_mask=keys)
        found = mixer(x, key_padding_mask=keys)
        kept = mask if keys is not None else torch.ones_like(mask)
        _close(found[kept], right[kept], dtype, "output")
        ours = dict(mixer.named_parameters())
        weight = _wave(found) * kept.unsqueeze(-1)
        gradients = torch.autograd.grad((found * weight).sum(), [x, *ours.values()])
        named = {k.replace("norm.weight", "norm_weight"): p for k, p in theirs.named_parameters()}
        expected = torch.autograd.grad((right * weight).sum(), [x, *(named[k] for k in ours)])
        for key, a, b in zip(["x", *ours], gradients, expected, strict=True):
            _close(a, b, dtype, key)


# --- the papers' equations, densely -----------------------------------------------------------------------------------


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _distances(length: int) -> Tensor:
    place = torch.arange(length, dtype=torch.float64)
    return place[:, None] - place


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_lightning_by_its_definition(layer: int, causal: bool) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("lightning", dim=12, heads=4, causal=causal, layer=layer, layers=6).double()
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    q, k, v = (_heads(F.silu(p(x)), 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    slope = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64) * (1 - layer / 5 + 1e-5)
    weights = (q @ k.mT) * torch.exp(-slope[:, None, None] * _distances(70).abs())
    out = ((weights.tril() if causal else weights) @ v).transpose(1, 2).flatten(-2)
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gate = torch.sigmoid(x @ mixer.gate_proj[0].weight.T @ mixer.gate_proj[1].weight.T)
    assert _difference(mixer(x), (out * gate) @ mixer.out_proj.weight.T) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_transnormer_llm_by_its_definition(layer: int, causal: bool) -> None:
    """The decays of the paper, exp(-8h / H · (1 - l / L)), and e^(iθ(s - t)) in the first layer only."""
    torch.manual_seed(0)
    mixer = core_attn.build("transnormer_llm", dim=12, heads=3, causal=causal, layer=layer, layers=5).double()
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    q, k = (_heads(F.silu(p(x)), 3) for p in (mixer.q_proj, mixer.k_proj))
    v, far = _heads(mixer.v_proj(x), 3), _distances(70)
    assert (mixer.theta is None) == (layer > 0)
    theta = torch.zeros(3, 4, dtype=torch.float64) if mixer.theta is None else mixer.theta
    turned = torch.exp(1j * theta[:, None, None] * far[..., None]).real
    rate = torch.tensor([8 / 3, 16 / 3, 8.0], dtype=torch.float64)[:, None, None] * (1 - layer / 4)
    weights = torch.einsum("bhid,bhjd,hijd->bhij", q, k, turned) * torch.exp(-rate * far.abs())
    out = ((weights.tril() if causal else weights) @ v).transpose(1, 2).flatten(-2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert _difference(mixer(x), mixer.out_proj(out * mixer.u_proj(x))) < 1e-12


def test_transnormer_llm_starts_with_the_angles_of_its_published_models() -> None:
    mixer = core_attn.build("transnormer_llm", dim=12, heads=3)
    assert mixer.theta is not None
    right = 10000 ** (-2 * torch.arange(12) / 12)
    torch.testing.assert_close(mixer.theta.detach().flatten(), right)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [6, 7])
def test_retention_by_its_definition(width: int, norm: str) -> None:
    """Equations 5 and 8: D_nm = γ^(n - m), Q e^(inθ) and K e^(-imθ); a channel without a partner is not turned."""
    torch.manual_seed(0)
    heads, length = 3, 70
    mixer = core_attn.build("retention", dim=heads * width, heads=heads, causal=True, norm=norm).double()
    x = torch.randn(2, length, heads * width, dtype=torch.float64)
    q, k, v = (_heads(p(x), heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    far = _distances(length)
    theta = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 2)
    qc, kc = (torch.view_as_complex(z[..., :6].unflatten(-1, (3, 2)).contiguous()) for z in (q, k))
    turned = torch.exp(1j * far[..., None] * theta)
    scores = torch.einsum("bhnd,bhmd,nmd->bhnm", qc, kc.conj(), turned).real + q[..., 6:] @ k[..., 6:].mT
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    decay = gamma[:, None, None] ** far.clamp(min=0)
    out = ((scores / math.sqrt(width) * decay).tril() @ v).transpose(1, 2)
    if norm == "layer":
        out = out - out.mean(-1, keepdim=True)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert _difference(mixer(x), mixer.out_proj(F.silu(mixer.gate_proj(x)) * out.flatten(-2))) < 1e-12


def test_mamba2_by_its_definition() -> None:
    """Token by token: h = e^(-A dt) h + dt B xᵀ, y = Cᵀ h + D x."""
    torch.manual_seed(0)
    mixer = core_attn.build("mamba2", dim=6, heads=4, groups=2, d_state=3, causal=True).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    z, u, dt = mixer.in_proj(x)[0].split([12, 24, 4], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias)
    kernel = mixer.conv1d.weight[:, 0]
    state, right = torch.zeros(4, 3, 3, dtype=torch.float64), []
    for t in range(9):
        read = sum(kernel[:, 3 - j] * u[t - j] for j in range(min(4, t + 1))) + mixer.conv1d.bias
        values, b, c = F.silu(read).split([12, 6, 6])
        values = values.view(4, 3)
        b, c = (y.view(2, 3).repeat_interleave(2, 0) for y in (b, c))
        state = torch.exp(-mixer.A_log.exp() * dt[t])[:, None, None] * state
        state = state + (dt[t, :, None] * b)[:, :, None] * values[:, None]
        y = (c[:, None] @ state)[:, 0] + mixer.D[:, None] * values
        gated = (y.flatten() * F.silu(z[t])).view(2, 6)
        right.append((gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten() * mixer.norm_weight)
    assert _difference(mixer(x)[0], mixer.out_proj(torch.stack(right))) < 1e-12


def test_mamba2_starts_as_its_paper() -> None:
    torch.manual_seed(0)
    mixer = core_attn.build("mamba2", dim=64, heads=64, causal=True)
    dt, a = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert dt.min() >= 0.001 - 1e-6
    assert dt.max() <= 0.1 + 1e-6
    assert a.min() >= 1
    assert a.max() <= 16
    assert torch.equal(mixer.D, torch.ones(64))


# --- contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lightning", {"heads": 1, "bias": True, "dim": 7}),
        ("lightning", {"layer": 3, "layers": 4, "dim": 6, "heads": 3}),
        ("lightning", {"layer": 0, "layers": 1}),
        ("transnormer_llm", {"decay": "alibi", "layer": 11}),
        ("transnormer_llm", {"lrpe": False, "dim": 9, "heads": 3}),
        ("transnormer_llm", {"lrpe": True, "layer": 11, "heads": 1, "dim": 6}),
        ("retention", {"norm": "rms", "expand_v": 1}),
        ("retention", {"dim": 7, "heads": 1, "expand_v": 3}),
        ("retention", {"dim": 4, "heads": 4}),
        ("mamba2", {"groups": 2, "d_state": 5, "d_conv": 1}),
        ("mamba2", {"expand": 1, "heads": 1, "d_state": 4, "bias": True, "conv_bias": False}),
        ("mamba2", {"expand": 3, "dim": 5, "heads": 3, "d_state": 4, "d_conv": 2}),
    ],
)
def test_contract_of_options(name: str, options: dict[str, Any]) -> None:
    check_mechanism(name, skip=SKIPPED, **options)


@pytest.mark.parametrize("name", NAMES)
def test_padding_inside_a_sequence_is_no_distance(name: str) -> None:
    """Padded tokens between real ones neither decay the state nor write to it; positions count the real ones.

    The convolution of Mamba-2 reads a padded token as zeros instead, so there it is switched off.
    """
    torch.manual_seed(0)
    options = {"d_conv": 1} if name == "mamba2" else {}
    for causal in (True, False):
        if not causal and name in ("retention", "mamba2"):
            continue
        mixer = core_attn.build(name, dim=12, heads=3, causal=causal, **options).double()
        x, mask = torch.randn(1, 40, 12, dtype=torch.float64), torch.rand(1, 40) < 0.6
        assert _difference(mixer(x, key_padding_mask=mask)[mask], mixer(x[mask][None])[0]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_its_state_in_float32(name: str) -> None:
    torch.manual_seed(0)
    mixer = core_attn.build(name, dim=16, heads=2, causal=True).bfloat16()
    with torch.no_grad():
        state = mixer.step(torch.randn(1, 5, 16).bfloat16(), mixer.init_state(1, dtype=torch.bfloat16))[1]
    assert state.memory.dtype is torch.float32


def test_decays_survive_a_module_in_16_bits() -> None:
    """γ = 1 - 2^-8 of retention's fourth head is 1 in bfloat16; rounded so, a token would never be forgotten."""
    torch.manual_seed(0)
    mixer = core_attn.build("retention", dim=32, heads=8, causal=True)
    low = core_attn.build("retention", dim=32, heads=8, causal=True).bfloat16()
    assert low.log_decays == mixer.log_decays
    assert math.isclose(math.exp(low.log_decays[3]), 1 - 2.0**-8)
    assert low._log_decay(torch.zeros(1, dtype=torch.bfloat16)).dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lightning", {"layer": 12}),
        ("lightning", {"layer": -1}),
        ("transnormer_llm", {"layers": 0}),
        ("transnormer_llm", {"decay": "alib"}),
        ("retention", {"norm": "batch"}),
        ("retention", {"expand_v": 0}),
        ("mamba2", {"groups": 3}),
        ("mamba2", {"d_state": 0}),
        ("mamba2", {"d_conv": 0}),
        ("mamba2", {"a_range": (0.0, 1.0)}),
        ("mamba2", {"dt_min": 0.2}),
        ("mamba2", {"expand": 0}),
    ],
)
def test_bad_options_are_one_sentence(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{10,300}$"):
        core_attn.build(name, dim=8, heads=2, causal=True, **options)


@pytest.mark.parametrize("name", ["retention", "mamba2"])
def test_noncausal_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="cannot compute noncausal"):
        core_attn.build(name, dim=8, heads=2, causal=False)(torch.randn(1, 4, 8))


def _wave(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)


def _close(got: Tensor, right: Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == right.shape, what
    assert _difference(got, right) <= ALLOWED[dtype] * max(1.0, right.abs().max().item()), what


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().double() - b.detach().double()).abs().max().item()
