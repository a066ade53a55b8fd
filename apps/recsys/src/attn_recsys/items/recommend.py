"""Recommendations of a trained model: users in, their best items with scores and reasons out.

Whoever the model was trained with gets its ranking. Of a user it never met, a vector is fitted to his history where the
model multiplies vectors (`fold_in`); without history he gets what is popular, and that is said. Items that nobody had
in training are recommended by models that read the graph, as far as they stand in it, and by no other.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_recsys.items.baselines import popular
from attn_recsys.items.cards import ROLES, header, plain
from attn_recsys.items.options import ItemsDataConfig
from attn_recsys.items.readers import read_table
from attn_recsys.models.base import ItemModel
from attn_shared.csvtext import read_cells
from attn_shared.errors import UserError
from attn_shared.runs import write_atomically

if TYPE_CHECKING:
    from attn_recsys.items.task import ItemsTask

_BLOCK = 256
_MOST_NEGATIVES = 2000
_MOST_NAMES = 5
MODEL, HISTORY, POPULARITY = "model", "history", "popularity"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One item for one user.

    Attributes:
        user, item: names.
        rank: from 1.
        score: the model's; for popularity, users who had the item in training.
        by: "model"; "history" = the model's items under a vector fitted to a history; "popularity".
        reasons: ways through the graph, the one with most attention first, each as (text, share of attention).
    """

    user: str
    rank: int
    item: str
    score: float
    by: str
    reasons: tuple[tuple[str, float], ...] = ()


