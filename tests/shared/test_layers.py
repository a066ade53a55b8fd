"""Layers that models of several applications share."""

from __future__ import annotations

import pytest
import torch

from attn_shared.layers import Dropout


def test_dropout_keeps_the_mean_and_passes_the_same_mask_back():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = Dropout(0.3)(x)
    assert y.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=2e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    quarters = (y.detach().flatten()[: 4 * 250_250].view(-1, 4) == 0).double()
    assert torch.corrcoef(quarters.T).triu(1).abs().max() < 0.01  # four draws are cut from one random number
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    with pytest.raises(ValueError, match="dropout must lie in"):
        Dropout(1.0)
