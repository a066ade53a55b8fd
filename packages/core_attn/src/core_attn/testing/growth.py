"""How much work and memory a computation takes, counted instead of timed, so that two runs give the same figures."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from core_attn.contract import Growth

aten = torch.ops.aten

# Reading a few places of a large tensor, or writing them, does not touch all of it.
_READS_PLACES = {aten.gather, aten.index, aten.index_select, aten.embedding, aten.take}
_WRITES_PLACES = {aten.index_put_, aten.scatter_, aten.scatter_add_, aten.index_add_, aten.index_copy_}
_FFT = {aten._fft_r2c, aten._fft_c2r, aten._fft_c2c}
_SORTS = {aten.sort, aten.topk, aten.argsort}
# Sparse products: rows chosen by index times weights, or times other rows.
_BAGS = {aten._embedding_bag, aten._embedding_bag_forward_only, aten._embedding_bag_per_sample_weights_backward}


@dataclass(frozen=True)
class Count:
    """What one computation took.

    Attributes:
        work: floating point operations of matrix products, attention kernels and transforms, plus the elements that
            every other operation reads and writes.
        peak_bytes: the most bytes alive at once, of tensors made during the computation.
        flops: the floating point operations alone: 2 n m k of a product of matrices, attention kernels over the whole
            square even where causal, 2 of each element that a sparse product by index reads, and of transforms
            5 N log2 N, half of that where one side is real.
    """

    work: float
    peak_bytes: int
    flops: float


class CountingMode(TorchDispatchMode):
    """Counts every operation below it, backward passes and the inside of custom operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0
        self.flops = 0.0
        self.bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims") and func._overloadpacket not in flop_registry:
            # A custom operator: run its kernel under this mode, so that what it does inside is counted. One in another
            # language says what it takes with `torch.utils.flop_counter.register_flop_formula` instead.
            tensors = _tensors((*args, *kwargs.values()))
            key = torch._C.DispatchKey.CUDA if any(t.is_cuda for t in tensors) else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd):
            # Inside a custom operator nothing has taken these apart: torch.fft.rfft is no single transform there.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if _is_view(func):
            return out
        inputs, outputs = _tensors((*args, *kwargs.values())), _tensors((out,))
        products = _products(func, args, kwargs, out, inputs)
        transforms = _transforms(func, args, inputs, outputs)
        self.flops += products + transforms
        self.work += products or transforms or _touched(func, inputs, outputs)
        # A sparse tensor has no storage of its own; what it is made of was counted.
        given = {t.untyped_storage()._cdata for t in inputs if t.layout is torch.strided}
        for t in outputs:
            if t.layout is not torch.strided:
                continue
            if t.untyped_storage()._cdata not in given:  # views, and results written in place, take no new memory
                self._track(t)
        return out

    def _track(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._live[key]
            self.bytes -= size

        self._live[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def count(computation: Callable[[], Any]) -> Count:
    """Run `computation` and count it. Its inputs must exist already: only what it makes is counted."""
    mode = CountingMode()
    with mode:
        kept = computation()
    del kept
    return Count(mode.work, mode.peak_bytes, mode.flops)


def exponent(figures: Sequence[float]) -> float:
    """Slope of log figure over log length at the last doubling of the length: 1 for L, 2 for L^2."""
    return math.log2(figures[-1] / figures[-2])


def rising_exponent(figures: Sequence[float]) -> float:
    """The same of what each doubling adds: lower orders, which hide the highest at short lengths, weigh less."""
    added, before = figures[-1] - figures[-2], figures[-2] - figures[-3]
    return math.log2(added / before) if added > 0 < before else exponent(figures)


def expected_exponent(growth: Growth, length: int) -> float:
    """What `exponent` would be for exactly this order when lengths end at `length`."""
    if growth is Growth.LOGLINEAR:
        return 1 + math.log2(math.log(length) / math.log(length / 2))
    return {Growth.CONSTANT: 0.0, Growth.LINEAR: 1.0, Growth.ROOT: 1.5, Growth.QUADRATIC: 2.0}[growth]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an operator, lists of them included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [t for t in value if isinstance(t, Tensor)]
    return found


@functools.cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@functools.cache
def _out_of_place(packet: Any) -> Any:
    """The operator of which `packet` writes into its first argument, as torch's table of FLOPs names only that one."""
    name = packet.__name__
    return getattr(aten, name[:-1], packet) if name.endswith("_") and not name.endswith("__") else packet


def _products(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, inputs: Sequence[Tensor]) -> float:
    """FLOPs of dense and sparse products of matrices; 0 for everything else."""
    packet = _out_of_place(func._overloadpacket)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if "scaled_dot_product" in packet.__name__:  # kernels that torch's own table lacks: q, k, v come first
        backward = "backward" in packet.__name__
        q, k, v = inputs[1:4] if backward else inputs[:3]
        products = q.shape[:-1].numel() * k.shape[-2]
        return 2.0 * products * (q.shape[-1] + v.shape[-1]) * (2.5 if backward else 1)
    if packet in _BAGS:
        rows, indices = (inputs[1], inputs[2]) if "backward" in packet.__name__ else inputs[:2]
        return 2.0 * indices.numel() * rows.shape[-1]
    return 0.0


def _transforms(func: Any, args: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """FLOPs of Fourier transforms by the customary 5 N log2 N, half where one side is real; 0 for everything else."""
    packet = func._overloadpacket
    if packet not in _FFT:
        return 0.0
    # The side of full length: a real transform keeps only half of the frequencies.
    elements = max(t.numel() for t in [*inputs, *outputs])
    points = math.prod(max(inputs[0].shape[d], outputs[0].shape[d]) for d in args[1])
    return (5.0 if packet is aten._fft_c2c else 2.5) * elements * max(1.0, math.log2(max(points, 2)))


def _touched(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Elements that an operation without products reads and writes."""
    packet = func._overloadpacket
    written = sum(t.numel() for t in outputs)
    if packet in _SORTS:
        return inputs[0].numel() * max(1.0, math.log2(max(inputs[0].shape[-1] if inputs[0].dim() else 1, 2)))
    if packet in _READS_PLACES:
        return float(written + sum(t.numel() for t in inputs[1:]))
    if packet in _WRITES_PLACES:
        return float(sum(t.numel() for t in inputs[1:]))
    return float(written + sum(t.numel() for t in inputs))
