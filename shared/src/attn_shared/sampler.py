"""The order of samples. It follows from seed and epoch alone, so any step of any run can be entered anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from attn_shared.seeding import generator


class TrainSampler(Sampler[list[int]]):
    """Batches of one epoch, from batch `start` on, for one of `world` processes.

    One permutation of all samples is cut into global batches, and each of these into equal shares: process r takes
    places r, r + world, … of every batch. So the same samples make the same step whatever the number of processes.

    The last incomplete batch is dropped when there is at least one full one, as the papers do. With fewer samples than
    `batch_size` the one batch holds them all, less the remainder that cannot be shared equally.

    Args:
        size: samples in the training set.
        batch_size: global batch.
        seed, epoch: decide the order.
        start: batches already done in this epoch.
        rank, world: this process among how many.

    Raises:
        ValueError: `batch_size` is no multiple of `world`, or there are fewer samples than processes.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be shared equally by {world} processes")
        if size < world:
            raise ValueError(f"{size} training samples are too few for {world} processes")
        self.size = size
        self.batch_size = batch_size if size >= batch_size else size - size % world
        self.seed, self.epoch, self.start, self.rank, self.world = seed, epoch, start, rank, world

    @property
    def total(self) -> int:
        """Batches of a whole epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.size, generator=generator(self.seed, "order", self.epoch))
        for number in range(self.start, self.total):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch[self.rank :: self.world].tolist()


class EvalSampler(Sampler[list[int]]):
    """Every sample once and in order, in batches, shared out between processes. Nothing is dropped or repeated."""

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size = size, batch_size
        # Neighbouring blocks: process r takes [size·r/world, size·(r+1)/world).
        self.first, self.last = size * rank // world, size * (rank + 1) // world

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.first, self.last, self.batch_size):
            yield list(range(first, min(first + self.batch_size, self.last)))
