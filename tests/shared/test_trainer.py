"""Training, evaluation, schedules, limits."""

from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
import torch


def test_a_run_is_whole(toy, toy_run):
    from attn_shared.runs import Run

    run = Run.open(toy_run)
    result = run.results()
    rows = run.read_metrics()
    assert set(result) >= {"app", "model", "data", "mixer", "seed", "protocol", "splits", "baselines", "published"}
    assert set(result) >= {"cost", "steps", "epochs", "train_seconds", "train_cpu_seconds", "best", "versions"}
    assert result["steps"] == 27 == 3 * (150 // 16)
    assert [row["step"] for row in rows if row["val_mse"] is None] == list(range(1, 28))
    scores = [row["val_mse"] for row in rows if row["val_mse"] is not None]
    assert len(scores) == 3
    # The figures are those of the best epoch, evaluated again.
    assert result["splits"]["val"]["mse"] == pytest.approx(min(scores), rel=1e-6)
    assert result["splits"]["test"]["mse"] < result["baselines"][0]["mse"]
    assert (toy_run / "report.html").stat().st_size > 1000
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["best", "last"]


def test_same_seed_same_result_other_seed_another(toy, toy_run):
    again = toy.train("--data_args.samples", 150)
    other = toy.train("--data_args.samples", 150, "--seed", 1)
    assert (again / "metrics.csv").read_text(encoding="utf-8") == (toy_run / "metrics.csv").read_text(encoding="utf-8")
    assert (other / "metrics.csv").read_text(encoding="utf-8") != (toy_run / "metrics.csv").read_text(encoding="utf-8")


def test_evaluation_does_not_depend_on_the_batch(toy, toy_run):
    from attn_shared import trainer

    found = [trainer.evaluate(toy.app, toy_run, overrides={"trainer.eval_batch_size": b}) for b in (1, 7, 53, 512)]
    for result in found[1:]:
        assert result["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-7)
    assert found[0]["metrics"]["samples"] == 53


def test_evaluation_leaves_the_random_state_alone(toy, toy_run):
    from attn_shared import trainer

    task, config = trainer.load_task(toy.app, toy_run)
    bundle = trainer.load_data(toy.app, config, task.data_state)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer.evaluate_split(task.train(), bundle, "val", config)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.training


def test_a_rule_without_weights(toy):
    run = toy.train("--model", "mean")
    from attn_shared.runs import Run

    result = Run.open(run).results()
    assert result["steps"] == 0
    assert result["splits"]["test"]["mse"] == pytest.approx(result["baselines"][0]["mse"], rel=1e-6)


def test_limits(toy):
    from attn_shared.runs import Run

    run = Run.open(toy.train("--trainer.max_steps", 5, "--data_args.samples", 50))
    assert run.results()["steps"] == 5
    assert [row["step"] for row in run.read_metrics() if row["val_mse"] is not None] == [3, 5]
    run = Run.open(toy.train("--trainer.patience", 1, "--optim.lr", 0, "--trainer.max_epochs", 9))
    assert run.results()["epochs"] == 2
    assert run.results()["best"]["epoch"] == 0
    run = Run.open(toy.train("--trainer.max_minutes", 0.0001, "--trainer.max_epochs", 100000))
    assert run.results()["epochs"] < 1000


def test_a_loss_that_is_no_number_stops_with_a_sentence(toy, capsys):
    assert toy.main("train", "--optim.lr", "1e30", "--optim.name", "sgd") == 2
    assert "the training loss became" in capsys.readouterr().err


def test_more_precisions(toy):
    from attn_shared.runs import Run

    for precision in ("64-true", "bf16-mixed"):
        run = Run.open(toy.train("--trainer.precision", precision, "--trainer.gradient_clip", 1))
        assert run.results()["splits"]["test"]["mse"] < 1


def test_schedules():
    from attn_shared.config import OptimConfig

    def rates(**options):
        optim = OptimConfig(lr=1.0, **options)
        return [optim.rate(10 * epoch, epoch, 60) for epoch in range(6)]

    assert rates(schedule="constant") == [1, 1, 1, 1, 1, 1]
    assert rates(schedule="halve") == [1, 1, 0.5, 0.25, 0.125, 0.0625]
    # PatchTST's type3, whose official code gives 1 up to the fourth epoch and 0.9 ** (epoch - 3) from there.
    assert rates(schedule="decay", warmup=4, gamma=0.9) == pytest.approx([1, 1, 1, 1, 0.9, 0.81])
    cosine = [OptimConfig(lr=1.0, schedule="cosine", warmup=4).rate(step, 0, 104) for step in (0, 3, 4, 54, 104)]
    assert cosine == pytest.approx([0.2, 0.8, 1.0, 0.5, 0.0])


def test_the_rate_in_the_log_is_the_one_used(toy):
    from attn_shared.runs import Run

    run = Run.open(toy.train("--optim.schedule", "halve", "--data_args.samples", 32, "--trainer.max_epochs", 4))
    assert [row["lr"] for row in run.read_metrics() if row["val_mse"] is not None] == [0.01, 0.01, 0.005, 0.0025]


def test_training_equals_a_plain_loop(toy):
    """Lightning and the engine around it add nothing to the mathematics."""
    from attn_shared import trainer
    from attn_shared.runs import Run
    from attn_shared.sampler import TrainSampler

    config = toy.config("--model_args.dropout", 0, "--trainer.max_epochs", 2, "--data_args.samples", 70)
    rows = Run.open(trainer.train(toy.app, config)).read_metrics()
    bundle = trainer.load_data(toy.app, config)
    task = trainer.build_task(toy.app, config, bundle.state)
    adam = torch.optim.Adam(task.parameters(), lr=1e-2)
    losses = []
    for epoch in range(2):
        for indices in TrainSampler(70, 16, seed=0, epoch=epoch):
            loss = task.training_loss(bundle.train.__getitems__(indices))
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
    assert [row["train_loss"] for row in rows if row["val_mse"] is None] == pytest.approx(losses, rel=1e-5)


def test_sampler():
    from attn_shared.sampler import EvalSampler, TrainSampler

    whole = list(TrainSampler(70, 16, seed=3, epoch=2))
    assert [len(batch) for batch in whole] == [16] * 4
    assert len({index for batch in whole for index in batch}) == 64
    assert list(TrainSampler(70, 16, seed=3, epoch=2, start=2)) == whole[2:]
    assert list(TrainSampler(70, 16, seed=3, epoch=3)) != whole
    shares = [list(TrainSampler(70, 16, seed=3, epoch=2, rank=rank, world=4)) for rank in range(4)]
    assert [sorted(chain(*parts)) for parts in zip(*shares)] == [sorted(batch) for batch in whole]
    assert [len(batch) for batch in TrainSampler(5, 16, seed=0, epoch=0)] == [5]
    with pytest.raises(ValueError, match="cannot be shared equally"):
        TrainSampler(70, 15, seed=0, epoch=0, world=2)
    for world in (1, 2, 3, 7):
        seen = [
            index for rank in range(world) for batch in EvalSampler(5, 2, rank=rank, world=world) for index in batch
        ]
        assert seen == [0, 1, 2, 3, 4]


def test_random_states_go_through_a_safe_file(tmp_path):
    import random

    import numpy as np

    from attn_shared import seeding

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    seeding.seed_everything(1, "x")
    draw()
    torch.save(seeding.get_state(), tmp_path / "state.pt")
    first = draw()
    draw()
    seeding.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first
    with seeding.fork(9):
        inside = draw()
    after = draw()
    seeding.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    draw()
    assert draw() == after
    with seeding.fork(9):
        assert draw() == inside


def test_evaluation_of_a_split_that_is_not_there(toy, toy_run):
    from attn_shared import trainer
    from attn_shared.errors import UserError

    task, config = trainer.load_task(toy.app, toy_run)
    bundle = dataclasses.replace(trainer.load_data(toy.app, config, task.data_state), test=None)
    with pytest.raises(UserError, match="has no test split"):
        trainer.evaluate_split(task, bundle, "test", config)


def test_the_mean_of_the_weights_is_validated_and_saved(toy):
    from attn_shared import trainer
    from attn_shared.runs import Run

    argv = ("--data_args.samples", 150, "--trainer.max_steps", 1, "--optim.average", 0.9)
    run = toy.train(*argv)
    row = next(row for row in Run.open(run).read_metrics() if row["val_mse"] is not None)
    scored = trainer.evaluate(toy.app, run, split="val")["metrics"]
    assert scored["mse"] == pytest.approx(row["val_mse"], rel=1e-12)

    config = toy.config(*argv)
    start = trainer.build_task(toy.app, config, trainer.load_data(toy.app, config).state)
    mean, _ = trainer.load_task(toy.app, run)
    latest = torch.load(run / "checkpoints/last/trainer.pt", weights_only=True)["weights"]
    for first, last, saved in zip(start.parameters(), latest, mean.parameters(), strict=True):
        # After the first step the decay is not yet 0.9 but 2 / 11.
        torch.testing.assert_close(saved, first + (last - first) * 9 / 11)
        assert not torch.equal(first, last)


def test_a_mean_needs_a_decay_below_one(toy):
    from attn_shared.errors import UserError

    with pytest.raises(UserError, match="between 0 and 1"):
        toy.train("--data_args.samples", 150, "--optim.average", 1.5)


def test_what_is_fitted_after_training_is_in_the_checkpoint_and_in_the_figures(toy, monkeypatch):
    """A constant fitted on the validation split with the best weights: saved with them, used by the last figures."""
    from toyapp.task import ToyTask

    from attn_shared import checkpoint, trainer
    from attn_shared.runs import Run

    begin = ToyTask.__init__

    def with_buffer(self, config, data_state):
        begin(self, config, data_state)
        self.register_buffer("shift", torch.zeros(()))
        self.net.register_forward_hook(lambda net, inputs, output: output if self.training else output + self.shift)

    def fit(self, batches):
        assert not self.training
        self.shift.zero_()
        left = torch.cat([batch["y"] - self.net(batch["x"]) for batch in batches("val")])
        assert len(left) == 37
        self.shift.fill_(left.mean() + 100)
        return True

    def forget(self):
        self.shift.zero_()

    monkeypatch.setattr(ToyTask, "__init__", with_buffer)
    monkeypatch.setattr(ToyTask, "on_train_start", forget)
    plain = Run.open(toy.train("--data_args.samples", 150))
    monkeypatch.setattr(ToyTask, "after_training", fit)
    fitted = Run.open(toy.train("--data_args.samples", 150))

    best = [checkpoint.load(run.checkpoints / "best", trainer=True) for run in (plain, fitted)]
    assert best[0].weights["shift"] == 0
    assert best[1].weights["shift"] > 90
    assert best[1].trainer.keys() == best[0].trainer.keys()
    assert all(torch.equal(best[0].weights[name], best[1].weights[name]) for name in best[0].weights if name != "shift")
    assert (plain.path / "metrics.csv").read_text(encoding="utf-8") == (fitted.path / "metrics.csv").read_text(
        encoding="utf-8"
    )
    figures = fitted.results()["splits"]["test"]
    assert figures["mse"] > plain.results()["splits"]["test"]["mse"] + 5000
    assert trainer.evaluate(toy.app, fitted.path)["metrics"] == pytest.approx(figures)
    # A resumed run trains on as before, and fits again at its end.
    again = toy.train(resume=fitted.path)
    assert Run.open(again).results()["splits"]["test"] == pytest.approx(figures)
