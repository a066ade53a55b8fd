"""What decoding token by token remembers: keys and values of earlier tokens.

Shapes: B batch, H key heads, T new tokens, N remembered tokens, D channels of a head, Dv of a value.

A cache changes in place and is used up by the step that it is given to: to go on from one point in two ways, take
`select` first. Where gradients flow through the keys, the cache holds new tensors instead and stays differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class FullCache:
    """Every key and value so far. Room grows by doubling, so that n steps copy O(n) tokens in all.

    Args:
        batch: B.
        heads: number of key heads H.
        head_dim: D.
        value_dim: Dv, D by default.
        device, dtype: of what is remembered; `append` returns the dtype of its arguments.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._keys = torch.empty(batch, heads, 0, head_dim, device=device, dtype=dtype)
        self._values = torch.empty(batch, heads, 0, head_dim if value_dim is None else value_dim).to(self._keys)
        self._start = self._stop = 0
        self.seen = 0

    def __len__(self) -> int:
        """Number of tokens remembered."""
        return self._stop - self._start

    @property
    def keys(self) -> Tensor:
        """(B, H, N, D), oldest first."""
        return self._keys[:, :, self._start : self._stop]

    @property
    def values(self) -> Tensor:
        """(B, H, N, Dv), oldest first."""
        return self._values[:, :, self._start : self._stop]

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return self._keys.nbytes + self._values.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember k (B, H, T, D) and v (B, H, T, Dv).

        Returns:
            All the new tokens may read: keys (B, H, N + T, D) and values (B, H, N + T, Dv), oldest first.

        Raises:
            ValueError: shapes that do not fit the cache.
        """
        self.check(k, v)
        count = k.shape[2]
        grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if grad or self._keys.requires_grad or self._values.requires_grad:
            self._keys = torch.cat([self.keys, k.to(self._keys.dtype)], dim=2)
            self._values = torch.cat([self.values, v.to(self._values.dtype)], dim=2)
            self._start, self._stop = 0, self._keys.shape[2]
        else:
            if self._stop + count > self._keys.shape[2]:
                self._make_room(len(self) + count)
            self._keys[:, :, self._stop : self._stop + count] = k
            self._values[:, :, self._stop : self._stop + count] = v
            self._stop += count
        self.seen += count
        return self.keys.to(k.dtype), self.values.to(v.dtype)

    def check(self, k: Tensor, v: Tensor) -> None:
        """Refuse what `append` cannot take.

        Raises:
            ValueError: shapes that do not fit the cache.
        """
        for name, new, held in (("k", k, self._keys), ("v", v, self._values)):
            fits = (*held.shape[:2], k.shape[2] if k.dim() == 4 else 0, held.shape[3])
            if new.shape != fits:
                raise ValueError(f"this cache takes {name} of shape (B, H, T, D) = {fits}, got {tuple(new.shape)}")

    def select(self, rows: Tensor) -> Self:
        """A new cache with the samples `rows` (int64) of this one, in that order: to branch, or to reorder beams."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._keys, twin._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        return twin

    def _make_room(self, needed: int) -> None:
        """Move what is remembered to the front of a buffer for at least `needed` tokens."""
        self._keys, self._values = (
            _moved(x, self._start, self._stop, self._room(needed)) for x in (self._keys, self._values)
        )
        self._start, self._stop = 0, len(self)

    def _room(self, needed: int) -> int:
        return max(16, 2 * needed)