class Recommender:
    """A trained model with the names it was trained with.

    Attributes:
        notes: what had to be said about the users asked for, each once.
    """

    def __init__(self, task: ItemsTask) -> None:
        self.task, self.known = task.eval(), task.known
        self.user_of = {name: i for i, name in enumerate(self.known.users)}
        self.item_of = {name: i for i, name in enumerate(self.known.items)}
        self.popularity = np.bincount(self.known.train.number, minlength=len(self.known.items))
        self.order = popular(self.known.train)
        self.product = type(task.network).scores is ItemModel.scores
        self.notes: list[str] = []
        task.forget()
        trained = self.popularity > 0
        graph = self.known.graph
        if task.network.reads_graph and graph is not None:
            trained[np.intersect1d(np.concatenate([graph.head, graph.tail]), np.arange(len(trained)))] = True
        self.rankable = trained
        self.paths = hasattr(task.network, "explain")

    def recommend(
        self,
        users: Sequence[str],
        *,
        k: int = 10,
        hide: str = "all",
        paths: int = 1,
        history: Mapping[str, Sequence[str]] | None = None,
    ) -> list[Recommendation]:
        """The k best items of each user, in the order given.

        Args:
            hide: "all" = leave out what the user had in the data, "train" = in training, "none".
            paths: reasons an item, by models that know any.
            history: user -> items he had, beside what the data says of him.
        """
        if k < 1 or paths < 0:
            raise UserError(f"--k must be 1 or more and --paths 0 or more, got {k} and {paths}")
        had = {user: self._items(user, items) for user, items in (history or {}).items()}
        missing = int((~self.rankable).sum())
        if missing:
            self._note(f"{missing:,} items that nobody had in training cannot be ranked by {self.task.config.model}")
        found: list[Recommendation] = []
        for first in range(0, len(users), _BLOCK):
            found += self._block(users[first : first + _BLOCK], k, hide, paths, had)
        return found

    def _block(
        self, users: Sequence[str], k: int, hide: str, paths: int, had: Mapping[str, np.ndarray]
    ) -> list[Recommendation]:
        scores = np.empty((len(users), len(self.known.items)), np.float64)
        by = [self._fill(scores[row], user, had.get(user)) for row, user in enumerate(users)]
        place = [row for row, name in enumerate(by) if name == MODEL]
        if place:
            numbers = torch.tensor([self.user_of[users[row]] for row in place], device=self.task.device)
            scores[place] = self.task.scores(numbers).double().cpu().numpy()
        scores[:, ~self.rankable] = -np.inf
        hidden = {"all": self.known.everything, "train": self.known.train, "none": None}[hide]
        found = []
        for row, user in enumerate(users):
            line, number = scores[row], self.user_of.get(user)
            if hide != "none":
                if hidden is not None and number is not None:
                    line[hidden.of(number)] = -np.inf
                line[had.get(user, np.empty(0, np.int64))] = -np.inf
            best = np.argsort(-line, kind="stable")[:k]
            best = best[np.isfinite(line[best])]
            if len(best) < k:
                what = {0: "nothing is left to recommend", 1: "only 1 item is left"}.get(
                    len(best), f"only {len(best)} items are left"
                )
                self._note(f"user {user} had the other items already: {what}" if hide != "none" else f"{user}: {what}")
            reasons = self._reasons(number, best, paths) if by[row] == MODEL and number is not None else {}
            for place_, item in enumerate(best):
                score = float(self.popularity[item]) if by[row] == POPULARITY else float(line[item])
                found.append(
                    Recommendation(
                        user=user,
                        rank=place_ + 1,
                        item=self.known.items[item],
                        score=score,
                        by=by[row],
                        reasons=reasons.get(int(item), ()),
                    )
                )
        return found

    def _fill(self, line: np.ndarray, user: str, had: np.ndarray | None) -> str:
        """Scores of a user whom the model was not trained with; how they came about."""
        number = self.user_of.get(user)
        if number is not None and len(self.known.train.of(number)):
            return MODEL
        if had is not None and len(had) and self.product:
            line[:] = self._fold_in(had)
            return HISTORY
        if had is not None and len(had):
            self._note(
                f"user {user} was not in training, and {self.task.config.model} cannot place users by their history: "
                "he gets popular items"
            )
        elif had is not None:
            self._note(f"user {user} has no item in his history that training knew: he gets popular items")
        else:
            self._note(f"user {user} was not in training and has no history: he gets popular items")
        line[:] = self.order
        return POPULARITY

    def _fold_in(self, had: np.ndarray) -> np.ndarray:
        self.task.scores(torch.zeros(1, dtype=torch.long, device=self.task.device))
        assert self.task._vectors is not None
        users, items = (vectors.double().cpu() for vectors in self.task._vectors)
        known = torch.from_numpy(self.popularity > 0)
        others = known.clone()
        others[torch.from_numpy(had)] = False
        active = torch.from_numpy(self.known.train.counts() > 0)
        vector = fold_in(items[torch.from_numpy(had)], items[others], users[active])
        return np.asarray((items @ vector).numpy())

    def _reasons(self, user: int | None, items: np.ndarray, count: int) -> dict[int, tuple[tuple[str, float], ...]]:
        if not (count and self.paths and user is not None and len(items)):
            return {}
        network: Any = self.task.network
        numbers = [int(item) for item in items]
        found = network.explain(user, numbers, paths=count)
        return {
            item: tuple((self._text(user, path.hops), float(path.weight)) for path in ways)
            for item, ways in zip(numbers, found)
        }

    def _text(self, user: int, hops: Iterable[Any]) -> str:
        graph = self.known.graph
        entities = graph.entities if graph is not None else self.known.items
        relations = graph.relations if graph is not None else []
        words = [self.known.users[user]]
        for hop in hops:
            relation = {-1: "had", -2: "had by"}.get(hop.relation) or relations[hop.relation]
            own = hop.node < len(entities)
            words += [f"-[{relation}]->", entities[hop.node] if own else self.known.users[hop.node - len(entities)]]
        return " ".join(words)

    def _items(self, user: str, names: Sequence[str]) -> np.ndarray:
        unknown = [name for name in names if name not in self.item_of]
        if unknown:
            shown = ", ".join(unknown[:_MOST_NAMES]) + (" …" if len(unknown) > _MOST_NAMES else "")
            self._note(f"user {user}: {len(unknown)} items of the history are unknown to the model ({shown})")
        return np.unique(np.array([self.item_of[name] for name in names if name in self.item_of], np.int64))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def fold_in(had: Tensor, others: Tensor, users: Tensor) -> Tensor:
    """A vector for a new user: what BPR would have given him, the items' vectors staying as they are.

    It minimises the sum over the items had of the mean over the others of -log sigmoid(score had - score of the other),
    plus what makes it a vector like those of the `users` trained: half the squared distance to their mean in units of
    their mean variance.

    Args:
        had: (P, D) vectors of the items of his history.
        others: (N, D) of all other items of training; at most 2,000 of them, evenly spaced, are looked at.
        users: (U, D) vectors of users.
    """
    step = max(1, -(-len(others) // _MOST_NEGATIVES))
    negative = others[::step]
    mean = users.mean(dim=0)
    variance = (users - mean).square().mean().clamp_min(1e-12)
    vector = mean.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([vector], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.softplus((negative @ vector)[None, :] - (had @ vector)[:, None])
        total = fit.sum() / max(1, len(negative)) + (vector - mean).square().sum() / (2 * variance)
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return vector.detach()


# -- files ------------------------------------------------------------------------------------------------------------


def read_users(path: Path) -> list[str]:
    """Users of a file, each once: its column of users, or one name a line."""
    names = [plain(word) for word in header(path)]
    if len(names) > 1 or not names:
        wanted = next((column for column in header(path) if plain(column) in ROLES["user"]), None)
        text = {wanted} if wanted else set()
        cells = read_cells(path, delimiter=None, text_columns=text, only=None, max_columns=10_000)
        column = next((column for column in cells.frame if plain(str(column)) in ROLES["user"]), None)
        if column is None:
            raise UserError(f"{path.name} has no column of users; call it user")
        found = [str(name).strip() for name in cells.frame[column].dropna()]
    else:
        try:
            found = [line.strip().strip('"') for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        found = [name for name in found[names[0] in ROLES["user"] :] if name]
    if not found:
        raise UserError(f"{path.name} names no user")
    return list(dict.fromkeys(found))


def read_history(path: str) -> dict[str, list[str]]:
    """User -> items, of a table with columns user and item."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no file {path}, which --history names")
    frame = read_table(file, ItemsDataConfig()).dropna(subset=["user", "item"])
    return {str(user): list(dict.fromkeys(items)) for user, items in frame.groupby("user", sort=False)["item"]}


def as_csv(found: Sequence[Recommendation]) -> str:
    """A row a recommendation; reasons in pairs of columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    width = max((len(one.reasons) for one in found), default=0)
    writer.writerow(
        ["user", "rank", "item", "score", "by", *(f"{w}_{i + 1}" for i in range(width) for w in ("path", "weight"))]
    )
    for one in found:
        reasons = [cell for text, weight in one.reasons for cell in (text, f"{weight:.6g}")]
        writer.writerow([one.user, one.rank, one.item, f"{one.score:.6g}", one.by, *reasons])
    return out.getvalue()


def as_json(found: Sequence[Recommendation]) -> str:
    """A list of objects."""
    rows = [
        {
            "user": one.user,
            "rank": one.rank,
            "item": one.item,
            "score": one.score,
            "by": one.by,
            "paths": [{"path": text, "weight": weight} for text, weight in one.reasons],
        }
        for one in found
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def predict_files(task: ItemsTask, inputs: Sequence[Path], output: Path, options: Mapping[str, Any]) -> list[Path]:
    """Recommendations for the users of each file: `<stem>_recommendations.csv`."""
    stems = [path.stem for path in inputs]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two inputs are called {stem!r} and would write the same file; rename one")
    recommender = Recommender(task)
    history = read_history(options["history"]) if options.get("history") else None
    written = []
    for path in inputs:
        found = recommender.recommend(
            read_users(path), k=options["k"], hide=options["hide"], paths=options["paths"], history=history
        )
        target = output / f"{path.stem}_recommendations.csv"
        write_atomically(target, as_csv(found))
        written.append(target)
    for note in recommender.notes:
        print(note, file=sys.stderr)
    return written
