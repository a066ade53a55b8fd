"""What models that read a user's earlier items share: vectors of fields, towers, and units that compare two items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_recsys.models.clicks import ClicksShape

_SPREAD = 0.05  # standard deviation of the first vectors


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch as vectors.

    Attributes:
        target: (B, T) the item that is scored, its fields side by side.
        past: (B, L, T) the user's earlier items in the same form, zero where there is none.
        there: (B, L) bool, where there is one.
        other: (B, C) fields that are not the item's, and numbers.
    """

    target: Tensor
    past: Tensor
    there: Tensor
    other: Tensor


class BehaviourInput(nn.Module):
    """Vectors of all fields; an item's and an earlier item's come from the same tables.

    Behaviour is known by the name of the item's field (`past.item` holds names of `item`), or is a field of its own
    that shares the item's names. Where a field of the item holds several names, `past.<field>` is (B, L, W), and the
    mean over the names is taken as for the item.

    Args:
        shape: the fields; some of them behaviour.
        dim: numbers of a name's vector.
        reader: the model's name, for messages.

    Raises:
        ValueError: no behaviour among the fields.
    """

    def __init__(self, shape: ClicksShape, dim: int, reader: str) -> None:
        super().__init__()
        if not shape.behaviour:
            raise ValueError(
                f"{reader} reads what a user had before, and the data has no such column; name it with "
                "--data_args.sequence"
            )
        fields = {field.name: field for field in shape.fields}
        own = [field for field in shape.fields if field.shares is None]
        tables = [nn.Embedding(field.size, dim, padding_idx=0) for field in own]
        for table in tables:
            nn.init.normal_(table.weight, std=_SPREAD)
            nn.init.zeros_(table.weight[0])
        self.tables = nn.ModuleList(tables)
        number = {field.name: i for i, field in enumerate(own)}
        # (field of the item, behaviour, table)
        self.pairs = []
        for name in shape.behaviour:
            target = fields[name].shares if name in fields and fields[name].shares else name
            if target not in number:
                raise ValueError(f"behaviour {name!r} belongs to no field of the item")
            self.pairs.append((target, name, number[target]))
        taken = {target for target, _, _ in self.pairs} | set(shape.behaviour)
        self.others = [
            (field.name, number[field.shares or field.name]) for field in shape.fields if field.name not in taken
        ]
        self.column = columns(shape)
        self.numeric = bool(shape.numeric)
        self.target_width = dim * len(self.pairs)
        self.other_width = dim * len(self.others) + len(shape.numeric)

    def _field(self, name: str, table: int, batch: Mapping[str, Tensor]) -> Tensor:
        column = self.column.get(name)
        if column is None:
            return mean_vector(self.tables[table], batch[f"many.{name}"])
        found: Tensor = self.tables[table](batch["names"][:, column])
        return found

    def forward(self, batch: Mapping[str, Tensor]) -> Inputs:
        target = torch.cat([self._field(name, table, batch) for name, _, table in self.pairs], -1)
        past, there = [], None
        for _, name, table in self.pairs:
            ids = batch[f"past.{name}"]
            many = ids.dim() == 3
            past.append(mean_vector(self.tables[table], ids) if many else self.tables[table](ids))
            here = (ids != 0).any(-1) if many else ids != 0
            there = here if there is None else there | here
        assert there is not None
        other = [self._field(name, table, batch) for name, table in self.others]
        if self.numeric:
            other.append(batch["numbers"].to(target.dtype))
        return Inputs(
            target=target,
            past=torch.cat(past, -1),
            there=there,
            other=torch.cat(other, -1) if other else target[:, :0],
        )


def columns(shape: ClicksShape) -> dict[str, int]:
    """Field -> its column of `batch["names"]`, where it has one name a row and is no behaviour."""
    fields = {field.name: field for field in shape.fields}
    past = {name for name in shape.behaviour if name in fields and fields[name].shares}
    return {name: i for i, name in enumerate(n for n, f in fields.items() if not f.many and n not in past)}