class WindowCache(FullCache):
    """The last `left` keys and values, in constant memory: what causal attention with a window of left + 1 keys needs.

    Args:
        batch, heads, head_dim, value_dim, device, dtype: as in `FullCache`.
        left: number of tokens before a query that it may read.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        left: int,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if left < 0:
            raise ValueError(f"left must be at least 0, got {left}")
        super().__init__(batch, heads, head_dim, value_dim=value_dim, device=device, dtype=dtype)
        self.left = left

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().append(k, v)
        self._start = max(self._start, self._stop - self.left)
        if self._keys.shape[2] > self._room(0):
            # A long first piece passed through: what it returns stays valid, the cache keeps only its end.
            self._make_room(0)
        return keys, values

    def _room(self, needed: int) -> int:
        # Twice the window: the remembered tokens move to the front only once in `left` steps.
        return max(needed, 2 * (self.left + 1))


class SinkCache:
    """The first `sinks` keys and values and the last `left`, in constant memory.

    The rolling cache of "Efficient Streaming Language Models with Attention Sinks" (S27), section 3.2: what lies
    between is forgotten. Keys go in before any rotation, as their positions are those inside the cache.

    Args:
        batch, heads, head_dim, value_dim, device, dtype: as in `FullCache`.
        sinks: number of first tokens that are never forgotten.
        left: number of tokens before a query that it may read besides the sinks.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        sinks: int,
        left: int,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {sinks}")
        sizes = (batch, heads, head_dim)
        self.sinks = sinks
        self._first = FullCache(*sizes, value_dim=value_dim, device=device, dtype=dtype)
        self._last = WindowCache(*sizes, left=left, value_dim=value_dim, device=device, dtype=dtype)

    def __len__(self) -> int:
        """Number of tokens remembered."""
        return len(self._first) + len(self._last)

    @property
    def seen(self) -> int:
        """Number of tokens so far."""
        return self._first.seen + self._last.seen

    @property
    def keys(self) -> Tensor:
        """(B, H, N, D), oldest first."""
        return torch.cat([self._first.keys, self._last.keys], dim=2)

    @property
    def values(self) -> Tensor:
        """(B, H, N, Dv), oldest first."""
        return torch.cat([self._first.values, self._last.values], dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return self._first.nbytes + self._last.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember k (B, H, T, D) and v (B, H, T, Dv).

        Returns:
            All the new tokens may read: keys (B, H, N + T, D) and values (B, H, N + T, Dv), oldest first. Where they
            stand in this order is their position.

        Raises:
            ValueError: shapes that do not fit the cache.
        """
        self._first.check(k, v)
        here = min(self.sinks - len(self._first), k.shape[2])
        first = self._first.append(k[:, :, :here], v[:, :, :here])
        last = self._last.append(k[:, :, here:], v[:, :, here:])
        return torch.cat([first[0], last[0]], dim=2), torch.cat([first[1], last[1]], dim=2)

    def select(self, rows: Tensor) -> Self:
        """A new cache with the samples `rows` (int64) of this one, in that order: to branch, or to reorder beams."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _first=self._first.select(rows), _last=self._last.select(rows))
        return twin


class MixedCache:
    """Heads that remember in different ways, such as everything in some and sinks with a window in the others.

    Args:
        parts: (heads, their cache), one a way: the indices of the heads, and a cache for so many.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], FullCache | SinkCache]]) -> None:
        self.parts = [(torch.tensor(list(heads), dtype=torch.int64), cache) for heads, cache in parts]

    @property
    def seen(self) -> int:
        """Number of tokens so far."""
        return self.parts[0][1].seen if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return sum(cache.nbytes for _, cache in self.parts)

    def append(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Remember k (B, H, T, D) and v (B, H, T, Dv) of all heads.

        Returns:
            What each part's cache returns: all that the new tokens may read in the heads of that part.

        Raises:
            ValueError: shapes that do not fit the caches.
        """
        return [
            cache.append(k.index_select(1, heads.to(k.device)), v.index_select(1, heads.to(v.device)))
            for heads, cache in self.parts
        ]

    def select(self, rows: Tensor) -> Self:
        """A new cache with the samples `rows` (int64) of this one, in that order: to branch, or to reorder beams."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, parts=[(heads, cache.select(rows)) for heads, cache in self.parts])
        return twin


def _moved(x: Tensor, start: int, stop: int, room: int) -> Tensor:
    if x.requires_grad:
        return x[:, :, start:stop]
    moved = x.new_empty(*x.shape[:2], room, x.shape[3])
    moved[:, :, : stop - start] = x[:, :, start:stop]
    return moved
