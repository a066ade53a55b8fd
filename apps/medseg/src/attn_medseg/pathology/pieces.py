"""Sets whose every member is many rows of features: bags of instances, patients of patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from attn_shared.seeding import derive

_KEPT = 2 << 30  # bytes of files kept in memory


class PiecesSet(Dataset[dict[str, Tensor]]):
    """Members of one part, read when they are wanted and kept while there is room.

    Args:
        count: of members.
        most: rows of a member at most in a batch, drawn anew each epoch; 0 = all.
    """

    def __init__(self, count: int, *, most: int = 0) -> None:
        self._count = count
        self.most = most
        self._seed, self._epoch = 0, 0
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._bytes = 0

    def read(self, index: int) -> NDArray[np.float32]:
        """(N, C) rows of a member, standardised, from its file."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Which rows are drawn follows from seed, epoch and index."""
        self._seed, self._epoch = seed, epoch

    def pieces(self, index: int) -> NDArray[np.float32]:
        """(N, C) rows of a member, all of them."""
        if index not in self._kept:
            values = self.read(index)
            if self._bytes + values.nbytes > _KEPT:
                return values
            self._kept[index] = values
            self._bytes += values.nbytes
        return self._kept[index]

    def drawn(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, N, C) rows of a batch, and (B, N) where there are any."""
        found = []
        for index in indices:
            values = self.pieces(index)
            if self.most and len(values) > self.most:
                rng = np.random.default_rng(derive(self._seed, "pieces", self._epoch, index))
                values = values[np.sort(rng.permutation(len(values))[: self.most])]
            found.append(values)
        return padded(found)


def padded(members: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """(B, N, C) and (B, N) of members of different sizes."""
    longest = max(len(one) for one in members)
    x = torch.zeros(len(members), longest, members[0].shape[1])
    mask = torch.zeros(len(members), longest, dtype=torch.bool)
    for row, one in enumerate(members):
        x[row, : len(one)] = torch.from_numpy(one)
        mask[row, : len(one)] = True
    return x, mask
