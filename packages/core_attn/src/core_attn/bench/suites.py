"""Suites: exact, local, sparse and linear attention beside what people use instead, on this machine's CPU.

A suite is a list of cases; a case is one problem that several functions solve. They take turns, after one run of each
to warm up, in one process and one thread, and the least CPU time of the process in all rounds counts: whatever else the
machine does can only add to it.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_attn import api, ops, registry
from core_attn.bench.mechanisms import _machine, write
from core_attn.cli import SUITES, columns
from core_attn.contract import Pattern
from core_attn.dispatch import Request, operator
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.naming import unknown

Function = Callable[..., Tensor]
# The linear and recurrent family as mechanisms.
LINEAR = (
    "gla",
    "vig",
    "lightnet",
    "lightning",
    "transnormer_llm",
    "retention",
    "mamba2",
    "delta_net",
    "titans",
    "hedgehog",
    "nala",
    "inline",
    "transnormer",
    "agent",
    "hyena",
    "rat",
    "flow",
)


class Missing(Exception):
    """Something to be measured is not there; the message is a sentence."""


@dataclass(frozen=True)
class Entry:
    """One way to solve a case.

    Attributes:
        name: what the table calls it.
        make: gives the function of the case's tensors; raises `Missing` where it cannot be had.
        trains: whether it has a backward.
        tensors: makes the tensors that it takes, where they are not the case's: gates besides, or a convolution's.
    """

    name: str
    make: Callable[[], Function]
    trains: bool = True
    tensors: Callable[[], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """One problem: ours beside the alternatives.

    Attributes:
        name: the problem in words, sizes included.
        tensors: makes the tensors that every function takes.
        ours, others: each of ours is compared with each of the others.
        series: cases of one series are the same problem at growing lengths; none where it is empty.
        length: tokens L, in a series.
    """

    name: str
    tensors: Callable[[], Sequence[Tensor]]
    ours: Sequence[Entry]
    others: Sequence[Entry]
    series: str = ""
    length: int = 0


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """One of ours beside one alternative.

    Attributes:
        case: the problem.
        ours, other: names.
        forward_ms, train_ms: least CPU time of forward without gradients, and of forward + backward; NaN without one.
        peak_mb: the most memory held at once in forward + backward (or forward where there is no backward), beside the
            inputs, as torch's allocator reports it.
        other_forward_ms, other_train_ms, other_peak_mb: the same of the alternative.
        forward_times, train_times: how many times as fast as the alternative ours is.
        growth, other_growth: slope of log train_ms over log L since the next shorter length of the case's series; NaN
            at the first, and where the case is in none.
    """

    case: str
    ours: str
    other: str
    forward_ms: float
    train_ms: float
    peak_mb: float
    other_forward_ms: float
    other_train_ms: float
    other_peak_mb: float
    forward_times: float
    train_times: float
    growth: float = math.nan
    other_growth: float = math.nan


@dataclass(frozen=True)
class SuiteRows:
    """A suite's rows with its settings, its machine, and a sentence on everything that could not be measured."""

    suite: str
    rows: tuple[SuiteRow, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]


@dataclass(frozen=True)
class _Sizes:
    """B, H and D of sequences; the lengths; and the images' sides and heads."""

    lengths: Sequence[int] = ()
    batch: int = 1
    heads: int = 8
    width: int = 64
    side: int = 56
    image_heads: int = 4
    image_width: int = 32
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    defaults: dict[str, Sequence[int]] = field(
        default_factory=lambda: {
            "exact": (512, 2048, 4096),
            "local": (2048, 8192),
            "sparse": (8192,),
            "linear": (512, 1024, 2048, 4096, 8192),
        }
    )

    def of(self, suite: str) -> Sequence[int]:
        return self.lengths or self.defaults[suite]

    def tokens(self, length: int, dtype: torch.dtype) -> list[Tensor]:
        return _random((self.batch, self.heads, length, self.width), dtype)

    def sequence(self, length: int, dtype: torch.dtype) -> str:
        return f"L {length:,}, B{self.batch} H{self.heads} D{self.width}, {_short(dtype)}"

    def image(self, dtype: torch.dtype) -> str:
        return f"{self.side} x {self.side}, {self.image_heads} heads of {self.image_width}, {_short(dtype)}"


