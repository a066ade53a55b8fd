"""Errors of the user's stay one sentence on whatever way they come."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from attn_shared.errors import CheckpointError, UserError


class Faulty(Dataset[torch.Tensor]):
    """Raises an error for its one sample."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("kind", [UserError, CheckpointError])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sentence_comes_whole_out_of_a_worker(kind: type[UserError], workers: int) -> None:
    sentence = "file a.wav: 3 of its samples are no numbers"
    with pytest.raises(kind) as caught:
        next(iter(DataLoader(Faulty(kind(sentence)), num_workers=workers)))
    assert str(caught.value) == sentence
    assert type(caught.value) is kind
