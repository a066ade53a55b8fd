"""Mixture of heads, key-driven groups, Gaussian adaptive attention and stochastic subsampling against their papers.

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
from core_attn.mechanisms.softmax.key_driven import owners
from core_attn.mechanisms.softmax.mixture_of_heads import balance_losses
from core_attn.mechanisms.sparse.stochastic_subsample import sampling

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("moh", "kdgqa", "gaussian_adaptive")
CASES = [
    (name, case)
    for name in NAMES
    for case in json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))["cases"]
]
MOH = {"proj": "out_proj", "wg": "routed_gate", "wg_0": "group_gate", "wg_1": "shared_gate"}
KDGQA = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"}


def golden_of(name: str, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored = load_file(GOLDEN / f"core_{name}.safetensors")
    facts = json.loads((GOLDEN / f"core_{name}.json").read_text(encoding="utf-8"))["cases"][case]
    return {k.removeprefix(f"{case}/"): v for k, v in stored.items() if k.startswith(f"{case}/")}, facts


def ours(name: str, official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official parameters (or their gradients) under our names."""
    if name == "gaussian_adaptive":
        heads = len({k.split(".")[1] for k in official})
        return {
            mine: torch.stack([official[f"attention_heads.{h}.{theirs}"] for h in range(heads)])
            for mine, theirs in (("offset", "mean_offsets"), ("width", "c"))
        }
    renamed = {}
    for key, value in official.items():
        module, _, kind = key.rpartition(".")
        if module == "qkv":
            renamed |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", value.chunk(3))}
        else:
            renamed[f"{(MOH if name == 'moh' else KDGQA)[module]}.{kind}"] = value
    return renamed


def part_of(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix) and not k.endswith("/grad.x")}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_official_outputs_and_gradients(name: str, case: str, dtype: torch.dtype) -> None:
    golden, facts = golden_of(name, case)
    options = {k: v for k, v in facts.items() if k != "batch"}
    if name == "kdgqa":
        options["batch_wide"] = True
    x = golden["x"].to(dtype).requires_grad_()
    mixer = core_attn.build(name, dim=x.shape[-1], **options).to(dtype).eval()
    weights = ours(name, part_of(golden, "weight."))
    mixer.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    out = mixer(x)
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=dtype)).view_as(out)).sum()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    kind = str(dtype).removeprefix("torch.")
    right = {"x": golden[f"{kind}/grad.x"], **ours(name, part_of(golden, f"{kind}/grad."))}
    assert difference(out, golden[f"{kind}/output"]) <= TOLERANCE[dtype]
    assert found.keys() == right.keys()
    for what, gradient in right.items():
        assert difference(found[what], gradient) <= TOLERANCE[dtype], what


@pytest.mark.parametrize("case", ["half", "routed_only"])
def test_balance_loss_is_the_official_one_and_ignores_padding(case: str) -> None:
    golden, facts = golden_of("moh", case)
    x = golden["x"].double()
    mixer = core_attn.build("moh", dim=x.shape[-1], **facts).double()
    mixer.load_state_dict({k: v.double() for k, v in ours("moh", part_of(golden, "weight.")).items()})
    with balance_losses(mixer) as losses:
        mixer(x)
        mask = torch.cat([torch.ones(2, 11), torch.zeros(2, 4)], dim=1).bool()
        mixer(torch.cat([x, torch.full((2, 4, x.shape[-1]), math.nan, dtype=x.dtype)], dim=1), key_padding_mask=mask)
    mixer(x)
    assert len(losses) == 2
    for loss in losses:
        assert difference(loss, golden["balance"]) < 1e-7  # the official code counts the heads in float32
    losses[0].backward()
    assert mixer.routed_gate.weight.grad is not None


def test_moh_uses_as_many_heads_as_it_says() -> None:
    mixer = core_attn.build("moh", dim=64, heads=8)
    gates = mixer.gates(torch.randn(2, 50, 64))
    assert ((gates != 0).sum(-1) == 6).all()
    assert torch.allclose(gates.sum(-1).mean(), torch.tensor(6.0), atol=2.0)


def test_key_driven_heads_depend_on_the_batch_only_where_asked() -> None:
    golden, facts = golden_of("kdgqa", "batch")
    x = golden["x"].double()
    weights = {k: v.double() for k, v in ours("kdgqa", part_of(golden, "weight.")).items()}
    for batch_wide in (False, True):
        mixer = core_attn.build(
            "kdgqa", dim=x.shape[-1], heads=facts["heads"], kv_heads=facts["kv_heads"], batch_wide=batch_wide
        )
        mixer.double().load_state_dict(weights)
        alone = torch.cat([mixer(x[i : i + 1]) for i in range(len(x))])
        assert (difference(mixer(x), alone) > 1e-3) is batch_wide