def measure_suite(
    suite: str,
    *,
    lengths: Sequence[int] = (),
    batch: int = 1,
    heads: int | None = None,
    head_dim: int = 64,
    side: int = 56,
    dtype: torch.dtype | str | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> SuiteRows:
    """Run a suite on the CPU in one thread.

    Args:
        suite: "exact", "local", "sparse" or "linear".
        lengths: of the sequences; by default 512, 2,048 and 4,096 (exact), 2,048 and 8,192 (local), 8,192 (sparse),
            512 to 8,192 by doubling (linear).
        batch, heads, head_dim: B, H and D of the sequences; H is 8 by default, in "linear" 4.
        side: of the images in neighbourhood attention, which have 4 heads of 32.
        dtype: float32, and for "exact" bfloat16 as well, by default.
        rounds: timings of each; the least counts.
        progress: called with a line of text as the run goes on.

    Raises:
        UnknownNameError: no such suite or dtype.
        ValueError: no rounds.
    """
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds and batch must be positive, got {rounds} and {batch}")
    both = (torch.float32, torch.bfloat16) if suite == "exact" else (torch.float32,)
    dtypes = both if dtype is None else (api.as_dtype(dtype),)
    if heads is None:
        heads = 4 if suite == "linear" else 8
    sizes = _Sizes(tuple(lengths), batch, heads, head_dim, side, dtypes=dtypes)
    cases = list({"exact": _exact, "local": _local, "sparse": _sparse, "linear": _linear}[suite](sizes))
    rows: list[tuple[Case, SuiteRow]] = []
    notes: dict[str, None] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = _machine("cpu")
        _warm_allocator()
        for case in cases:
            if progress is not None:
                progress(case.name)
            rows += [(case, row) for row in _measured(case, rounds, notes)]
    finally:
        torch.set_num_threads(threads)
    settings = {
        "lengths": [*sizes.of(suite)],
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "side": side,
        "dtypes": [_short(d) for d in dtypes],
        "rounds": rounds,
    }
    return SuiteRows(suite, tuple(_in_series(rows)), tuple(notes), settings, machine)


# --- the cases ------------------------------------------------------------------------------------------------------


def _exact(sizes: _Sizes) -> Iterator[Case]:
    backends = [b for b in operator("softmax_attention").backends if b.name not in ("sdpa", "reference")]
    for dtype in sizes.dtypes:
        for length in sizes.of("exact"):
            for causal in (False, True):
                shape = (sizes.batch, sizes.heads, length, sizes.width)
                asked = Request(shape, shape, shape, dtype, causal=causal)
                yield Case(
                    f"{'causal' if causal else 'all pairs'}, {sizes.sequence(length, dtype)}",
                    partial(sizes.tokens, length, dtype),
                    [
                        Entry(
                            b.name,
                            partial(_backend, b.name, asked, causal),
                            b.why_not(asked._replace(requires_grad=True)) is None,
                        )
                        for b in backends
                    ],
                    [Entry("SDPA", partial(_sdpa, causal))],
                )


def _local(sizes: _Sizes, window: int = 256, kernel: int = 7, dilation: int = 8) -> Iterator[Case]:
    for dtype in sizes.dtypes:
        for length in sizes.of("local"):
            yield Case(
                f"causal window {window}, {sizes.sequence(length, dtype)}",
                partial(sizes.tokens, length, dtype),
                [Entry("window_attention", partial(_operator, "window_attention", window=window, causal=True))],
                [
                    Entry("SDPA, mask", partial(_masked, partial(_band, length, window))),
                    Entry("local-attention", partial(_local_attention, window)),
                ],
            )
        image = partial(_random, (sizes.batch, sizes.image_heads, sizes.side * sizes.side, sizes.image_width), dtype)
        grid = (sizes.side, sizes.side)
        near = partial(_operator, "neighborhood_attention", grid=grid, kernel_size=kernel)
        yield Case(
            f"2-D neighbourhood {kernel}, {sizes.image(dtype)}",
            image,
            [Entry("neighborhood_attention", near)],
            [
                Entry("SDPA, mask", partial(_masked, partial(_neighbours, sizes.side, kernel))),
                Entry("natten", partial(_natten, grid, kernel), trains=False),
            ],
        )
        if kernel * dilation <= sizes.side:
            yield Case(
                f"2-D neighbourhood {kernel}, dilation {dilation}, {sizes.image(dtype)}",
                image,
                [Entry(f"dilation {dilation}", partial(near, dilation=dilation))],
                [Entry("dilation 1", near)],
            )
        for length in sizes.of("local"):
            yield _mechanism_case("longlora", sizes, length, dtype)


def _sparse(sizes: _Sizes, density: float = 0.1, block: int = 64) -> Iterator[Case]:
    for dtype in sizes.dtypes:
        for length in sizes.of("sparse"):
            yield Case(
                f"blocks of {block}, {density:.0%} of them, {sizes.sequence(length, dtype)}",
                partial(sizes.tokens, length, dtype),
                [Entry("block_sparse_attention", partial(_block_sparse, length, block, density))],
                [Entry("SDPA, mask", partial(_masked, partial(_dense_blocks, length, block, density)))],
            )
            for name in ("s2", "routing", "landmark", "infllm"):
                yield _mechanism_case(name, sizes, length, dtype)


def _linear(sizes: _Sizes) -> Iterator[Case]:
    for dtype in sizes.dtypes:
        for length in sorted(set(sizes.of("linear"))):
            yield Case(
                f"operators, causal, {sizes.sequence(length, dtype)}",
                partial(sizes.tokens, length, dtype),
                _linear_operators(sizes, length, dtype),
                [Entry("SDPA", partial(_sdpa, True))],
                f"operators, {_short(dtype)}",
                length,
            )
            for causal in (True, False):
                names = [name for name in LINEAR if _is_causal(name) is causal]
                if names:
                    yield _modules_case(names, causal, sizes, length, dtype)


def _linear_operators(sizes: _Sizes, length: int, dtype: torch.dtype) -> list[Entry]:
    """The operators of the family, with gates as mechanisms give them; where it matters, with the strongest too."""
    tokens = partial(sizes.tokens, length, dtype)
    gates = (sizes.batch, sizes.heads, length)

    def gated(weakest: float, strongest: float) -> list[Tensor]:
        return [*tokens(), _uniform((*gates, sizes.width), weakest, strongest)]

    def scalar() -> list[Tensor]:
        return [*tokens(), _uniform(gates, 0.0, -0.5)]

    def delta() -> list[Tensor]:
        q, k, v = tokens()
        return [q, F.normalize(k.float(), dim=-1).to(dtype), v, _uniform(gates, 0.0, 1.0).to(dtype)]

    def titans() -> list[Tensor]:
        q, k, v, _ = delta()
        return [q, k, v, *(_uniform(gates, 0.0, far).to(dtype) for far in (0.05, -0.2, -0.05))]

    def features() -> list[Tensor]:
        q, k, v = tokens()
        return [q.exp(), k.exp(), v]

    def convolution() -> list[Tensor]:
        channels = sizes.heads * sizes.width
        (x,) = _random((sizes.batch, channels, length), dtype, 1)
        (kernel,) = _random((channels, length), dtype, 1)
        return [x, kernel / length]

    slopes = -torch.exp2(-8.0 * torch.arange(1, sizes.heads + 1) / sizes.heads)
    return [
        Entry(
            "gated_linear_attention",
            partial(_with_gate, "gated_linear_attention", "log_gate"),
            tensors=partial(gated, 0.0, -0.1),
        ),
        Entry(
            "gated_linear_attention, gates to -30",
            partial(_with_gate, "gated_linear_attention", "log_gate"),
            tensors=partial(gated, 0.0, -30.0),
        ),
        Entry("scalar_decay_attention, fixed", partial(_operator, "scalar_decay_attention", log_decay=slopes)),
        Entry(
            "scalar_decay_attention, of the token",
            partial(_with_gate, "scalar_decay_attention", "log_decay"),
            tensors=scalar,
        ),
        Entry("delta_rule", partial(_with_gate, "delta_rule", "beta"), tensors=delta),
        Entry(
            "titans_memory",
            partial(_with_gate, "titans_memory", "rate", "log_momentum", "log_decay"),
            tensors=titans,
        ),
        Entry("kernel_attention", partial(_operator, "kernel_attention", causal=True), tensors=features),
        Entry("flow_attention", partial(_operator, "flow_attention", causal=True)),
        Entry("fft_conv, kernel of L", partial(_operator, "fft_conv"), tensors=convolution),
    ]


def _modules_case(names: Sequence[str], causal: bool, sizes: _Sizes, length: int, dtype: torch.dtype) -> Case:
    dim = sizes.heads * sizes.width
    pattern = "causal" if causal else "all tokens"
    build = partial(_built, dim=dim, heads=sizes.heads, dtype=dtype, causal=causal, weights=True)
    return Case(
        f"modules, {pattern}, projections included, {sizes.sequence(length, dtype)}",
        partial(_random, (sizes.batch, length, dim), dtype, 1),
        [Entry(name, partial(build, name)) for name in names],
        [Entry("softmax by SDPA", partial(_softmax_module, partial(_sdpa, causal), partial(build, "softmax")))],
        f"modules, {pattern}, {_short(dtype)}",
        length,
    )


def _is_causal(name: str) -> bool:
    """Whether the mechanism is measured causal; what is not there counts as causal and is told there."""
    return name not in registry.names() or Pattern.CAUSAL_SELF in registry.get(name).info.patterns


def _mechanism_case(name: str, sizes: _Sizes, length: int, dtype: torch.dtype) -> Case:
    """A causal mechanism with its default options beside SDPA with a mask; projections only where it owns them."""
    dim = sizes.heads * sizes.width
    whole, reads = False, ""
    if name in registry.names():
        whole = registry.get(name).forward is not MultiHeadMixer.forward
        read = api.build(name, dim=dim, heads=sizes.heads, causal=True).sizes(batch=1, length=length)["P"]
        reads = f", {read / length**2:.1%} of all pairs"
    mask = partial(_band, length, None)
    build = partial(_built, name, dim, sizes.heads, dtype)
    if whole:
        return Case(
            f"{name}, causal{reads}, projections included, {sizes.sequence(length, dtype)}",
            partial(_random, (sizes.batch, length, dim), dtype, 1),
            [Entry(name, build)],
            [
                Entry(
                    "softmax by SDPA, mask",
                    partial(
                        _softmax_module, partial(_masked, mask), partial(_built, "softmax", dim, sizes.heads, dtype)
                    ),
                )
            ],
        )
    return Case(
        f"{name}, causal{reads}, {sizes.sequence(length, dtype)}",
        partial(sizes.tokens, length, dtype),
        [Entry(name, partial(_attend, build))],
        [Entry("SDPA, mask", partial(_masked, mask))],
    )


# --- what they run --------------------------------------------------------------------------------------------------


def _operator(name: str, **options: Any) -> Function:
    function = getattr(ops, name, None)
    if function is None:
        raise Missing(f"the operator {name} is not in this version of core_attn")
    return partial(function, **options)


def _backend(name: str, asked: Request, causal: bool) -> Function:
    backend = next(b for b in operator("softmax_attention").backends if b.name == name)
    reason = backend.why_not(asked)
    if reason is not None:
        raise Missing(f"backend {name} cannot run here ({reason})")
    return partial(ops.softmax_attention, causal=causal, backend=name)


def _with_gate(name: str, *gates: str) -> Function:
    """An operator as a function of q, k, v and its gates, so that they have their gradients too."""
    function = _operator(name)
    return lambda q, k, v, *g: function(q, k, v, **dict(zip(gates, g, strict=True)))


def _built(
    name: str, dim: int, heads: int, dtype: torch.dtype, causal: bool = True, weights: bool = False
) -> MultiHeadMixer:
    """The module; `weights` says whether its weights have gradients, as in training."""
    if name not in registry.names():
        raise Missing(f"the mechanism {name} is not in this version of core_attn")
    torch.manual_seed(0)
    mixer: Any = api.build(name, dim=dim, heads=heads, causal=causal).to(dtype).eval()
    if not weights:
        mixer.requires_grad_(False)
    return mixer


def _attend(build: Callable[[], MultiHeadMixer]) -> Function:
    mixer = build()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = mixer.merge_heads(q)
        aux = mixer.side_input(q, k, x=x, query_padding_mask=None, grid=None, generator=None)
        return mixer.attend(q, k, v, key_padding_mask=None, aux=aux)

    return attend


def _sdpa(causal: bool) -> Function:
    return partial(F.scaled_dot_product_attention, is_causal=causal)


def _masked(mask: Callable[[], Tensor]) -> Function:
    return partial(F.scaled_dot_product_attention, attn_mask=mask())


def _softmax_module(make: Callable[[], Function], build: Callable[[], MultiHeadMixer]) -> Function:
    """Softmax attention as a module, computed by what `make` gives."""
    mixer = build()
    attend = make()
    object.__setattr__(mixer, "attend", lambda q, k, v, **_: attend(q, k, v))
    return mixer


def _local_attention(window: int) -> Function:
    try:
        from local_attention import LocalAttention
    except ImportError:
        raise Missing("local-attention is not installed") from None
    module: Function = LocalAttention(
        window, causal=True, look_backward=1, autopad=True, exact_windowsize=True, use_rotary_pos_emb=False
    )
    return module


def _natten(grid: tuple[int, int], kernel: int) -> Function:
    try:
        from natten import na2d
    except ImportError:
        raise Missing("natten is not installed") from None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # (B, H, L, D) -> (B, height, width, H, D)
        return na2d(*(t.transpose(1, 2).unflatten(1, grid) for t in (q, k, v)), kernel_size=kernel)

    return attend


def _block_sparse(length: int, block: int, density: float) -> Function:
    return _operator("block_sparse_attention", blocks=_blocks(length, block, density), block_size=block)


def _random(shape: tuple[int, ...], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def _uniform(shape: tuple[int, ...], first: float, last: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return first + (last - first) * torch.rand(shape, generator=generator)


def _band(length: int, window: int | None) -> Tensor:
    band = torch.ones(length, length, dtype=torch.bool).tril_()
    return band if window is None else band.triu_(1 - window)


def _neighbours(side: int, kernel: int) -> Tensor:
    """(L, L) pairs of an image's tokens that a neighbourhood joins: windows move inwards at the borders."""
    place = torch.arange(side)
    start = (place - kernel // 2).clamp(0, max(side - kernel, 0))[:, None]
    near = (place >= start) & (place < start + kernel)
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(side * side, side * side)


def _blocks(length: int, block: int, density: float) -> Tensor:
    """(n, n) blocks: the diagonal, so that every query reads something, and random others."""
    n = math.ceil(length / block)
    random = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    random.fill_diagonal_(-1.0)
    chosen = torch.zeros(n * n, dtype=torch.bool)
    chosen[random.flatten().topk(max(n, round(density * n * n)), largest=False).indices] = True
    return chosen.view(n, n)


def _dense_blocks(length: int, block: int, density: float) -> Tensor:
    blocks = _blocks(length, block, density)
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)[:length, :length].contiguous()


# --- measuring ------------------------------------------------------------------------------------------------------


def _measured(case: Case, rounds: int, notes: dict[str, None]) -> Iterator[SuiteRow]:
    """Rows of a case; what could not run is told in `notes`, once each."""
    shared = case.tensors()
    jobs: dict[str, dict[str, Callable[[], Any]]] = {}
    peaks: dict[str, float] = {}
    for entry in [*case.ours, *case.others]:
        try:
            function = entry.make()
            tensors = shared if entry.tensors is None else entry.tensors()
            runs: dict[str, Callable[[], Any]] = {"forward": partial(_forward, function, tensors)}
            if entry.trains:
                runs["train"] = partial(_train, function, tensors)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other packages' advice on how to use them
                for run in runs.values():
                    run()  # warm-up: compiles, caches
            peaks[entry.name] = _peak_mb([*runs.values()][-1])
        except Missing as missing:
            notes[f"Not measured: {missing}."] = None
            continue
        except (ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes[f"Not measured: {entry.name} in {case.name}: {reason}"] = None
            continue
        jobs[entry.name] = runs
    least: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, runs in jobs.items():
            for what, run in runs.items():
                taken = _cpu_seconds(run)
                least[name, what] = min(taken, least.get((name, what), math.inf))
    for ours in case.ours:
        for other in case.others:
            if ours.name not in jobs or other.name not in jobs:
                continue
            mine, its = (
                {what: 1e3 * least.get((e.name, what), math.nan) for what in ("forward", "train")}
                for e in (ours, other)
            )
            yield SuiteRow(
                case=case.name,
                ours=ours.name,
                other=other.name,
                forward_ms=mine["forward"],
                train_ms=mine["train"],
                peak_mb=peaks[ours.name],
                other_forward_ms=its["forward"],
                other_train_ms=its["train"],
                other_peak_mb=peaks[other.name],
                forward_times=its["forward"] / mine["forward"],
                train_times=its["train"] / mine["train"],
            )


def _forward(function: Function, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        function(*tensors)


def _train(function: Function, tensors: Sequence[Tensor]) -> None:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = function.parameters() if isinstance(function, nn.Module) else ()
    leaves += [p for p in weights if p.requires_grad]
    torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def _in_series(rows: Sequence[tuple[Case, SuiteRow]]) -> list[SuiteRow]:
    """The rows with how they grow; those of a series stand together, each of ours at its lengths one below another."""
    order: dict[tuple[str, str, str], list[SuiteRow]] = {}
    lengths: dict[tuple[str, str, str], int] = {}
    for case, row in rows:
        key = (case.series or case.name, row.ours, row.other)
        before = order.setdefault(key, [])
        if case.series and before:
            doublings = math.log(case.length / lengths[key])
            growth = math.log(row.train_ms / before[-1].train_ms) / doublings
            other = math.log(row.other_train_ms / before[-1].other_train_ms) / doublings
            row = replace(row, growth=growth, other_growth=other)
        before.append(row)
        lengths[key] = case.length
    series = list(dict.fromkeys(key[0] for key in order))
    return [row for name in series for key, found in order.items() if key[0] == name for row in found]


def _warm_allocator() -> None:
    """Bring glibc's allocator to where it is in any process that has worked for a while.

    It gives blocks back to the system, and fetches them anew page by page, up to the size of the largest that was ever
    freed, and no further than 32 MB: until then the outputs of every call cost a fault for each of their pages.
    """
    torch.ones(31 << 18)


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _peak_mb(run: Callable[[], Any]) -> float:
    """The most memory that torch's allocator held at once during `run`, the insides of compiled kernels included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 1e6


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library writes to the process's own stderr; warnings were given in the warm-up."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


# --- showing --------------------------------------------------------------------------------------------------------

HEAD = [
    "case",
    "ours",
    "beside",
    "forward ms",
    "its",
    "times as fast",
    "forward + backward ms",
    "its",
    "times as fast",
    "peak MB",
    "its",
]
GROWTH_HEAD = ["growth with L", "its"]

ABOUT = {
    "linear": "Operators are on heads; modules have their projections, and gradients of their weights. Beside each "
    "stands exact softmax attention over as many tokens, causal where the mechanism can be. Peak is the most memory "
    "held at once beside the inputs in forward + backward. Growth is the slope of the logarithm of the time of "
    "forward + backward over that of L since the length above: 1 for time linear in L, 2 for quadratic.",
}
ABOUT_OTHERS = (
    "Times are of the function on heads, without projections where a case does not name them. Peak is the most "
    "memory held at once beside the inputs in forward + backward. A mechanism stands beside SDPA with one boolean "
    "mask of L x L for all heads: what SDPA takes does not depend on which pairs the mask allows."
)
WARM = "The process has freed a block of 31 MB before, so that its allocator keeps memory between calls, for all alike."


def suite_heading(rows: SuiteRows) -> str:
    """One line: what was measured, how, on what, when."""
    m = rows.machine
    return (
        f"{rows.suite} attention: least CPU time of {rows.settings['rounds']} rounds, taken in turns, 1 thread; "
        f"{m['device']}, torch {m['torch']}, Python {m['python']}, {m['date']}"
    )


def suite_table(rows: SuiteRows) -> str:
    """Plain text, and below it a sentence on everything that could not be measured."""
    head, *lines = _lines(rows)
    return "\n".join([columns(head, lines), *rows.notes])


def save_suite(rows: SuiteRows, folder: Path) -> list[Path]:
    """Write <suite>.md and <suite>.json under `folder`; each appears whole or not at all."""
    head, *body = _lines(rows)
    lines = [
        f"# {rows.suite.capitalize()} attention beside its alternatives",
        "",
        f"`core-attn bench {rows.suite}`; {suite_heading(rows)}.",
        "",
        f"{ABOUT.get(rows.suite, ABOUT_OTHERS)} {WARM}",
        "",
        *["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]],
    ]
    if rows.notes:
        lines += ["", *[f"- {note}" for note in rows.notes]]
    facts = {
        "suite": rows.suite,
        "settings": rows.settings,
        "machine": rows.machine,
        "rows": [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows.rows],
        "notes": [*rows.notes],
    }
    return write(folder, rows.suite, lines, facts)


def _lines(rows: SuiteRows) -> list[list[str]]:
    """The head and the rows; with growth where any row has it."""
    grows = any(not math.isnan(row.growth) for row in rows.rows)
    return [HEAD + GROWTH_HEAD if grows else HEAD, *(_cells(row)[: None if grows else len(HEAD)] for row in rows.rows)]


def _cells(row: SuiteRow) -> list[str]:
    def shown(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    return [
        row.case,
        row.ours,
        row.other,
        shown(row.forward_ms, ".1f"),
        shown(row.other_forward_ms, ".1f"),
        shown(row.forward_times, ".2f"),
        shown(row.train_ms, ".1f"),
        shown(row.other_train_ms, ".1f"),
        shown(row.train_times, ".2f"),
        shown(row.peak_mb, ".0f"),
        shown(row.other_peak_mb, ".0f"),
        shown(row.growth, ".2f"),
        shown(row.other_growth, ".2f"),
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
