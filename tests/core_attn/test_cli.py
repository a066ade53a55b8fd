"""The core-attn command: answers, exit statuses, errors of one sentence, and what it costs to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from core_attn import bench, cli, registry


def run(capsys, *arguments):
    try:
        status = cli.main([*arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(registry.names())]] == registry.names()
    assert lines[-1] == f"{len(registry.names())} mechanisms"
    status, out, _ = run(capsys, "list", "--pattern", "causal_self", "--constant-state", "--format", "json")
    assert "flow" in [row["name"] for row in json.loads(out)]
    assert "softmax" not in [row["name"] for row in json.loads(out)]
    status, out, _ = run(capsys, "list", "--no-padding", "--format", "json")
    assert all(row["padding"] is False for row in json.loads(out))


def test_describe(capsys):
    status, out, _ = run(capsys, "describe", "softmax")
    assert status == 0
    assert "Attention Is All You Need" in out
    status, out, _ = run(capsys, "describe", "flow", "--format", "json")
    assert json.loads(out)["options"]["heads"] == 8


def test_explain(capsys):
    status, out, _ = run(capsys, "explain", "softmax", "--length", "512", "--training", "--causal")
    assert status == 0
    assert out.count("RUNS") == 1
    status, out, _ = run(capsys, "explain", "softmax", "--length", "64", "--window", "8", "0", "--format", "json")
    assert [c["backend"] for c in json.loads(out) if c["chosen"]]


def test_check(capsys, tmp_path, monkeypatch):
    status, out, _ = run(capsys, "check", "flow", "softmax", "--only", "causal,padding")
    assert status == 0
    assert "flow: 2 passed, 0 failed" in out
    assert "softmax: 2 passed, 0 failed" in out
    status, out, _ = run(
        capsys, "check", "prob_sparse", "--only", "causal", "--option", "selection=paper", "--format", "json"
    )
    assert status == 1
    assert json.loads(out)[0]["results"][0]["outcome"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lisst"], "unknown command 'lisst'; did you mean 'list'?"),
        (["frobnicate"], "there are: list, describe, check, explain, bench"),
        (["list", "--patern", "x"], "unknown option --patern, did you mean --pattern"),
        (["list", "--pattern", "diagonal"], "invalid choice: 'diagonal'"),
        (["describe", "sofmax"], "unknown mechanism 'sofmax'; did you mean 'softmax'?"),
        (["describe"], "required: name"),
        (["check", "flow", "--only", "casual"], "unknown check 'casual'; did you mean 'causal'?"),
        (["check", "flow", "--option", "clamp"], "an option is KEY=VALUE, got 'clamp'"),
        (["check", "flow", "--option", "clmp=1"], "unknown option of the mechanism 'clmp'; did you mean 'clamp'?"),
        (["check", "flow", "--option", "heads=many"], "cannot be made with the options"),
        (["check", "nowhere.py:Thing"], "there is no file nowhere.py"),
        (["explain", "flow"], "required: --length"),
        (["explain", "flow", "--length", "many"], "invalid int value: 'many'"),
        (["explain", "flow", "--length", "9", "--dtype", "float23"], "unknown dtype 'float23'"),
        (["bench", "--lengths", "0"], "argument --lengths"),
        (["bench", "flwo"], "did you mean 'flow'?"),
        (["bench", "auto_correlation", "--causal"], "cannot compute causal self attention"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(capsys, arguments, said):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_bench(capsys, tmp_path):
    arguments = ["flow", "--lengths", "64,32", "--rounds", "2", "--heads", "2", "--head-dim", "8"]
    status, _, err = run(capsys, "bench", *arguments, "--save", str(tmp_path / "new"))
    assert status == 0
    assert "L = 32: softmax, flow" in err
    saved = json.loads((tmp_path / "new" / "mechanisms.json").read_text(encoding="utf-8"))
    rows = saved["rows"]
    assert [(r["name"], r["length"]) for r in rows] == [("softmax", 32), ("softmax", 64), ("flow", 32), ("flow", 64)]
    assert rows[0]["train_ratio"] == rows[0]["peak_ratio"] == 1.0
    assert rows[0]["growth"] is None
    assert all(r["forward_ms"] > 0 and r["train_ms"] > 0 and r["peak_mb"] > 0 for r in rows)
    assert rows[2]["train_ratio"] == pytest.approx(rows[2]["train_ms"] / rows[0]["train_ms"])
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["date"]
    text = (tmp_path / "new" / "mechanisms.md").read_text(encoding="utf-8")
    assert text.count("\n| flow | ") == 2
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mechanisms.json", "mechanisms.md"]


def test_counted_memory_does_not_depend_on_the_run():
    peaks = [
        [r.peak_mb for r in bench.measure(["flow"], lengths=[48], heads=2, head_dim=8, rounds=1).rows] for _ in range(2)
    ]
    assert peaks[0] == peaks[1]


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "core_attn", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return done, imported


def test_help_needs_no_torch():
    for arguments in (["--help"], ["check", "--help"], ["--version"], ["lisst"]):
        done, imported = command(*arguments)
        assert done.returncode == (2 if arguments == ["lisst"] else 0)
        assert "core_attn.cli" in imported
        assert "torch" not in imported


def test_list_is_lean():
    """It answers in under two CPU seconds, most of them torch's own import: nothing heavy may creep in beside that."""
    done, imported = command("list")
    assert done.returncode == 0
    assert "softmax" in done.stdout
    heavy = {
        "torch._inductor",
        "torch._dynamo",
        "triton",
        "torch.utils.flop_counter",
        "core_attn.testing",
        "numpy.testing",
    }
    assert not heavy & imported
