"""Answers to mistyped names. Imports no torch: command lines use it before any heavy import."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownNameError(ValueError):
    """A name that is not in a closed list; the message names the nearest valid ones."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The valid names closest to `name`, best first; case, `-` and `_` do not count."""
    pool = list(choices)
    folded = {c.lower().replace("-", "_"): c for c in pool}
    key = name.lower().replace("-", "_")
    if key in folded:
        return [folded[key]]
    hits = difflib.get_close_matches(key, folded, n=n, cutoff=0.6)
    hits += [k for k in folded if key and (k.startswith(key) or key in k) and k not in hits]
    return [folded[h] for h in hits[:n]]


def unknown(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """The error for an unknown `kind` called `name`: what is wrong and what would be right, in one sentence."""
    pool = sorted(choices)
    close = nearest(name, pool)
    if close:
        return UnknownNameError(f"unknown {kind} {name!r}; did you mean {' or '.join(repr(c) for c in close)}?")
    listed = ", ".join(pool) if len(pool) <= 30 else ", ".join(pool[:30]) + ", …"
    return UnknownNameError(f"unknown {kind} {name!r}; there are: {listed or 'none'}")
