"""GLA, ViG and LightNet against their equations, computed in another way, with the recurrence of
flash-linear-attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core_attn
from core_attn.testing import check_mechanism

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}
Rule = Callable[..., Tensor]


@pytest.fixture(scope="module")
def naive() -> Callable[..., tuple[Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.gla.naive import naive_recurrent_gla
    return naive_recurrent_gla


@pytest.fixture
def rule(naive: Any, monkeypatch: pytest.MonkeyPatch) -> Rule:
    """Its outputs (B, L, H, D), in float64 too: it asks for float32 by `float`, which here keeps float64."""
    single = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype is torch.float64 else single(x))
    monkeypatch.setattr(Tensor, "new_zeros", _new_zeros(Tensor.new_zeros))
    return lambda *tensors: naive(*tensors)[0]


def _new_zeros(original: Any) -> Any:
    def new_zeros(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return original(x, *shape, dtype=x.dtype if dtype is torch.float32 else dtype)

    return new_zeros


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    mixer = core_attn.build(name, dim=24, heads=3, **options).to(dtype)
    with torch.no_grad():  # what starts at zero or one would hide whatever it multiplies
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def tokens(length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, 24, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def agree(mixer: Any, got: Tensor, right: Tensor, *leaves: Tensor) -> None:
    """Outputs, and the gradients of the tokens and of all weights."""
    limit = LIMIT[right.dtype]
    assert error(got, right) < limit
    weight = torch.linspace(-1, 1, right.numel(), dtype=right.dtype).view_as(right)
    names = ["tokens"] * len(leaves) + [name for name, _ in mixer.named_parameters()]
    a, b = (torch.autograd.grad((out * weight).sum(), [*leaves, *mixer.parameters()]) for out in (got, right))
    for name, x, y in zip(names, a, b, strict=True):
        assert y.abs().max() > 1e-4, f"{name} plays no part"
        assert error(x, y) < limit, name


def split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1)


def normed(x: Tensor, norm: Any, *, centred: bool = False) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centred else x
    out = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return out + norm.bias if centred else out


def gate(mixer: Any, x: Tensor) -> Tensor:
    """log σ(x W₁ W₂ + b)^(1/16), as a logarithm of the sigmoid itself."""
    first, second = mixer.gate_proj
    return torch.sigmoid(x @ first.weight.T @ second.weight.T + second.bias).log() / 16


def gla_by_hand(mixer: Any, x: Tensor, rule: Rule, *, centred: bool) -> Tensor:
    q, k, v = (split(x @ p.weight.T, 3) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = normed(rule(q, k, v, split(gate(mixer, x), 3)), mixer.norm, centred=centred)
    r = x @ mixer.r_proj.weight.T + mixer.r_proj.bias
    return (r * torch.sigmoid(r) * out.flatten(2)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("dtype", LIMIT, ids=["float64", "float32"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("length", [1, 37, 90])
def test_gla_is_its_equations(rule: Rule, length: int, norm: str, dtype: torch.dtype) -> None:
    mixer, x = build("gla", dtype, causal=True, norm=norm), tokens(length, dtype)
    right = gla_by_hand(mixer, x, rule, centred=norm == "layer")
    if length == 1:  # nothing has decayed yet: the gates play no part
        assert error(mixer(x), right) < LIMIT[dtype]
    else:
        agree(mixer, mixer(x), right, x)


def test_gla_by_steps_is_its_equations(rule: Rule) -> None:
    mixer, x = build("gla", causal=True), tokens(20)
    state, outs = mixer.init_state(2, dtype=torch.float64), []
    assert state.shape == (2, 3, 4, 8)  # keys of half the channels
    for token in x.split(1, dim=1):
        out, state = mixer.step(token, state)
        outs.append(out)
    agree(mixer, torch.cat(outs, dim=1), gla_by_hand(mixer, x, rule, centred=True), x)


def convolved(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A 3 × 3 kernel for each channel, as nine shifted images."""
    image = F.pad(x.view(len(x), *grid, -1), (0, 0, 1, 1, 1, 1))
    parts = [image[:, i : i + grid[0], j : j + grid[1]] * weight[:, 0, i, j] for i in range(3) for j in range(3)]
    return torch.stack(parts).sum(0).view_as(x)


