"""Suites of measurements: what they run is right, and what they write is whole. No figure decides anything here."""

from __future__ import annotations

import builtins
import json
import math

import pytest
import torch

from core_attn import bench, cli
from core_attn.bench import suites
from core_attn.dispatch import operator
from core_attn.ops import softmax_attention

# What its outputs look like is the operator's own affair.
OWN_SHAPES = {"fft_conv, kernel of L"}
SMALL = {"lengths": [96], "heads": 2, "head_dim": 8, "side": 9, "rounds": 1}


@pytest.fixture(scope="module")
def sizes():
    return suites._Sizes((96,), heads=2, width=8, side=9, image_heads=2, image_width=8)


def functions(case):
    """name -> function, of everything in the case that is there."""
    found = {}
    for entry in [*case.ours, *case.others]:
        try:
            found[entry.name] = entry.make()
        except suites.Missing:
            continue
    return found


@pytest.mark.parametrize("suite", ["exact", "local", "sparse"])
def test_what_is_compared_solves_the_same_problem(sizes, suite):
    """Within a case all functions give the same outputs, except where ours reads other pairs on purpose."""
    other_pairs = {"longlora", "s2", "routing", "landmark", "infllm", "dilation 8"}
    compared = 0
    for case in {"exact": suites._exact, "local": suites._local, "sparse": suites._sparse}[suite](sizes):
        tensors = case.tensors()
        made = functions(case)
        with torch.no_grad():
            outs = {
                name: function(*tensors)
                for name, function in made.items()
                if name not in other_pairs | {"flex", "local-attention"}
            }
        if "natten" in outs:  # (B, height, width, H, D)
            outs["natten"] = outs["natten"].flatten(1, 2).transpose(1, 2)
        right = outs.get("SDPA", outs.get("SDPA, mask"))
        for out in outs.values():
            if right is not None:
                torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared >= {"exact": 4, "local": 4, "sparse": 2}[suite]


def test_the_linear_family_is_measured_whole(sizes):
    """Every function gives tokens for tokens, and its backward reaches all it was given, gates and weights included."""
    operators, *modules = suites._linear(sizes)
    assert {"gated_linear_attention, gates to -30", "flow_attention"} <= {e.name for e in operators.ours}
    assert {e.name for case in modules for e in case.ours} == {*suites.LINEAR}
    for case in (operators, *modules):
        tensors = case.tensors()
        reached = 0
        for entry in [*case.ours, *case.others]:
            try:
                function = entry.make()
            except suites.Missing:
                continue
            leaves = [t.requires_grad_() for t in (tensors if entry.tensors is None else entry.tensors())]
            out = function(*leaves)
            assert out.shape == tensors[0].shape or entry.name in OWN_SHAPES
            weights = [*function.parameters()] if isinstance(function, torch.nn.Module) else []
            assert bool(weights) == case.name.startswith("modules")
            gradients = torch.autograd.grad(out.square().sum(), [*leaves, *weights], allow_unused=True)
            assert all(g is not None for g in gradients[: len(leaves)]), entry.name
            assert not weights or any(g is not None and g.any() for g in gradients[len(leaves) :]), entry.name
            reached += 1
        assert reached


def test_growth():
    """The slope between neighbouring lengths of a series; rows of one name stand together, shortest first."""

    def row(case, ours, train):
        times = {"forward_ms": 1.0, "peak_mb": 1.0, "other_forward_ms": 1.0, "other_peak_mb": 1.0}
        return suites.SuiteRow(
            case=case,
            ours=ours,
            other="SDPA",
            train_ms=train,
            other_train_ms=train**2,
            forward_times=1.0,
            train_times=train,
            **times,
        )

    def case(length, series="s"):
        return suites.Case(f"{series}{length}", list, [], [], series, length)

    found = suites._in_series(
        [(case(n), row(f"s{n}", name, float(n**power))) for n in (2, 4, 16) for name, power in (("a", 1), ("b", 3))]
        + [(case(0, ""), row("alone", "a", 5.0)), (case(0, ""), row("other", "a", 5.0))]
    )
    assert [(r.ours, r.case) for r in found] == [
        *[(name, f"s{n}") for name in "ab" for n in (2, 4, 16)],
        ("a", "alone"),
        ("a", "other"),
    ]
    growths = [(r.growth, r.other_growth) for r in found]
    assert all(math.isnan(x) for i in (0, 3, 6, 7) for x in growths[i])
    assert [growths[i] for i in (1, 2, 4, 5)] == [pytest.approx(g) for g in [(1, 2), (1, 2), (3, 6), (3, 6)]]
    rows = suites.SuiteRows("linear", tuple(found), (), {"rounds": 1}, suites._machine("cpu"))
    head, _, first, second, *_ = bench.suite_table(rows).splitlines()
    assert head.endswith("growth with L  its")
    assert first.split()[-2:] == ["-", "-"]
    assert second.split()[-2:] == ["1.00", "2.00"]
    without = suites.SuiteRows("sparse", tuple(found[-2:]), (), {"rounds": 1}, suites._machine("cpu"))
    assert "growth" not in bench.suite_table(without)


def test_masks():
    band = suites._band(50, 8)
    assert band.sum() == sum(min(i + 1, 8) for i in range(50))
    near = suites._neighbours(9, 3)
    assert (near.sum(1) == 9).all()
    assert torch.equal(near[0].nonzero().flatten(), torch.tensor([0, 1, 2, 9, 10, 11, 18, 19, 20]))
    blocks = suites._blocks(640, 64, 0.2)
    assert blocks.sum() == 20
    assert blocks.diagonal().all()
    dense = suites._dense_blocks(600, 64, 0.2)
    assert dense.shape == (600, 600)
    assert dense[:64, :64].all()


