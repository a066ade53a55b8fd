"""What models that rank by a dot product are trained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bpr(user: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-log sigmoid(score of the positive - score of the negative), the mean over all pairs.

    "BPR: Bayesian Personalized Ranking from Implicit Feedback" (Rendle et al. 2009), section 4.1.

    Args:
        user, positive: (B, D).
        negative: (B, n, D).
    """
    better = (user * positive).sum(-1, keepdim=True)
    worse = torch.einsum("bd,bnd->bn", user, negative)
    return -F.logsigmoid(better - worse).mean()


def half_square(x: Tensor) -> Tensor:
    """Half the squared length of the vectors in the last dimension, on average."""
    return x.square().sum(-1).mean() / 2