@pytest.mark.parametrize("seed", range(20))
def test_heads_are_shared_out_as_the_paper_counts(seed: int) -> None:
    """The rule once more, in plain Python, number by number."""
    generator = torch.Generator().manual_seed(seed)
    groups = int(torch.randint(2, 9, (), generator=generator))
    heads = groups + int(torch.randint(0, 9, (), generator=generator))
    norms = torch.rand(3, groups, generator=generator, dtype=torch.float64)
    for row, found in zip(norms.tolist(), owners(norms, heads)):
        shifted = [(n - min(row)) / (max(row) - min(row)) for n in row]
        counts = [round(s / sum(shifted) * heads) for s in shifted]
        while sum(counts) > heads:
            counts[counts.index(max(counts))] -= 1
        while sum(counts) < heads:
            counts[counts.index(min(counts))] += 1
        assert found.tolist() == [g for g, n in enumerate(counts) for _ in range(n)]


def test_equal_norms_share_equally() -> None:
    assert owners(torch.ones(1, 3), 6).tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spread", [None, 5.0])
def test_subsampled_attention_is_dense_attention_over_the_drawn_keys(causal: bool, spread: float | None) -> None:
    torch.manual_seed(0)
    length = 1100  # past two blocks of rows
    mixer = core_attn.build("stochastic_subsample", dim=16, heads=2, causal=causal, keep=0.1, spread=spread).double()
    x = torch.randn(1, length, 16, dtype=torch.float64)
    out = mixer(x, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    read = torch.zeros(length, length, dtype=torch.bool)
    if spread is None:
        read[:, torch.randperm(length, generator=generator)[:110]] = True
    else:
        noise = torch.randn(length, generator=generator)
        order = (torch.arange(length) + spread * noise).argsort().tolist()
        for i in range(length):
            read[i, [order[j] for j in range(max(0, i - 55), min(length, i + 55))]] = True
    if causal:
        read &= torch.ones(length, length, dtype=torch.bool).tril()
    q, k, v = (mixer.split_heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~read, -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    right = mixer.out_proj(mixer.merge_heads(weights @ v))
    assert difference(out, right) < 1e-12


def test_subsampling_draws_in_training_and_where_asked() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 60, 16)
    mixer = core_attn.build("stochastic_subsample", dim=16, heads=2)
    dense = core_attn.build("softmax", dim=16, heads=2).eval()
    dense.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        assert difference(mixer.train()(x), mixer(x)) > 1e-3
        assert torch.equal(mixer.eval()(x), dense(x))
        model = torch.nn.Sequential(mixer)
        with sampling(model, torch.Generator().manual_seed(0)):
            passes = torch.stack([model(x) for _ in range(400)])
        assert difference(passes[0], passes[1]) > 1e-3
        # The more passes, the nearer their mean comes to one value.
        assert difference(passes[:200].mean(0), passes[200:].mean(0)) < 0.3 * difference(passes[0], passes[1])
        assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moh", {"shared": 0, "active": 1}),
        ("moh", {"heads": 4, "shared": 1, "active": 3}),
        ("stochastic_subsample", {"spread": 3.0}),
        ("gaussian_adaptive", {"axis": "channels"}),
        ("kdgqa", {"heads": 4, "kv_heads": 3}),
    ],
)
def test_contract_of_options(name: str, options: dict[str, Any]) -> None:
    skip = ["backends", "compile", "export", "determinism", "strides", "growth_time", "growth_memory"]
    core_attn.testing.check_mechanism(name, skip=skip, **options)


def test_batch_wide_heads_break_the_contract() -> None:
    report = core_attn.testing.check_mechanism(
        "kdgqa", batch_wide=True, heads=8, only=["batch"], raise_on_failure=False
    )
    assert not report.passed


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("moh", {"active": 9}, "active=9"),
        ("kdgqa", {"kv_heads": 9}, "between 1 and heads=8"),
        ("kdgqa", {"causal": True}, "cannot compute causal self"),
        ("stochastic_subsample", {"keep": 0.0}, "keep must lie in"),
        ("stochastic_subsample", {"spread": -1.0}, "spread must be positive"),
        ("gaussian_adaptive", {"axis": "token"}, "'tokens'"),
        ("gaussian_adaptive", {"gaussians": 0}, "gaussians must be a positive"),
    ],
)
def test_errors(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        core_attn.build(name, dim=64, **{"heads": 8, **options})


def difference(a: Tensor, b: Tensor) -> float:
    found = float((a - b).detach().abs().max() / max(1.0, float(b.detach().abs().max())))
    return found if not math.isnan(found) else math.inf
