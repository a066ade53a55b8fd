"""Fields of a table as vectors, for models that know nothing of sequences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_recsys.models.clicks import ClicksShape

_SPREAD = 0.05  # standard deviation of the first vectors


class FieldVectors(nn.Module):
    """A vector of each field: (B, T, D).

    In order: fields with one name, from one table; fields with several, the mean of their names' vectors; the user's
    earlier items, the mean of theirs (one token for each field of behaviour); numeric fields, their own vector times
    the number plus another. Missing and unknown names start at zero and are learned where training has some.

    Args:
        shape: the fields.
        dim: numbers of a vector.
        numeric: whether numeric fields are tokens; without, they are left to the model.

    Raises:
        ValueError: no field at all.
    """

    def __init__(self, shape: ClicksShape, dim: int, *, numeric: bool = True) -> None:
        super().__init__()
        fields = [field for field in shape.fields if field.shares is None]
        sizes = [field.size for field in fields]
        begin = dict(zip([field.name for field in fields], torch.tensor([0, *sizes]).cumsum(0).tolist()))
        self.single = [field.name for field in shape.fields if not field.many]
        self.many = [field.name for field in shape.fields if field.many]
        self.past = list(shape.behaviour)
        own = {field.name: field.shares or field.name for field in shape.fields}
        self.begin = {name: begin[own[name]] for name in own}
        self.table = nn.Embedding(max(1, sum(sizes)), dim)
        nn.init.normal_(self.table.weight, std=_SPREAD)
        with torch.no_grad():
            for name in begin:
                self.table.weight[begin[name] : begin[name] + 2] = 0.0
        self.register_buffer("offset", torch.tensor([self.begin[name] for name in self.single]), persistent=False)
        self.offset: Tensor
        count = len(shape.numeric) if numeric else 0
        self.slope = nn.Parameter(torch.empty(count, dim)) if count else None
        self.level = nn.Parameter(torch.zeros(count, dim)) if count else None
        if self.slope is not None:
            nn.init.normal_(self.slope, std=_SPREAD)
        self.names = [*self.single, *self.many, *(f"past {name}" for name in self.past)]
        self.names += list(shape.numeric) if numeric else []
        if not self.names and not shape.numeric:
            raise ValueError("the table has no field")

    def __len__(self) -> int:
        """How many vectors there are."""
        return len(self.names)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        tokens = [self.table(batch["names"] + self.offset)]
        tokens += [self._mean(batch[f"many.{name}"], name).unsqueeze(1) for name in self.many]
        tokens += [self._mean(batch[f"past.{name}"].flatten(1), name).unsqueeze(1) for name in self.past]
        if self.slope is not None and self.level is not None:
            numbers = batch["numbers"].to(self.slope.dtype)
            tokens.append(numbers.unsqueeze(-1) * self.slope + self.level)
        return torch.cat(tokens, dim=1)

    def _mean(self, number: Tensor, field: str) -> Tensor:
        """(B, W) -> (B, D); zero where there is none."""
        here = (number != 0).unsqueeze(-1)
        vectors = self.table(number + self.begin[field]) * here
        return vectors.sum(1) / here.sum(1).clamp(min=1)


def tower(width: int, hidden: tuple[int, ...], dropout: float) -> tuple[nn.Sequential, int]:
    """Linear maps with ReLU and dropout behind each, and the width of what comes out."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers), width


def refuse_mixer(name: str, mixer: str | None, mixer_args: Mapping[str, object] | None) -> None:
    """Raise ValueError where a model without attention is given a mechanism."""
    if mixer is not None or mixer_args:
        raise ValueError(f"{name} has no attention, so it takes no mixer and no mixer_args")
