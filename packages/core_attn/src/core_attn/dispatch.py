"""Which backend of an operator runs for which inputs, and why.

An operator (`core_attn.ops`) has several forms of the same function: a reference, a blocked form in PyTorch, library
kernels. Each form is a `Backend` that says, for a `Request`, why it cannot run or why it is not worth running.
`Operator` chooses. Nothing here falls back in silence: a backend asked for by name runs, or is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_attn.naming import unknown


class BackendError(ValueError):
    """A backend was asked for by name and cannot run for these inputs, or none can."""


class Request(NamedTuple):
    """What a backend may ask about a call. Made from tensors by `Request.of`, or by hand to explain a call in advance.

    Attributes:
        query: shape (B, H, L, D) of the queries.
        key: shape (B, Hkv, M, D) of the keys.
        value: shape (B, Hkv, M, Dv) of the values.
        dtype: dtype of the queries.
        device: device type, such as "cpu" or "cuda".
        requires_grad: whether a gradient of q, k, v or the bias will be asked for.
        causal: query i reads keys up to i + M - L.
        mask: a boolean mask is given.
        bias: an additive bias is given.
        bias_requires_grad: the gradient of the bias is wanted.
        key_padding: a key padding mask is given.
        window: (left, right) sliding window, None where unlimited; None without a window.
        dropout: probability of dropping a weight of the map.
        compiling: inside torch.compile or torch.export.
        options: whatever else the operator takes, by name.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    requires_grad: bool = False
    causal: bool = False
    mask: bool = False
    bias: bool = False
    bias_requires_grad: bool = False
    key_padding: bool = False
    window: tuple[int | None, int | None] | None = None
    dropout: float = 0.0
    compiling: bool = False
    options: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> Request:
        """The request that a call with these tensors makes."""
        grad = torch.is_grad_enabled()
        bias_grad = grad and bias is not None and bias.requires_grad
        return cls(
            tuple(q.shape),
            tuple(k.shape),
            tuple(v.shape),
            q.dtype,
            q.device.type,
            bias_grad or (grad and (q.requires_grad or k.requires_grad or v.requires_grad)),
            causal,
            mask is not None,
            bias is not None,
            bias_grad,
            key_padding_mask is not None,
            window,
            dropout,
            torch.compiler.is_compiling(),
            options,
        )

    @property
    def grouped(self) -> bool:
        """Several query heads read one key head."""
        return self.query[1] != self.key[1]


def _always(request: Request) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One form of an operator.

    Attributes:
        name: what `backend=` calls it.
        run: the function, with the operator's own arguments but `backend`.
        why_not: why it cannot give the right answer for a request, in words; None where it can.
        pass_over: why "auto" does not take it though it could run; None where it is worth taking.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Request], str | None] = _always
    pass_over: Callable[[Request], str | None] = _always


@dataclass(frozen=True)
class Choice:
    """One line of an explanation: would this backend run, is it the one that does, and why."""

    backend: str
    runs: bool
    reason: str
    chosen: bool


_OPERATORS: dict[str, Operator] = {}
_left_out: frozenset[str] = frozenset()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside the block "auto" takes no backend of these names, in any operator; by name they still run."""
    global _left_out
    before = _left_out
    _left_out = before | {*names}
    try:
        yield
    finally:
        _left_out = before


class Operator:
    """A named function with several backends, in order of preference (fastest first, reference last).

    Making one enters it among `operators()`; a second one of the same name replaces the first.

    Args:
        name: name of the operator.
        backends: its forms. "auto" takes the first that can run and is not passed over; where all that can run are
            passed over, the first that can run.
    """

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = tuple(backends)
        self._named = {b.name: b for b in self.backends}
        if len(self._named) != len(self.backends):
            raise ValueError(f"operator {name}: two backends of one name among {[b.name for b in self.backends]}")
        _OPERATORS[name] = self

    def __call__(self, *args: Any, backend: str = "auto", **options: Any) -> Any:
        """Run the chosen backend: `args` are q, k, v, then the operator's own options by keyword.

        Raises:
            BackendError: the backend asked for cannot run for these inputs.
            UnknownNameError: there is no such backend.
        """
        request = Request.of(*args, **options)
        return self.choose(request, backend).run(*args, **options)

    def choose(self, request: Request, backend: str = "auto") -> Backend:
        """The backend that runs for `request`; raises as `__call__` does."""
        if backend != "auto":
            named = self._named.get(backend)
            if named is None:
                raise unknown(f"backend of {self.name}", backend, ["auto", *self._named])
            reason = named.why_not(request)
            if reason is not None:
                raise BackendError(
                    f"backend {backend!r} of {self.name} cannot run here: {reason}; {self._would_run(request)}"
                )
            return named
        able = None
        for candidate in self.backends:
            if candidate.name not in _left_out and candidate.why_not(request) is None:
                if candidate.pass_over(request) is None:
                    return candidate
                able = able or candidate
        if able is None:
            reasons = "; ".join(f"{b.name}: {b.why_not(request)}" for b in self.backends)
            raise BackendError(f"no backend of {self.name} can run here ({reasons})")
        return able

    def explain(self, request: Request) -> list[Choice]:
        """What "auto" would do for `request`: one line a backend, in order of preference."""
        try:
            chosen = self.choose(request)
        except BackendError:
            chosen = None
        lines = []
        for b in self.backends:
            reason = b.why_not(request)
            runs = reason is None
            if b is chosen:
                reason = "fastest that is correct for these inputs"
            elif runs:
                reason = b.pass_over(request) or f"slower than {chosen.name} for these inputs"  # type: ignore[union-attr]
            lines.append(Choice(b.name, runs, str(reason), b is chosen))
        return lines

    def _would_run(self, request: Request) -> str:
        able = [b.name for b in self.backends if b.why_not(request) is None]
        return f"these would run: {', '.join(able)}" if able else "no other backend would run either"

    def __repr__(self) -> str:
        return f"Operator({self.name!r}, backends={[b.name for b in self.backends]})"


def operators() -> dict[str, Operator]:
    """All operators by name, sorted; imports every operator of `core_attn.ops`."""
    package = importlib.import_module("core_attn.ops")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_OPERATORS.items()))


def operator(name: str) -> Operator:
    """The operator called `name`.

    Raises:
        UnknownNameError: no such operator; the message names the nearest.
    """
    found = operators()
    if name not in found:
        raise unknown("operator", name, found)
    return found[name]