@pytest.mark.parametrize("suite", ["exact", "local", "sparse", "linear"])
def test_suite(suite):
    """Every row is whole; its ratios are of its own times; whatever is missing is told in a sentence."""
    flex = operator("softmax_attention")
    held = flex.backends
    flex.backends = tuple(b for b in held if b.name != "flex")  # compiles for seconds
    try:
        found = bench.measure_suite(suite, **SMALL)
    finally:
        flex.backends = held
    assert found.rows
    for row in found.rows:
        assert row.forward_ms > 0
        assert row.other_forward_ms > 0
        assert row.peak_mb > 0
        assert row.forward_times == pytest.approx(row.other_forward_ms / row.forward_ms)
        if not math.isnan(row.train_times):
            assert row.train_times == pytest.approx(row.other_train_ms / row.train_ms)
            assert row.train_ms > 0
    assert all(note.startswith("Not measured: ") for note in found.notes)
    assert found.settings["rounds"] == 1
    assert found.machine["threads"] == 1
    text = bench.suite_table(found)
    assert all(row.ours in text for row in found.rows)


def test_what_is_not_installed_is_said(monkeypatch):
    imports = builtins.__import__

    def refuse(name, *arguments, **more):
        if name.split(".")[0] in ("natten", "local_attention"):
            raise ImportError(name)
        return imports(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = bench.measure_suite("local", **SMALL)
    assert "Not measured: natten is not installed." in found.notes
    assert "Not measured: local-attention is not installed." in found.notes
    assert {row.other for row in found.rows} >= {"SDPA, mask"}
    assert not {row.other for row in found.rows} & {"natten", "local-attention"}


def test_a_function_that_fails_is_said():
    def broken(*tensors):
        raise RuntimeError("no such kernel\nmore")

    def case(run):
        return suites.Case(
            "a problem",
            lambda: [torch.randn(4, 4)],
            [suites.Entry("ours", lambda: run)],
            [suites.Entry("it", lambda: torch.sin)],
        )

    notes: dict[str, None] = {}
    assert list(suites._measured(case(broken), 1, notes)) == []
    assert list(notes) == ["Not measured: ours in a problem: no such kernel"]
    (row,) = suites._measured(case(torch.cos), 2, notes)
    assert (row.ours, row.other, row.case) == ("ours", "it", "a problem")


def test_peak_memory_is_measured():
    """Of what is made inside, held at once; what lives already does not count."""
    x = torch.randn(1000, 100)
    assert suites._peak_mb(lambda: [(x + i).sum() for i in range(4)]) == pytest.approx(0.4, abs=0.01)
    assert suites._peak_mb(lambda: [x + i for i in range(4)]) == pytest.approx(1.6, abs=0.01)


def test_command(capsys, tmp_path):
    arguments = ["sparse", "--lengths", "64", "--heads", "2", "--head-dim", "8", "--rounds", "1"]
    assert cli.main(["bench", *arguments, "--save", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert "sparse attention: least CPU time of 1 rounds, taken in turns, 1 thread" in out
    assert "blocks of 64, 10% of them, L 64" in err
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["sparse.json", "sparse.md"]
    saved = json.loads((tmp_path / "new" / "sparse.json").read_text(encoding="utf-8"))
    assert saved["suite"] == "sparse"
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["date"]
    assert saved["settings"]["lengths"] == [64]
    text = (tmp_path / "new" / "sparse.md").read_text(encoding="utf-8")
    assert text.startswith("# Sparse attention beside its alternatives\n")
    assert text.count("\n| blocks of 64, 10% of them, L 64") == 1
    arguments = ["linear", "--lengths", "16,32", "--heads", "2", "--head-dim", "8", "--rounds", "1"]
    assert cli.main(["bench", *arguments, "--save", str(tmp_path / "new")]) == 0
    saved = json.loads((tmp_path / "new" / "linear.json").read_text(encoding="utf-8"))
    flow = [row for row in saved["rows"] if row["ours"] == "flow"]
    assert [row["growth"] is None for row in flow] == [True, False]
    assert saved["settings"]["heads"] == 2
    assert "| growth with L | its |" in (tmp_path / "new" / "linear.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["local", "flow"], "measured apart from mechanisms"),
        (["exact", "--causal"], "run core-attn bench exact"),
        (["exact", "--rounds", "0"], "rounds and batch must be positive"),
        (["exact", "--dtype", "float23"], "unknown dtype 'float23'"),
    ],
)
def test_mistakes(capsys, arguments, said):
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="did you mean 'local'"):
        bench.measure_suite("locl")


def test_the_mask_of_a_module_case_is_its_own():
    """The alternative of a mechanism with a forward of its own is softmax attention with the mask."""
    mask = suites._band(12, None)
    module = suites._softmax_module(
        lambda: suites._masked(lambda: mask), lambda: suites._built("softmax", 16, 2, torch.float32)
    )
    x = torch.randn(1, 12, 16)
    with torch.no_grad():
        q, k, v = (module.split_heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
        right = module.out_proj(module.merge_heads(softmax_attention(q, k, v, causal=True)))
        torch.testing.assert_close(module(x), right)
