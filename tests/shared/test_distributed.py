"""Two processes over gloo train as one does with the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest

ARGV = ("--data_args.samples", 70, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu")


def test_two_processes_equal_one(toy):
    from attn_shared.runs import Run

    one = Run.open(toy.train(*ARGV, "--model_args.dropout", 0))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = ("--model_args.dropout", 0, "--trainer.devices", 2, "--runs", "two")
    done = toy.process("train", *ARGV, *two, launcher=launcher)
    assert done.returncode == 0, done.stderr
    (path,) = Path("two/toyapp").glob("*/*")  # one writer
    assert done.stdout.split() == [str(path)]
    run = Run.open(path)
    rows, expected = run.read_metrics(), one.read_metrics()
    assert len(rows) == len(expected) == 10
    for row, other in zip(rows, expected):
        for name in other:
            assert row[name] == (other[name] if other[name] is None else pytest.approx(other[name], abs=1e-4, rel=0))
    # Every sample is evaluated once: 37 and 53 do not divide by two.
    for split in ("val", "test"):
        assert run.results()["splits"][split] == pytest.approx(one.results()["splits"][split], abs=1e-4)


def test_a_launch_that_does_not_fit(toy, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert toy.main("train") == 2
    assert "torchrun started 2 processes here, but --trainer.devices is 1" in capsys.readouterr().err
    assert toy.main("train", "--trainer.devices", 2, "--trainer.batch_size", 15) == 2
    assert "cannot be shared equally by 2 processes" in capsys.readouterr().err