def mean_vector(table: nn.Module, ids: Tensor) -> Tensor:
    """Mean of the vectors of the names in the last dimension of `ids`, padding apart; zero where there is none."""
    total = table(ids).sum(-2)
    count = (ids != 0).sum(-1, keepdim=True).clamp(min=1)
    return total / count


class Dice(nn.Module):
    """p x + (1 - p) α x with p = sigmoid of x standardised over the batch.

    "Deep Interest Network for Click-Through Rate Prediction" (Zhou et al., KDD 2018), equation (9); α starts at 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        norm = self.norm
        if self.training and len(flat) < 2:  # nothing to standardise over: what was seen before serves
            level = F.batch_norm(flat, norm.running_mean, norm.running_var, eps=norm.eps)
        else:
            level = norm(flat)
        p = torch.sigmoid(level).view_as(x)
        return p * x + (1 - p) * self.alpha * x


def activation(name: str, width: int) -> nn.Module:
    """An activation by name; dice and prelu learn a slope for each of `width` numbers."""
    if name == "dice":
        return Dice(width)
    if name == "prelu":
        return nn.PReLU(width)
    return nn.Sigmoid() if name == "sigmoid" else nn.ReLU()


class Tower(nn.Module):
    """Linear maps with an activation after each, (…, width) -> (…, hidden[-1])."""

    def __init__(self, width: int, hidden: Sequence[int], name: str, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [width, *hidden]
        self.width = sizes[-1]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activations = nn.ModuleList(activation(name, b) for b in sizes[1:])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for linear, act in zip(self.linears, self.activations):
            x = self.dropout(act(linear(x)))
        return x


class PairUnit(nn.Module):
    """A tower over [a; b; a - b; a ⊙ b] and a last linear map: what an earlier item b is to the item a.

    With one output it is DIN's activation unit, with one an expert the gate unit of AW-MoE. Only positions that hold
    an item are computed, which also keeps padding out of what Dice standardises over.

    Args:
        width: numbers of an item's vector.
        hidden: widths of the tower, at least one.
        outputs: numbers a pair.
        name: the activation.
    """

    def __init__(self, width: int, hidden: Sequence[int], outputs: int, name: str) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("a unit that compares two items needs at least one hidden layer")
        self.first = nn.Linear(4 * width, hidden[0])
        self.start = activation(name, hidden[0])
        self.rest = Tower(hidden[0], hidden[1:], name)
        self.last = nn.Linear(self.rest.width, outputs)

    def forward(self, target: Tensor, past: Tensor, there: Tensor) -> Tensor:
        """(B, T), (B, L, T), (B, L) -> (B, L, outputs), zero where no item is."""
        # [a; b; a - b; a * b] W = a (W1 + W3) + b (W2 - W3) + (a * b) W4: a's part once a row, half the products.
        a, b, difference, product = self.first.weight.chunk(4, 1)
        of_target = F.linear(target, a + difference, self.first.bias)
        if torch.compiler.is_exporting():
            x = of_target.unsqueeze(1) + F.linear(past, b - difference)
            x = x + F.linear(past * target.unsqueeze(1), product)
            return self._after(x) * there.unsqueeze(-1)
        row, place = there.nonzero(as_tuple=True)
        items = past[row, place]
        x = of_target[row] + F.linear(items, b - difference) + F.linear(items * target[row], product)
        found = self._after(x)
        out = found.new_zeros(*there.shape, found.shape[-1])
        return out.index_put((row, place), found)

    def _after(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.rest(self.start(x)))
        return y


def attention_weights(scores: Tensor, there: Tensor, softmax: bool) -> Tensor:
    """(B, L) scores as weights: as they are, or by softmax over the items that are there; zero elsewhere."""
    if not softmax:
        return scores * there
    top = scores.masked_fill(~there, float("-inf")).amax(-1, keepdim=True)
    power = torch.exp(scores - top.nan_to_num(neginf=0.0)).masked_fill(~there, 0.0)
    return power / power.sum(-1, keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
