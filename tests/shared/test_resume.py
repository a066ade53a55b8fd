"""A run that is interrupted and resumed writes the same metrics.csv and the same weights as one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

# Dropout on; the data set draws from the global random state as well; a checkpoint in mid-epoch.
ARGV = ("--data_args.samples", 150, "--trainer.checkpoint_every", 5, "--optim.schedule", "cosine", "--optim.warmup", 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """metrics.csv and best weights of the uninterrupted run."""
    kept: dict[str, bytes] = {}

    def make(toy) -> dict[str, bytes]:
        if not kept:
            kept.update(files(toy.train(*ARGV)))
        return kept

    return make


def files(run: Path) -> dict[str, bytes]:
    names = ("metrics.csv", "checkpoints/best/model.safetensors", "checkpoints/last/model.safetensors")
    return {name: (run / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("env", "code", "steps"),
    [
        ({"TOY_SIGINT_AT_STEP": "13"}, 130, 13),  # mid-epoch
        ({"TOY_SIGINT_AT_STEP": "9"}, 130, 9),  # the last step of an epoch
        ({"TOY_KILL_AT_STEP": "8"}, -9, 7),  # mid-epoch, three steps after a checkpoint
        # Files are written three a checkpoint: at step 0, 5, 9 (best), 10; so the weights of step 10 are torn here.
        ({"TOY_KILL_IN_WRITE": "10"}, -9, 10),
    ],
    ids=["sigint", "sigint-last-batch", "sigkill", "sigkill-in-write"],
)
def test_resumed_equals_uninterrupted(toy, whole, monkeypatch, env, code, steps):
    monkeypatch.setenv("TOY_JITTER", "1")
    expected = whole(toy)
    done = toy.process("train", *ARGV, "--runs", "broken", **env)
    assert done.returncode == code, done.stderr
    (run,) = Path("broken/toyapp").glob("*/*")
    from attn_shared.runs import Run

    assert max(row["step"] for row in Run.open(run).read_metrics()) == steps
    if code == 130:
        assert f"stopped at step {steps}; go on with: toyapp train --resume {run}" in done.stderr
    assert toy.train(resume=run) == run
    assert files(run) == expected
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "last"]


def test_a_mean_of_the_weights_resumes_too(toy):
    argv = (*ARGV, "--optim.average", 0.9)
    expected = files(toy.train(*argv))
    done = toy.process("train", *argv, "--runs", "broken", TOY_SIGINT_AT_STEP="13")
    assert done.returncode == 130, done.stderr
    (run,) = Path("broken/toyapp").glob("*/*")
    toy.train(resume=run)
    assert files(run) == expected
    assert expected != files(toy.train(*ARGV))  # the mean made a difference


def test_a_finished_run_is_only_evaluated_again(toy, toy_run):
    import shutil

    shutil.copytree(toy_run, "again")
    (toy.folder / "again" / "metrics.json").unlink()
    before = files(Path("again"))
    assert toy.train(resume=Path("again")) == Path("again")
    assert files(Path("again")) == before
    assert (toy.folder / "again" / "metrics.json").exists()


def test_a_longer_run_goes_on(toy, toy_run, capsys):
    """Three epochs and then two more are the five of one run."""
    import shutil

    from attn_shared.runs import Run

    five = toy.train("--data_args.samples", 150, "--trainer.max_epochs", 5)
    shutil.copytree(toy_run, "more")
    assert toy.main("train", "--resume", "more", "--trainer.max_epochs", 5) == 0
    assert Run.open("more").read_metrics() == Run.open(five).read_metrics()


def test_a_lone_checkpoint_starts_a_new_run(toy, toy_run):
    import shutil

    shutil.copytree(toy_run / "checkpoints" / "last", "alone")
    from attn_shared import trainer
    from attn_shared.runs import Run

    config = trainer.resume_config(toy.app, Path("alone"), {"trainer.max_epochs": 4})
    config.runs = str(toy.folder / "runs")
    run = Run.open(trainer.train(toy.app, config, resume=Path("alone")))
    assert run.read_metrics()[0]["step"] == 28
    assert run.results()["epochs"] == 4


def test_changed_data_is_noticed(toy, toy_run, monkeypatch):
    from toyapp import task

    from attn_shared.errors import UserError

    real = task.draw
    monkeypatch.setattr(task, "draw", lambda samples, noise, seed: real(samples, noise, seed + 1))
    with pytest.raises(UserError, match="has changed since the run began"):
        toy.train(resume=toy_run)
