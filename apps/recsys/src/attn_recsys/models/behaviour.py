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
    """A batch as vectors. Earlier items of all rows stand one behind the other, n of them.

    While a model is exported, which must not depend on how many there are, padding stands among them, and n = B · L.

    Attributes:
        target: (B, T) the item that is scored, its fields side by side.
        past: (n, T) earlier items in the same form.
        row: (n,) the row of each, ascending.
        there: (n,) 1 for an item and 0 for padding.
        other: (B, C) fields that are not the item's, and numbers.
        length: L where padding stands among the items, else 0.
    """

    target: Tensor
    past: Tensor
    row: Tensor
    there: Tensor
    other: Tensor
    length: int = 0

    def total(self, x: Tensor) -> Tensor:
        """(n, K) -> (B, K), sums over the earlier items of each row."""
        if self.length:
            return x.view(-1, self.length, x.shape[-1]).sum(1)
        return x.new_zeros(len(self.target), x.shape[-1]).index_add(0, self.row, x)

    def weights(self, scores: Tensor, there: Tensor, softmax: bool) -> Tensor:
        """(n, 1) scores of earlier items as weights: as they are, or by softmax over a row's; 0 where `there` is."""
        if not softmax:
            return scores * there.unsqueeze(-1)
        masked = scores.detach().masked_fill(there.unsqueeze(-1) == 0, torch.finfo(scores.dtype).min)
        if self.length:
            top = masked.view(-1, self.length).amax(1)
        else:
            low = masked.new_full((len(self.target),), torch.finfo(scores.dtype).min)
            top = low.scatter_reduce(0, self.row, masked.squeeze(-1), "amax")
        power = torch.exp((scores - top[self.row].unsqueeze(-1)).clamp(max=0)) * there.unsqueeze(-1)
        return power / self.total(power).clamp(min=torch.finfo(power.dtype).tiny)[self.row]


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
            nn.init.zeros_(table.weight[:2])  # unknown names are learned where training has some
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
        ids = [batch[f"past.{name}"] for _, name, _ in self.pairs]
        there = torch.stack([(i != 0).any(-1) if i.dim() == 3 else i != 0 for i in ids]).any(0)
        length = 0
        if torch.compiler.is_exporting():
            rows, length = there.shape
            row = torch.arange(rows, device=there.device).unsqueeze(1).expand(-1, length).reshape(-1)
            ids, there = [i.flatten(0, 1) for i in ids], there.flatten()
        else:
            row, place = there.nonzero(as_tuple=True)
            ids, there = [i[row, place] for i in ids], there[row, place]
        past = [
            mean_vector(self.tables[table], i) if i.dim() == 2 else self.tables[table](i)
            for i, (_, _, table) in zip(ids, self.pairs)
        ]
        other = [self._field(name, table, batch) for name, table in self.others]
        if self.numeric:
            other.append(batch["numbers"].to(target.dtype))
        return Inputs(
            target=target,
            past=torch.cat(past, -1),
            row=row,
            there=there.to(target.dtype),
            other=torch.cat(other, -1) if other else target[:, :0],
            length=length,
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

    With one output it is DIN's activation unit, with one an expert the gate unit of AW-MoE. Padding is not computed,
    which also keeps it out of what Dice standardises over.

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

    def forward(self, x: Inputs) -> Tensor:
        """(n, outputs) of the earlier items."""
        # [a; b; a - b; a * b] W = a (W1 + W3) + b (W2 - W3) + (a * b) W4: a's part once a row, half the products.
        a, b, difference, product = self.first.weight.chunk(4, 1)
        of_target = F.linear(x.target, a + difference, self.first.bias)
        pair = torch.cat([x.past, x.past * x.target[x.row]], -1)
        found: Tensor = of_target[x.row] + F.linear(pair, torch.cat([b - difference, product], 1))
        found = self.last(self.rest(self.start(found)))
        return found