def vig_by_hand(mixer: Any, x: Tensor, rule: Rule, grid: tuple[int, int]) -> Tensor:
    near = convolved(x, mixer.conv.weight, grid)
    q, k, v = (split(part, 3) for part in (near @ mixer.qkv_proj.weight.T).split([12, 12, 24], dim=2))
    forth, back = (split(part, 3) for part in gate(mixer, near).split(12, dim=2))
    mean = (rule(q, k, v, forth) + rule(q.flip(1), k.flip(1), v.flip(1), back.flip(1)).flip(1)) / 2
    choice = split(torch.sigmoid(near @ mixer.choice_proj.weight.T + mixer.choice_proj.bias), 3)
    out = choice * normed(mean, mixer.global_norm) + (1 - choice) * normed(split(near, 3), mixer.local_norm)
    return out.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("dtype", LIMIT, ids=["float64", "float32"])
@pytest.mark.parametrize("grid", [(1, 13), (5, 7), (9, 8)], ids=str)
def test_vig_is_its_equations(rule: Rule, grid: tuple[int, int], dtype: torch.dtype) -> None:
    mixer, x = build("vig", dtype), tokens(grid[0] * grid[1], dtype)
    right = vig_by_hand(mixer, x, rule, grid)
    if grid[0] == 1:  # a plain sequence; the kernel's other rows read nothing
        assert error(mixer(x), right) < LIMIT[dtype]
    agree(mixer, mixer(x, grid=grid), right, x)


def test_vig_reads_both_ways_alike() -> None:
    """The image turned by half a circle, with kernels turned and the directions' gates exchanged: the output turned."""
    mixer, x = build("vig"), tokens(30)
    right = mixer(x, grid=(5, 6)).flip(1)
    second = mixer.gate_proj[1]
    with torch.no_grad():
        mixer.conv.weight.copy_(mixer.conv.weight.flip(2, 3))
        second.weight.copy_(second.weight.roll(12, 0))
        second.bias.copy_(second.bias.roll(12, 0))
    assert error(mixer(x.flip(1), grid=(5, 6)), right) < 1e-12


def test_vig_checks_with_grids() -> None:
    checks = ["shape", "lengths", "padding", "gradients", "export", "cost"]
    assert check_mechanism("vig", only=checks, grid_rank=2).passed


