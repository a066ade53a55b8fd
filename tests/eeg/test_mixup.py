"""Mixup: windows and labels are mixed alike, by shares of at least one half."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attn_eeg.cli import APP
from attn_eeg.task import EegTask, mixed
from attn_shared import options, trainer
from attn_shared.errors import UserError


@pytest.mark.parametrize("shape", [(64, 3, 4), (64, 3, 100)])
def test_windows_and_targets_are_mixed_alike(shape):
    torch.manual_seed(0)
    target = torch.eye(64)  # one class a window, so that the mixed target says which windows went in
    x = torch.randn(shape)
    y, mixture = mixed(x, target, 1.0)
    assert torch.allclose(mixture.sum(dim=1), torch.ones(64))
    assert (mixture.diagonal() >= 0.5).all()
    assert ((mixture > 0).sum(dim=1) <= 2).all()
    assert (mixture.diagonal() < 0.999).any()
    assert torch.allclose(y, torch.einsum("ij,jct->ict", mixture, x), atol=1e-5)


def configured(mixup: float):
    argv = ["--model", "linear", "--data", "synthetic", "--model_args.mixup", str(mixup)]
    return options.resolve(APP, options.split(["--preset", "none", *argv]))


def test_the_loss_of_a_linear_model_at_zero_is_that_of_a_guess_with_and_without_mixup():
    for mixup in (0.0, 1.0):
        config = configured(mixup)
        bundle = trainer.load_data(APP, config)
        task = trainer.build_task(APP, config, bundle.state)
        assert isinstance(task, EegTask)
        batch = task.example_batch(bundle, 16)
        classes = task.shape.classes
        assert task.training_loss(batch).item() == pytest.approx(torch.tensor(float(classes)).log().item(), abs=1e-5)
        task.network.map.weight.data.normal_()
        index_form = F.cross_entropy(task.forward_batch(batch), batch["y"])
        assert (abs(task.training_loss(batch) - index_form) < 1e-6) == (mixup == 0.0)


def test_a_negative_mixup_is_refused():
    config = configured(-1.0)
    state = trainer.load_data(APP, configured(0.0)).state
    with pytest.raises(UserError, match="mixup must be 0 or more"):
        trainer.build_task(APP, config, state)
