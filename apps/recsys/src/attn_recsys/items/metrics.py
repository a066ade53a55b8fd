"""Scores of rankings over all items that a user did not have.

For a user with wanted items W, of whose ranking the first k are looked at:

- recall@k: share of W among the first k.
- ndcg@k: DCG of the first k, sum of 1 / log2(1 + rank) over hits, divided by the DCG of min(k, |W|) hits in front.
- ndcg_kgat@k: the same DCG divided by that of the list's *own* hits moved to the front, 0 without hits. KGAT's official
  code does so, with the hits of the longest list scored (max of `k`); it forgives whatever was not found.
- precision@k, hit@k: share of hits among k; whether there is any.
- mrr: one over the rank of the first wanted item in the whole ranking, equal scores sharing their mean rank.
- auc: chance that a wanted item is ranked above an item that is neither wanted nor had, equal scores counting half.
- novelty@k: mean over the first k of -log2((c + 1) / (U + 1)), c of U users having had the item in training.
- coverage@k: share of all items that stand among the first k of at least one user.

All but coverage are means over users, whose rows are kept and put in order before anything is summed, so neither batch
size nor processes change a figure. A block of users is ranked at a time: nothing ever holds users x items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_shared.errors import UserError
from attn_shared.intervals import interval

SAMPLED = "sampled_"
_RESAMPLES = 1000
_META = 3  # index, items in training, wanted items


def names(ks: Sequence[int], *, sampled: bool = False) -> list[str]:
    """Names of the figures that each user has, in the order of `Block.rows`."""
    per_k = ("ndcg@{}", "recall@{}", "ndcg_kgat@{}", "precision@{}", "hit@{}", "novelty@{}")
    found = ["auc", "mrr", *(form.format(k) for k in ks for form in per_k)]
    return [f"{SAMPLED}{name}" for name in found] if sampled else found


def formats(ks: Sequence[int], *, sampled: bool = False) -> dict[str, str]:
    """Formats of the figures, the most telling first."""
    start = SAMPLED if sampled else ""
    main = [f"ndcg@{ks[0]}", f"recall@{ks[-1]}", "auc", f"ndcg_kgat@{ks[-1]}", f"hit@{ks[0]}", "mrr"]
    every = [*(start + name for name in main), *names(ks, sampled=sampled), *(f"coverage@{k}" for k in ks)]
    return {name: ".2f" if "novelty" in name else ".4f" for name in every}


@dataclass(frozen=True)
class Block:
    """The rankings of some users.

    Attributes:
        rows: (B, M) figures in the order of `names`.
        top: (B, K) items ranked first, -1 where there are fewer candidates.
    """

    rows: np.ndarray
    top: np.ndarray


def rank(
    scores: Tensor | np.ndarray,
    wanted: np.ndarray,
    seen: np.ndarray,
    ks: Sequence[int],
    surprise: np.ndarray,
    candidates: np.ndarray | None = None,
) -> Block:
    """Figures of a block of users.

    Args:
        scores: (B, I), the higher the better.
        wanted: (B, W) items to be found, -1 after the last; at least one each.
        seen: (B, S) items that are no candidates, -1 after the last.
        ks: lengths of lists.
        surprise: (I,) -log2 of the items' shares of users in training.
        candidates: (B, n) items among which the wanted ones are ranked, -1 after the last; None = all but `seen`.
    """
    values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
    if np.isnan(values).any():
        raise UserError("the scores are no longer numbers (NaN); try a smaller --optim.lr")
    values = np.maximum(values, np.finfo(values.dtype).min)  # -inf is for items that are no candidates
    items: np.ndarray | None = None
    if candidates is None:
        line, column = np.nonzero(seen >= 0)
        values[line, seen[line, column]] = -np.inf
        found = wanted
    else:
        # The drawn ones first: were all scores equal, the wanted ones would come last.
        items = np.concatenate([candidates, wanted], axis=1)
        values = np.where(items >= 0, np.take_along_axis(values, np.maximum(items, 0), axis=1), -np.inf)
        found = np.where(wanted >= 0, candidates.shape[1] + np.arange(wanted.shape[1]), -1)
    longest = max(ks)
    best, top = torch.topk(torch.from_numpy(values), min(longest, values.shape[1]), dim=1)
    places = np.where(np.isneginf(best.numpy()), -2, top.numpy())
    if places.shape[1] < longest:
        places = np.pad(places, ((0, 0), (0, longest - places.shape[1])), constant_values=-2)
    hits = (places[:, :, None] == found[:, None, :]).any(axis=2)
    auc, mrr = _whole_ranking(values, found)
    columns = [auc, mrr]
    gain = 1 / np.log2(np.arange(2, longest + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gain)])
    total, count = (found >= 0).sum(axis=1), hits.sum(axis=1)
    chosen = places if items is None else np.take_along_axis(items, np.maximum(places, 0), axis=1)
    chosen = np.where(places >= 0, chosen, -1)
    surprises = np.where(chosen >= 0, surprise[np.maximum(chosen, 0)], np.nan)
    for k in ks:
        dcg = hits[:, :k] @ gain[:k]
        own = ideal[np.minimum(count, k)]
        right = hits[:, :k].sum(axis=1)
        there = np.maximum(1, (chosen[:, :k] >= 0).sum(axis=1))
        columns += [
            dcg / ideal[np.minimum(total, k)],
            right / total,
            np.divide(dcg, own, out=np.zeros_like(dcg), where=own > 0),
            right / k,
            (right > 0).astype(float),
            np.nansum(surprises[:, :k], axis=1) / there,
        ]
    return Block(rows=np.stack(columns, axis=1).astype(np.float64), top=chosen)


def _whole_ranking(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and reciprocal rank of each row; AUC is NaN where every candidate is wanted."""
    ordered = np.sort(values, axis=1)
    width = values.shape[1]
    auc, mrr = np.empty(len(values)), np.empty(len(values))
    for row, (line, mine) in enumerate(zip(ordered, wanted)):
        own = values[row, mine[mine >= 0]]
        outside = np.searchsorted(line, -np.inf, side="right")
        low, high = np.searchsorted(line, own, side="left"), np.searchsorted(line, own, side="right")
        many, others = len(own), width - outside - len(own)
        # Wanted items among themselves make up many^2 / 2 of the sum, however they are ranked.
        above = (low - outside + (high - low) / 2).sum() - many * many / 2
        auc[row] = above / (many * others) if others else np.nan
        mrr[row] = 1 / ((width - high + 1) + (high - low - 1) / 2).min()
    return auc, mrr