def lightnet_by_hand(mixer: Any, x: Tensor, source: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    q = x @ mixer.q_proj.weight.T
    q = q * torch.sigmoid(q)
    k, v = (source @ p.weight.T for p in (mixer.k_proj, mixer.v_proj))
    out = normed(attend(*(split(part, 3) for part in (q, k, v))).flatten(2), mixer.norm)
    g = x @ mixer.gate_proj[0].weight.T @ mixer.gate_proj[1].weight.T
    return (g * torch.sigmoid(g) * out) @ mixer.out_proj.weight.T


def additive(rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The recurrence, with keys and decays from running sums of exponentials as the paper has them."""
    sums = k.exp().cumsum(1)
    before = torch.cat([torch.ones_like(sums[:, :1]), sums[:, :-1]], dim=1)
    return rule(q, k.exp() / sums, v, (before / sums).log().clamp(max=0.0))


def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """No recurrence: for each query the softmax of every channel of the keys over the tokens that it reads."""
    logits = k.unsqueeze(1).expand(-1, q.shape[1], -1, -1, -1)  # (B, L, M, H, D)
    if causal:
        above = torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
        logits = logits.masked_fill(above[None, :, :, None, None], -torch.inf)
    return torch.einsum("blhd,blmhd,bmhe->blhe", q, logits.softmax(dim=2), v) / q.shape[-1] ** 0.5


@pytest.mark.parametrize("dtype", LIMIT, ids=["float64", "float32"])
@pytest.mark.parametrize("length", [2, 37, 90])
def test_lightnet_is_its_equations(rule: Rule, length: int, dtype: torch.dtype) -> None:
    x = tokens(length, dtype)
    mixer = build("lightnet", dtype, causal=True, gate_rank=5)
    agree(mixer, mixer(x), lightnet_by_hand(mixer, x, x, lambda *qkv: additive(rule, *qkv)), x)
    agree(mixer, mixer(x), lightnet_by_hand(mixer, x, x, lambda *qkv: dense(*qkv, causal=True)), x)
    mixer = build("lightnet", dtype, gate_rank=5)
    agree(mixer, mixer(x), lightnet_by_hand(mixer, x, x, lambda *qkv: dense(*qkv, causal=False)), x)
    context = tokens(11, dtype, seed=2)
    right = lightnet_by_hand(mixer, x, context, lambda *qkv: dense(*qkv, causal=False))
    agree(mixer, mixer(x, context=context), right, x, context)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_lightnet_of_any_size(size: float) -> None:
    """Keys whose exponentials leave the range of floats, as large as 10,000: still the softmax."""
    double = build("lightnet", causal=True)
    x = size * tokens(70).detach()
    right = lightnet_by_hand(double, x, x, lambda *qkv: dense(*qkv, causal=True))
    assert error(double(x), right) < 1e-12
    state, outs = double.init_state(2, dtype=torch.float64), []
    for piece in x.split([1, 1, 5, 60, 3], dim=1):
        out, state = double.step(piece, state)
        outs.append(out)
    assert error(torch.cat(outs, dim=1), right) < 1e-12


@pytest.mark.parametrize("name", ["gla", "lightnet"])
def test_padding_anywhere_is_as_if_it_were_not_there(name: str) -> None:
    """In front, in the middle, behind: it neither decays the state nor writes to it."""
    mixer, x = build(name, causal=True), tokens(80).detach()
    keep = torch.rand(80, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[:3], keep[40:44], keep[-2:] = False, False, False
    padded = mixer(x.masked_fill(~keep[:, None], torch.nan), key_padding_mask=keep.expand(2, -1))
    assert error(padded[:, keep], mixer(x[:, keep])) < 1e-12


def test_initialisation_is_the_official_one() -> None:
    """Xavier's, 2^-2.5 times as large, and no biases: gates start at a half, whose 16th root is 0.958."""
    for name, convs in {"gla": 0, "vig": 1}.items():
        torch.manual_seed(0)
        mixer = core_attn.build(name, dim=256, heads=4, causal=name == "gla")
        found = 0
        for module in mixer.modules():
            if isinstance(module, torch.nn.Linear):
                bound = 2**-2.5 * (6 / (module.in_features + module.out_features)) ** 0.5
                assert 0.95 * bound < module.weight.abs().max() <= bound
                assert module.bias is None or not module.bias.any()
            found += isinstance(module, torch.nn.Conv2d)
        assert found == convs


@pytest.mark.parametrize("dim", [6, 10, 14])
@pytest.mark.parametrize("name", ["gla", "vig", "lightnet"])
def test_odd_heads(name: str, dim: int) -> None:
    for heads in (1, 2, dim):
        mixer = core_attn.build(name, dim=dim, heads=heads, causal=name == "gla")
        assert mixer(torch.randn(2, 9, dim)).shape == (2, 9, dim)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gla", {"heads": 5}, "heads must divide dim"),
        ("gla", {"expand_k": 0}, "must be positive"),
        ("gla", {"gate_normalizer": -1.0}, "must be positive"),
        ("gla", {"norm": "batch"}, "batch"),
        ("gla", {"causal": False}, "cannot compute"),
        ("vig", {"gate_rank": 0}, "must be positive"),
        ("vig", {"causal": True}, "cannot compute"),
        ("lightnet", {"gate_rank": 0}, "gate_rank must be"),
        ("lightnet", {"heads": 0}, "heads must divide dim"),
    ],
)
def test_errors(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        core_attn.build(name, **{"dim": 24, "causal": name == "gla", **options})


def test_vig_refuses_a_grid_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="grid"):
        build("vig")(tokens(12), grid=(3, 5))
