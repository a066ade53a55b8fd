"""What decoding token by token remembers: keys and values of earlier tokens.

Shapes: B batch, H key heads, T new tokens, N remembered tokens, D channels of a head, Dv of a value.

A cache changes in place and is used up by the step that it is given to: to go on from one point in two ways, take
`select` first. Where gradients flow through the keys, the cache holds new tensors instead and stays differentiable.
"""

from __future__ import annotations

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
        for name, new, held in (("k", k, self._keys), ("v", v, self._values)):
            fits = (*held.shape[:2], k.shape[2] if k.dim() == 4 else 0, held.shape[3])
            if new.shape != fits:
                raise ValueError(f"this cache takes {name} of shape (B, H, T, D) = {fits}, got {tuple(new.shape)}")
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


def _moved(x: Tensor, start: int, stop: int, room: int) -> Tensor:
    if x.requires_grad:
        return x[:, :, start:stop]
    moved = x.new_empty(*x.shape[:2], room, x.shape[3])
    moved[:, :, : stop - start] = x[:, :, start:stop]
    return moved