def surprise(counts: np.ndarray, users: int) -> np.ndarray:
    """(I,) -log2 of the share of users who had each item in training."""
    return np.asarray(-np.log2((counts + 1) / (users + 1)))


# -- sums over batches and processes ----------------------------------------------------------------------------------


def pack(
    index: Tensor, activity: Tensor, wanted: Tensor, block: Block, items: int, ks: Sequence[int]
) -> dict[str, Tensor]:
    """A batch's entries of the metric state: the users' rows, and how often each item was recommended."""
    meta = np.stack([index.cpu(), activity.cpu(), (wanted >= 0).sum(dim=1).cpu()], axis=1).astype(np.float64)
    entries = {f"users {int(index[0])}": torch.from_numpy(np.concatenate([meta, block.rows], axis=1))}
    for k in ks:
        first = block.top[:, :k]
        counts = np.bincount(first[first >= 0], minlength=items).astype(np.float64)
        entries[f"recommended@{k}"] = torch.from_numpy(counts)
    return entries


def add(state: dict[str, Tensor], entries: Mapping[str, Tensor]) -> None:
    """Take a batch's entries into the state."""
    for name, value in entries.items():
        state[name] = state[name] + value if name.startswith("recommended@") and name in state else value


@dataclass(frozen=True)
class Users:
    """All users of a split, in order.

    Attributes:
        activity: (N,) items in training.
        figures: name -> (N,).
        recommended: k -> (I,) how many users were recommended each item; empty where candidates were sampled.
    """

    activity: np.ndarray
    figures: dict[str, np.ndarray]
    recommended: dict[int, np.ndarray]


def unpack(state: Mapping[str, Tensor], ks: Sequence[int], *, sampled: bool = False) -> Users | None:
    """All users of a metric state; None where there are none."""
    parts = [value.numpy() for name, value in state.items() if name.startswith("users ")]
    if not parts:
        return None
    rows = np.concatenate(parts)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    figures = {name: rows[:, _META + i] for i, name in enumerate(names(ks, sampled=sampled))}
    recommended = {} if sampled else {k: state[f"recommended@{k}"].numpy() for k in ks}
    return Users(activity=rows[:, 1], figures=figures, recommended=recommended)


def primary(ks: Sequence[int], *, sampled: bool = False) -> str:
    """The figure that chooses the best epoch."""
    return f"{SAMPLED if sampled else ''}ndcg@{ks[0]}"


def figures(users: Users, ks: Sequence[int], *, groups: int, intervals: bool) -> dict[str, float]:
    """Means over users, coverage, and, by group and with bounds of 95 % intervals, the main ones."""
    found = {name: float(np.nanmean(values)) if len(values) else np.nan for name, values in users.figures.items()}
    found |= {f"coverage@{k}": float((counts > 0).mean()) for k, counts in users.recommended.items()}
    start = SAMPLED if any(name.startswith(SAMPLED) for name in users.figures) else ""
    main = [f"{start}ndcg@{ks[0]}", f"{start}recall@{ks[-1]}"]
    for label, chosen in activity_groups(users.activity, groups):
        found |= {f"{name}, {label}": float(users.figures[name][chosen].mean()) for name in main}
    if intervals:
        several = [*main, f"{start}auc"]
        low, high = bootstrap(np.stack([users.figures[name] for name in several], axis=1))
        for i, name in enumerate(several):
            found |= interval(name, low[i], high[i])
    return found


def activity_groups(activity: np.ndarray, groups: int) -> list[tuple[str, np.ndarray]]:
    """Label and (N,) membership of about equally large groups of users; users of equal activity stay together."""
    if groups < 2 or not len(activity):
        return []
    edges = np.unique(np.quantile(activity, np.arange(1, groups) / groups, method="lower"))
    place = np.searchsorted(edges, activity, side="left")
    found = []
    for number in np.unique(place):
        chosen = place == number
        low, high = int(activity[chosen].min()), int(activity[chosen].max())
        found.append((f"users of {low}-{high} items" if low < high else f"users of {low} items", chosen))
    return found if len(found) > 1 else []


def bootstrap(values: np.ndarray, resamples: int = _RESAMPLES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(M,) 2.5 % and 97.5 % quantiles of the means of (N, M) under resampling of rows; NaN rows drop out by column."""
    rng = np.random.default_rng(seed)
    count = len(values)
    here = ~np.isnan(values)
    filled = np.where(here, values, 0.0)
    means = np.empty((resamples, values.shape[1]))
    for number in range(resamples):
        weight = np.bincount(rng.integers(0, count, count), minlength=count)
        means[number] = (weight @ filled) / np.maximum(1, weight @ here)
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)
