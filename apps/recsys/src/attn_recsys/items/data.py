"""From a corpus to what is trained on and scored: training pairs with negatives, users with what they must not see.

Nothing of validation and test reaches training: `Prepared.graph` holds training interactions and the knowledge graph,
negatives are drawn from what a user did not have *in training*, and popularity counts training only.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.utils.data import Dataset

from attn_recsys.items.cards import DATASETS
from attn_recsys.items.corpus import Corpus, KnowledgeGraph
from attn_recsys.items.graph import with_inverse
from attn_recsys.items.options import ItemsDataConfig, ItemsTaskConfig
from attn_recsys.items.splits import TEST, TRAIN, VAL, split
from attn_recsys.models.base import ItemsGraph, ItemsShape
from attn_shared import datasets
from attn_shared.errors import UserError
from attn_shared.seeding import derive


def load_corpus(name: str, args: ItemsDataConfig) -> Corpus:
    """A data set by name, or a file or folder of the user's own."""
    from attn_recsys.items import readers
    from attn_recsys.items.synthetic import synthetic

    if name not in DATASETS:
        return readers.load_path(Path(name).expanduser(), args)
    if args.graph is not None or args.links is not None:
        raise UserError(f"{name} has its own graph; --data_args.graph and links are for files of your own")
    if name == "synthetic":
        return synthetic()
    folder = datasets.locate(DATASETS[name])
    read = {
        "lastfm_hetrec": readers.read_lastfm,
        "ml100k_kg": readers.read_ml100k,
        "amazon_beauty_items": readers.read_beauty,
    }[name]
    return read(folder / DATASETS[name].files[0].path.split("/")[0], args)


# -- pairs ------------------------------------------------------------------------------------------------------------


class Pairs:
    """For each of N owners the distinct numbers (below `size`) it has, ascending.

    Attributes:
        start: (N + 1,) where the numbers of an owner begin.
        number: all numbers, owner by owner.
    """

    def __init__(self, owner: np.ndarray, number: np.ndarray, owners: int, size: int) -> None:
        keys = np.unique(owner.astype(np.int64) * size + number)
        self.owners, self.size = owners, size
        self.owner, self.number = keys // max(1, size), keys % max(1, size)
        self.start = np.concatenate([[0], np.cumsum(np.bincount(self.owner, minlength=owners))]).astype(np.int64)
        # How many numbers that the owner has not lie below each one he has: ascending within an owner.
        below = self.number - (np.arange(len(keys)) - self.start[self.owner])
        self._key = self.owner * (size + 1) + below

    def __len__(self) -> int:
        return len(self.number)

    def of(self, owner: int) -> np.ndarray:
        """The numbers of one owner."""
        return self.number[self.start[owner] : self.start[owner + 1]]

    def counts(self) -> np.ndarray:
        """(N,) how many numbers each owner has."""
        return np.diff(self.start)

    def others(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The numbers at `place` (from 0) among those that each `owner` does not have; both of one shape."""
        found = np.searchsorted(self._key, owner * (self.size + 1) + place, side="right")
        return np.asarray(place + found - self.start[owner])

    def padded(self, owner: np.ndarray, least: int = 1) -> np.ndarray:
        """(B, W) numbers of each owner, -1 after the last."""
        counts = self.counts()[owner]
        width = max(least, int(counts.max(initial=0)))
        column = np.arange(width)
        filled = column < counts[:, None]
        place = np.where(filled, self.start[owner][:, None] + column, 0)
        return np.where(filled, self.number[place] if len(self.number) else -1, -1)

    def matrix(self) -> csr_array:
        """(N, size) sparse, 1.0 where an owner has a number."""
        return csr_array(
            (np.ones(len(self.number), np.float32), self.number, self.start), shape=(self.owners, self.size)
        )

    def joined(self, other: Pairs) -> Pairs:
        """What either has."""
        return Pairs(
            np.concatenate([self.owner, other.owner]),
            np.concatenate([self.number, other.number]),
            self.owners,
            self.size,
        )


def draws(seed: int, epoch: int, index: np.ndarray, count: int) -> np.ndarray:
    """(B, count) numbers uniform in [0, 1) that follow from seed, epoch and index alone (SplitMix64)."""
    base = np.uint64(derive(seed, "draws", epoch))
    with np.errstate(over="ignore"):
        z: Any = base + (
            index.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
        ) * (np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


# -- data sets --------------------------------------------------------------------------------------------------------


class TrainSet(Dataset[dict[str, Tensor]]):
    """Training interactions with drawn negatives.

    A batch is what `ItemModel.loss` takes. Negatives are uniform over the items that the user does not have in
    training; they follow from seed, epoch and index, so neither batches nor processes change them. Users who have every
    item have no negative: their rows are left out.
    """

    def __init__(self, train: Pairs, negatives: int) -> None:
        if negatives < 1:
            raise UserError(f"--task_args.negatives must be 1 or more, got {negatives}")
        self.pairs, self.negatives = train, negatives
        self.free = train.size - train.counts()
        self.rows = np.flatnonzero(self.free[train.owner] > 0)
        self.seed, self.epoch = 0, 0

    def set_epoch(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(indices, np.int64)
        rows = self.rows[index]
        user = self.pairs.owner[rows]
        chance = draws(self.seed, self.epoch, index, self.negatives)
        place = (chance * self.free[user][:, None]).astype(np.int64)
        batch = {
            "user": user,
            "positive": self.pairs.number[rows],
            "negative": self.pairs.others(np.broadcast_to(user[:, None], place.shape), place),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}


class UserSet(Dataset[dict[str, Tensor]]):
    """Users to be scored.

    A batch: `index` and `user` (B,); `wanted` (B, W) items to be found; `seen` (B, S) items that are no candidates,
    those of training and, for test, of validation; both -1 after the last; `activity` (B,) items in training; with
    `sampled` also `candidates` (B, n), drawn among the items that the user has in no split. There are fewer where a
    user has nearly everything, again -1 after the last.
    """

    def __init__(
        self, wanted: Pairs, seen: Pairs, train: Pairs, *, sampled: int = 0, everything: Pairs, seed: int = 0
    ) -> None:
        known = train.counts() > 0
        self.users = np.flatnonzero((wanted.counts() > 0) & known)
        self.unknown = int(((wanted.counts() > 0) & ~known).sum())
        self.wanted, self.seen, self.train = wanted, seen, train
        self.activity = train.counts()
        self.candidates: np.ndarray | None = None
        if sampled:
            free = everything.size - everything.counts()[self.users]
            rng = np.random.default_rng([seed, 1])
            self.candidates = np.full((len(self.users), sampled), -1, np.int64)
            for row, user in enumerate(self.users):
                count = min(sampled, int(free[row]))
                place = rng.choice(int(free[row]), count, replace=False) if count else np.empty(0, np.int64)
                self.candidates[row, :count] = everything.others(np.full(count, user), place)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = np.asarray(indices, np.int64)
        user = self.users[index]
        batch = {
            "index": index,
            "user": user,
            "wanted": self.wanted.padded(user),
            "seen": self.seen.padded(user),
            "activity": self.activity[user],
        }
        if self.candidates is not None:
            batch["candidates"] = self.candidates[index]
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}


# -- everything together ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Prepared:
    """A corpus, split.

    Attributes:
        users, items: names.
        graph: knowledge graph (inverse triples included), or None.
        train, val, test: items of each user.
        sets: "train", "val", "test" -> data set, None where there is nothing.
        state: what a checkpoint keeps; `restored` makes all but the data sets of it.
        facts, protocol: for the report.
    """

    users: list[str]
    items: list[str]
    graph: KnowledgeGraph | None
    train: Pairs
    val: Pairs
    test: Pairs
    train_set: TrainSet
    val_set: UserSet | None
    test_set: UserSet | None
    state: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""


def prepare(
    corpus: Corpus, args: ItemsDataConfig, task: ItemsTaskConfig, state: Mapping[str, Any] | None = None
) -> Prepared:
    """Split the corpus; with a checkpoint's `state`, score it for the users and items that were trained.

    With `state`, the training interactions and the graph are those that the model was trained with; of the corpus,
    only what its split puts into validation and test is taken, less what the model was trained with.
    """
    data = corpus.interactions
    part, notes = split(data, args)
    notes = [*corpus.notes, *notes]
    user, item = data.user, data.item
    if state is None:
        users, items, graph = data.users, data.items, corpus.graph
        if graph is not None and args.inverse:
            graph = with_inverse(graph)
        train = Pairs(user[part == TRAIN], item[part == TRAIN], len(users), len(items))
    else:
        kept = restored(state)
        users, items, graph, train = kept.users, kept.items, kept.graph, kept.train
        user, item, part = _renumbered(corpus, part, kept, notes)
    val = Pairs(user[part == VAL], item[part == VAL], len(users), len(items))
    test = Pairs(user[part == TEST], item[part == TEST], len(users), len(items))
    if not len(train):
        raise UserError("the split leaves no interaction for training; lower --data_args.test and --data_args.val")
    everything = train.joined(val).joined(test)
    sets: dict[str, UserSet | None] = {}
    for name, wanted, seen in (("validation", val, train), ("test", test, train.joined(val))):
        made = UserSet(wanted, seen, train, sampled=task.sampled, everything=everything, seed=args.shuffle)
        sets[name] = made if len(made) else None
        if made.unknown:
            notes.append(
                f"{made.unknown:,} users of {name} have no training interaction; they are not scored, as nothing but "
                "popularity could be recommended to them"
            )
    train_set = TrainSet(train, task.negatives)
    if len(train_set) < len(train):
        notes.append(
            f"{len(train) - len(train_set):,} training interactions belong to users who have every item; nothing can "
            "be learnt from them"
        )
    new = int((~np.isin(np.unique(test.number), train.number)).sum())
    if new:
        notes.append(f"{new:,} items of test occur in no training interaction")
    facts: dict[str, Any] = {
        "users": len(users),
        "items": len(items),
        "interactions: training, validation, test": f"{len(train):,} / {len(val):,} / {len(test):,}",
        "training interactions a user, median": float(np.median(train.counts())),
    }
    if graph is not None:
        facts["graph"] = (
            f"{len(graph.entities):,} entities (items included), {len(graph.relations):,} relations and "
            f"{len(graph.head):,} triples{', inverse ones included' if args.inverse else ''}"
        )
    facts |= {f"note {i + 1}": note for i, note in enumerate(notes)}
    return Prepared(
        users=users,
        items=items,
        graph=graph,
        train=train,
        val=val,
        test=test,
        train_set=train_set,
        val_set=sets["validation"],
        test_set=sets["test"],
        state=dict(state) if state is not None else _state(users, items, graph, train, everything),
        facts=facts,
        protocol=protocol(args, task),
    )


def protocol(args: ItemsDataConfig, task: ItemsTaskConfig) -> str:
    """One sentence: how was split and what was ranked."""
    how = {
        "ratio": f"{1 - args.val - args.test:.0%} / {args.val:.0%} / {args.test:.0%} of each user's items, drawn",
        "leave_one_out": "each user's last interaction for test, the one before for validation",
        "time": f"by time, the last {args.test:.0%} of all interactions for test, {args.val:.0%} before for validation",
        "given": "the data's own test file",
    }[args.split]
    ranked = (
        f"SAMPLED: each user's test items ranked among {task.sampled} drawn items he never had"
        if task.sampled
        else "each user's test items ranked among all items he did not have in training and validation"
    )
    return f"{how[0].upper()}{how[1:]} (shuffle {args.shuffle}); {ranked}; means over users with test items"


def _renumbered(
    corpus: Corpus, part: np.ndarray, kept: Restored, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interactions under the numbers of training, without what the model was trained with or never met."""
    data = corpus.interactions
    user_of = {name: i for i, name in enumerate(kept.users)}
    item_of = {name: i for i, name in enumerate(kept.items)}
    user = np.array([user_of.get(name, -1) for name in data.users], np.int64)[data.user]
    item = np.array([item_of.get(name, -1) for name in data.items], np.int64)[data.item]
    known = (user >= 0) & (item >= 0)
    if not known.any():
        raise UserError("the data has no user and item in common with what the model was trained on")
    if not known.all():
        notes.append(f"{int((~known).sum()):,} interactions of users or items that training did not have left out")
    size = len(kept.items)
    trained = np.isin(user * size + item, kept.train.owner * size + kept.train.number)
    again = known & trained & (part != TRAIN)
    if again.any():
        notes.append(f"{int(again.sum()):,} validation or test interactions left out: the model was trained with them")
    known &= ~trained
    return user[known], item[known], part[known]


# -- what a checkpoint keeps ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `state` holds: names, graph, training interactions, and all interactions that the data had."""

    users: list[str]
    items: list[str]
    graph: KnowledgeGraph | None
    train: Pairs
    everything: Pairs

    @property
    def shape(self) -> ItemsShape:
        graph = self.graph
        return ItemsShape(
            users=len(self.users),
            items=len(self.items),
            entities=len(graph.entities) if graph else 0,
            relations=len(graph.relations) if graph else 0,
        )

    def tensors(self) -> ItemsGraph:
        """Training interactions and triples, for a model."""
        graph, none = self.graph, np.empty(0, np.int64)
        return ItemsGraph(
            user=torch.from_numpy(self.train.owner.copy()),
            item=torch.from_numpy(self.train.number.copy()),
            head=torch.from_numpy(graph.head if graph else none),
            relation=torch.from_numpy(graph.relation if graph else none.copy()),
            tail=torch.from_numpy(graph.tail if graph else none.copy()),
        )


def _state(
    users: list[str], items: list[str], graph: KnowledgeGraph | None, train: Pairs, everything: Pairs
) -> dict[str, Any]:
    state: dict[str, Any] = {
        "users": users,
        "items": items,
        "train": _pack(train.start, train.number),
        "everything": _pack(everything.start, everything.number),
        "graph": None,
    }
    if graph is not None:
        state["graph"] = {
            "entities": graph.entities[len(items) :],
            "relations": graph.relations,
            "triples": _pack(graph.head, graph.relation, graph.tail),
        }
    return state


def restored(state: Mapping[str, Any]) -> Restored:
    """The contents of a checkpoint's data state."""
    users, items = list(state["users"]), list(state["items"])

    def pairs(name: str) -> Pairs:
        start, number = _unpack(state[name])
        owner = np.repeat(np.arange(len(users), dtype=np.int64), np.diff(start))
        return Pairs(owner, number, len(users), len(items))

    graph = None
    if state["graph"] is not None:
        head, relation, tail = _unpack(state["graph"]["triples"])
        graph = KnowledgeGraph(
            entities=[*items, *state["graph"]["entities"]],
            relations=list(state["graph"]["relations"]),
            head=head,
            relation=relation,
            tail=tail,
        )
    return Restored(users=users, items=items, graph=graph, train=pairs("train"), everything=pairs("everything"))


def _pack(*columns: np.ndarray) -> list[str]:
    """Whole numbers below 2^31 as text: 32 bits each, differences, deflated, base64."""
    packed = []
    for column in columns:
        steps = np.diff(column, prepend=0).astype("<i4")
        # The same byte of all numbers together: most of them are zero.
        planes = steps.view(np.uint8).reshape(-1, 4).T.tobytes()
        packed.append(base64.b64encode(zlib.compress(planes, 6)).decode("ascii"))
    return packed


def _unpack(packed: Sequence[str]) -> list[np.ndarray]:
    columns = []
    for text in packed:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(4, -1)
        steps = np.ascontiguousarray(planes.T).view("<i4").reshape(-1)
        columns.append(np.cumsum(steps.astype(np.int64)))
    return columns
