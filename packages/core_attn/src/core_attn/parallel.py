"""Attention split over the processes of `torch.distributed`: by context (ring) or by heads.

"A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies" (S121) distributes exact multi-head
attention over devices. Two ways of it are here, equal to one process in outputs and gradients:

- by context: every process keeps its queries, the blocks of keys and values travel round a ring, and each block's
  output is merged by its log-sum-exp. Backward sends the blocks round again with their gradients.
- by heads: one exchange gives every process all tokens of some heads, a second one gives the outputs back.

Everywhere a process holds its share of the tokens: q (B, H, L / P, D) with P processes, in the order of their ranks
unless a layout says otherwise. Start the processes with `torchrun` and call `torch.distributed.init_process_group`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core_attn.contract import TokenMixer
from core_attn.mechanisms.heads import MultiHeadMixer
from core_attn.mechanisms.softmax.exact import SoftmaxAttention
from core_attn.naming import unknown
from core_attn.ops import softmax as softmax_ops

_INF = float("inf")
LAYOUTS = ("contiguous", "zigzag")
Layout = Literal["contiguous", "zigzag"]
Group = Any  # torch.distributed.ProcessGroup, which is missing from builds of torch without distributed


# --- where tokens lie -----------------------------------------------------------------------------------------------


def shard(x: Tensor, *, dim: int, group: Group | None = None, layout: Layout = "contiguous") -> Tensor:
    """This process's share of `x` along `dim`; a view or a copy, differentiable.

    Args:
        x: any tensor, the same on all processes.
        dim: the tokens' dimension.
        group: the processes; all by default.
        layout: "contiguous": rank r holds the r-th of P pieces; "zigzag": pieces r and 2P - 1 - r of 2P, which gives
            all processes equal work in causal attention.

    Raises:
        ValueError: the length is not divisible by P (zigzag: 2P), or there is no process group.
    """
    rank, world = _place(group)
    pieces = _pieces(layout, world)
    if x.shape[dim] % (world * pieces):
        need = f"{world} processes" if pieces == 1 else f"2 x {world} pieces (layout zigzag)"
        raise ValueError(f"a length of {x.shape[dim]} cannot be divided among {need}; pad it")
    chunks = x.chunk(world * pieces, dim) if x.shape[dim] else [x] * (world * pieces)
    return torch.cat([chunks[i] for i in _owned(rank, world, pieces)], dim)


def unshard(x: Tensor, *, dim: int, group: Group | None = None, layout: Layout = "contiguous") -> Tensor:
    """All processes' shares along `dim` put together, on every process: the inverse of `shard`, without gradient."""
    _, world = _place(group)
    pieces = _pieces(layout, world)
    chunks: list[Tensor] = [x] * (world * pieces)
    for rank, share in enumerate(_gather(x, group)):
        for i, piece in zip(_owned(rank, world, pieces), share.chunk(pieces, dim)):
            chunks[i] = piece
    return torch.cat(chunks, dim)


def _pieces(layout: str, world: int) -> int:
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    return 2 if layout == "zigzag" and world > 1 else 1


def _owned(rank: int, world: int, pieces: int) -> tuple[int, ...]:
    """Which of the world * pieces pieces of the sequence lie on `rank`."""
    return (rank,) if pieces == 1 else (rank, 2 * world - 1 - rank)


# --- by context -----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A piece of a process's queries beside a piece of another's keys; the window is counted from lower right."""

    queries: slice
    keys: slice
    left: int | None
    right: int | None


@dataclass(frozen=True)
class _Split:
    """Who holds which tokens, and so who reads from whom.

    Attributes:
        world, pieces: processes, and pieces of the sequence on each.
        queries, keys: tokens on one process.
        left, right: how far a query reads on each side; None = all.
    """

    world: int
    pieces: int
    queries: int
    keys: int
    left: int | None
    right: int | None

    def parts(self, rank: int, owner: int) -> list[_Part]:
        """What the queries of `rank` read of the keys of `owner`; nothing where causality or the window forbids all."""
        rows, columns = self.queries // self.pieces, self.keys // self.pieces
        ahead = self.world * (self.keys - self.queries)  # the last query stands at the last key
        found: list[_Part] = []
        if rows == 0 or columns == 0:
            return found
        for i, row in enumerate(_owned(rank, self.world, self.pieces)):
            for j, column in enumerate(_owned(owner, self.world, self.pieces)):
                # Position of this piece's first query, counted from its first key.
                shift = row * rows + ahead - column * columns
                if self.right is not None and shift + rows - 1 + self.right < 0:
                    continue
                if self.left is not None and shift - self.left > columns - 1:
                    continue
                lower_right = columns - rows - shift
                left = None if self.left is None else self.left + lower_right
                right = None if self.right is None else self.right - lower_right
                # A limit that forbids nothing in this piece costs no mask.
                left = None if left is not None and left >= columns - 1 else left
                right = None if right is not None and right >= rows - 1 else right
                queries, keys = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                found.append(_Part(queries, keys, left, right))
        return found


@functools.cache
def _hops(split: _Split) -> int:
    """How many times the blocks must move on until no process reads any of those to come."""
    ranks = range(split.world)
    return max(
        (hop for hop in ranks if any(split.parts(rank, (rank - hop) % split.world) for rank in ranks)), default=0
    )


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    layout: Layout = "contiguous",
) -> Tensor:
    """Exact softmax attention over the tokens of all processes; memory of one process is linear in its own share.

    Equal to this process's share of `core_attn.ops.softmax_attention` on the whole sequences. Blocks that causality or
    the window forbids are not computed, and travel no farther than they are read.

    Args:
        q: (B, H, L/P, D), this process's queries.
        k, v: (B, Hkv, M/P, D) and (B, Hkv, M/P, Dv), its keys and values; Hkv divides H.
        group: the processes; all by default.
        causal: query i of the whole sequence reads keys up to i + M - L.
        window: as in `softmax_attention`, in positions of the whole sequence.
        key_padding_mask: (B, M/P) bool, its keys that are real.
        scale: 1/√D by default.
        layout: where tokens lie, see `shard`; with `causal`, "zigzag" gives all processes equal work.

    Returns:
        (B, H, L/P, Dv), dtype of q. There is no second derivative.

    Raises:
        ValueError: shapes that do not fit, no process group, shares of odd length with "zigzag", or processes that
            call with different shapes or options.
    """
    softmax_ops._check(q, k, v, None, None, key_padding_mask, 0.0)
    rank, world = _place(group)
    pieces = _pieces(layout, world)
    if q.shape[2] % pieces or k.shape[2] % pieces:
        raise ValueError(
            f"layout zigzag keeps two pieces of equal length on each process, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys on one; pad the sequence to a multiple of {2 * world}"
        )
    left, right = softmax_ops.span(window, causal=causal) or (None, None)
    right = 0 if causal else right
    _agree(
        (*q.shape, *k.shape[1:], v.shape[3], q.element_size(), key_padding_mask is not None, pieces, left, right),
        q.device,
        group,
    )
    masks = None
    if key_padding_mask is not None:
        padding = ~key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)  # 0 * NaN is NaN
        masks = _gather(key_padding_mask, group)
    split = _Split(world, pieces, q.shape[2], k.shape[2], left, right)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = _Ring.apply(q, k, v, masks, split, rank, scale, group)
    return out


class _Ring(torch.autograd.Function):
    """The loop over the blocks, and the same loop backward with the gradients travelling beside their block."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Sequence[Tensor] | None,
        split: _Split,
        rank: int,
        scale: float,
        group: Group | None,
    ) -> Tensor:
        work = _working(q)
        rows = q.to(work)
        out = rows.new_zeros(*q.shape[:3], v.shape[3])
        lse = rows.new_full(q.shape[:3], -_INF)
        for owner, (keys, values), _ in _round(split, rank, group, (k, v)):
            keys, values = keys.to(work), values.to(work)
            for part in split.parts(rank, owner):
                here = slice(None), slice(None), part.queries
                some, some_lse = torch.ops.core_attn.softmax_blocked(
                    rows[here], *_options(part, keys, values, masks, owner, scale)
                )
                _merge(out[here], lse[here], some, some_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse.masked_fill(lse == -_INF, _INF), *(masks or ()))
        ctx.numbers = masks is not None, split, rank, scale, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dout,) = grads
        q, k, v, out, lse, *given = ctx.saved_tensors
        masked, split, rank, scale, group = ctx.numbers
        masks = given if masked else None
        work = _working(q)
        rows, dout, out = q.to(work), dout.to(work), out.to(work)
        dq = torch.zeros_like(rows)
        gradients = [torch.zeros_like(x, dtype=work, memory_format=torch.contiguous_format) for x in (k, v)]
        for owner, (keys, values), last in _round(split, rank, group, (k, v)):
            keys, values = keys.to(work), values.to(work)
            for part in split.parts(rank, owner):
                here, there = (slice(None), slice(None), part.queries), (slice(None), slice(None), part.keys)
                dq_part, dk_part, dv_part, _ = torch.ops.core_attn.softmax_blocked_backward(
                    dout[here],
                    out[here],
                    lse[here],
                    False,
                    rows[here],
                    *_options(part, keys, values, masks, owner, scale),
                )
                dq[here] += dq_part
                gradients[0][there] += dk_part
                gradients[1][there] += dv_part
            # With their block to the next process; at the end home to the one that owns it.
            gradients = _move(gradients, -_hops(split) if last else 1, group)()
        dk, dv = gradients
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _round(
    split: _Split, rank: int, group: Group | None, block: Sequence[Tensor]
) -> Iterator[tuple[int, Sequence[Tensor], bool]]:
    """(owner, its block, whether it is the last) in the order they come by; the next one travels meanwhile."""
    hops = _hops(split)
    for hop in range(hops + 1):
        coming = _move(block, 1, group) if hop < hops else None
        yield (rank - hop) % split.world, block, hop == hops
        if coming is not None:
            block = coming()


def _options(
    part: _Part, k: Tensor, v: Tensor, masks: Sequence[Tensor] | None, owner: int, scale: float
) -> tuple[Any, ...]:
    """Arguments of the blocked operator after the queries."""
    chosen = [] if masks is None else [masks[owner][:, None, None, part.keys]]
    return k[:, :, part.keys], v[:, :, part.keys], None, chosen, None, part.left, part.right, scale, 0.0


def _merge(out: Tensor, lse: Tensor, some: Tensor, some_lse: Tensor) -> None:
    """Add a block's output to what the blocks before gave, in place; the operator's lse is +inf where it read none."""
    some_lse = some_lse.masked_fill(some_lse == _INF, -_INF)
    total = torch.logaddexp(lse, some_lse)
    base = total.masked_fill(total == -_INF, 0.0)
    out.mul_(torch.exp(lse - base).unsqueeze(-1)).add_(some * torch.exp(some_lse - base).unsqueeze(-1))
    lse.copy_(total)


def _working(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


# --- by heads -------------------------------------------------------------------------------------------------------


def head_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact softmax attention over the tokens of all processes, each of them computing H/P heads.

    Equal to this process's share of `core_attn.ops.softmax_attention` on the whole sequences.

    Args:
        q: (B, H, L/P, D), this process's queries, in the order of the ranks; P divides H.
        k, v: (B, Hkv, M/P, D) and (B, Hkv, M/P, Dv). Where P does not divide Hkv, key heads are repeated.
        group, causal, window, key_padding_mask, scale: as in `ring_attention`.
        backend: of `softmax_attention`, which each process runs on its heads.

    Returns:
        (B, H, L/P, Dv), dtype of q.

    Raises:
        ValueError: shapes that do not fit, H not divisible by P, no process group, or processes that call with
            different shapes or options.
    """
    softmax_ops._check(q, k, v, None, None, key_padding_mask, 0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return softmax_ops.softmax_attention(
            q, k, v, causal=causal, window=window, key_padding_mask=mask, scale=scale, backend=backend
        )

    return _by_heads(attend, q, k, v, key_padding_mask, group)


def _by_heads(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    group: Group | None,
) -> Tensor:
    """`attend` on all tokens and this process's heads, between the two exchanges."""
    _, world = _place(group)
    _check_heads(q.shape[1], world)
    _agree((*q.shape, *k.shape[1:], v.shape[3], q.element_size(), key_padding_mask is not None), q.device, group)
    # As few copies of the key heads as let every process have whole ones.
    copies = math.lcm(k.shape[1], world) // k.shape[1] if k.shape[1] else 1
    if copies > 1:
        k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    whole = None if key_padding_mask is None else torch.cat(_gather(key_padding_mask, group), dim=1)
    if whole is not None:
        assert key_padding_mask is not None
        padding = ~key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    q, k, v = (_TokensForHeads.apply(x, group) for x in (q, k, v))
    out: Tensor = _HeadsForTokens.apply(attend(q, k, v, whole), group)
    return out


def _check_heads(heads: int, world: int) -> None:
    if heads % world:
        raise ValueError(f"{heads} heads cannot be divided among {world} processes; use ring attention, or other heads")


class _TokensForHeads(torch.autograd.Function):
    """(B, H, L/P, D) -> (B, H/P, L, D): every process gives away tokens and gets heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        sent = x.unflatten(1, (_place(group)[1], -1)).movedim(1, 0)
        return _exchange(sent, group).movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _HeadsForTokens.apply(grads[0], ctx.group), None


class _HeadsForTokens(torch.autograd.Function):
    """(B, H/P, L, D) -> (B, H, L/P, D), the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        sent = x.unflatten(2, (_place(group)[1], -1)).movedim(2, 0)
        return _exchange(sent, group).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _TokensForHeads.apply(grads[0], ctx.group), None


# --- mechanisms -----------------------------------------------------------------------------------------------------


@contextmanager
def parallelize(
    model: nn.Module,
    *,
    group: Group | None = None,
    how: Literal["ring", "heads"] = "ring",
    layout: Layout = "contiguous",
) -> Iterator[None]:
    """Inside the block every token mixer of `model` works on its share of the tokens: x (B, L/P, C).

    The outputs are this process's share of what one process would compute from the whole sequences; so are gradients
    of inputs, while those of the weights must be summed over the processes, as data parallelism does. Backward may run
    after the block. `context` and `key_padding_mask` are shares too; a `grid` is that of the whole sequence.

    Args:
        model: a module that holds token mixers, or is one; with the same weights on all processes.
        group: the processes; all by default.
        how: "ring" splits exact softmax attention (mechanism "softmax") by context. "heads" splits any mechanism of
            heads that do not depend on each other or on which head they are, which is tried out on random tokens.
        layout: of "ring", see `shard`.

    Raises:
        ValueError: a mixer that cannot be split this way, heads not divisible by P, or no process group.

    Example:
        >>> with parallelize(model, how="ring", layout="zigzag"):
        ...     y = model(shard(x, dim=1, layout="zigzag"))
    """
    if how not in ("ring", "heads"):
        raise unknown("way to split", how, ["ring", "heads"])
    world = _place(group)[1]
    _pieces(layout, world)
    if how == "heads" and layout != "contiguous":
        raise ValueError("layout zigzag balances the ring; how='heads' takes tokens in their order")
    mixers = [m for m in model.modules() if isinstance(m, TokenMixer)]
    if not mixers:
        raise ValueError(f"{type(model).__name__} holds no token mixer of core_attn, so there is nothing to split")
    overrides = []
    for mixer in mixers:
        if "attend" in vars(mixer):
            raise ValueError(f"{mixer.info.name} is split over processes already")
        if how == "ring":
            overrides.append((mixer, _ring_overrides(mixer, group, layout)))
        else:
            overrides.append((mixer, _heads_overrides(mixer, group, world)))
    with ExitStack() as undo:
        for mixer, replaced in overrides:
            for name, function in replaced.items():
                object.__setattr__(mixer, name, function)
                undo.callback(vars(mixer).pop, name)
        yield


def _ring_overrides(mixer: TokenMixer, group: Group | None, layout: Layout) -> dict[str, Any]:
    if not isinstance(mixer, SoftmaxAttention) or _replaced(mixer, SoftmaxAttention, *_FRAME, "attend", "side_input"):
        raise ValueError(f"{mixer.info.name} is not exact softmax attention, which how='ring' splits; try how='heads'")

    def attend(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: Any) -> Tensor:
        _no_maps(mixer)
        if mixer.training and mixer.dropout:
            raise ValueError("ring attention drops no weights of the map; build the mixer with dropout=0")
        return ring_attention(
            q,
            k,
            v,
            group=group,
            causal=mixer.causal,
            window=mixer.window,
            key_padding_mask=key_padding_mask,
            scale=mixer.scale,
            layout=layout,
        )

    return {"attend": attend}


# What of the common frame would see a process's own tokens only.
_FRAME = ("forward", "prepare")


def _replaced(mixer: TokenMixer, base: type, *methods: str) -> bool:
    """Whether the mixer's class has a method of its own in place of one of these."""
    return any(getattr(type(mixer), method) is not getattr(base, method) for method in methods)


class _Call(NamedTuple):
    """What `side_input` is given, kept until `attend` has all tokens."""

    x: Tensor
    query_padding_mask: Tensor | None
    grid: tuple[int, ...] | None
    generator: torch.Generator | None


def _heads_overrides(mixer: TokenMixer, group: Group | None, world: int) -> dict[str, Any]:
    name = mixer.info.name
    if not isinstance(mixer, MultiHeadMixer) or _replaced(mixer, MultiHeadMixer, *_FRAME):
        raise ValueError(f"{name} is not made of heads with one attention each, so it cannot be split by heads")
    _check_heads(mixer.heads, world)
    if not _heads_are_independent(mixer, world):
        raise ValueError(f"the heads of {name} depend on each other or on which head they are; it cannot be split")
    own_side_input = _replaced(mixer, MultiHeadMixer, "side_input")
    original = mixer.attend, mixer.side_input, mixer.check_inputs

    def check_inputs(x: Tensor, *, grid: tuple[int, ...] | None = None, **call: Any) -> None:
        original[2](x, **call)
        if grid is not None and len(grid) not in mixer.info.grid_ranks:
            raise ValueError(f"{name} takes no grid of rank {len(grid)}")
        if grid is not None and math.prod(grid) != world * x.shape[1]:
            raise ValueError(f"{name}: grid {grid} must hold the {world * x.shape[1]} tokens of all processes")

    def side_input(q: Tensor, k: Tensor, **call: Any) -> _Call:
        return _Call(**call)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None, aux: _Call) -> Tensor:
        _no_maps(mixer)
        # Few mechanisms look at the tokens themselves; only those pay for having all of them.
        x = _AllTokens.apply(aux.x, group) if own_side_input else aux.x

        def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            queries = None if aux.query_padding_mask is None else mask
            side = original[1](q, k, x=x, query_padding_mask=queries, grid=aux.grid, generator=aux.generator)
            return original[0](q, k, v, key_padding_mask=mask, aux=side)

        return _by_heads(whole, q, k, v, key_padding_mask, group)

    return {"attend": attend, "side_input": side_input, "check_inputs": check_inputs}


def _no_maps(mixer: TokenMixer) -> None:
    if mixer._tap is not None:
        raise ValueError("attention maps cannot be read or edited while a mixer is split over processes")


class _AllTokens(torch.autograd.Function):
    """(B, L/P, C) -> (B, L, C) on every process; each process's gradient is what all of them ask of its tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        return torch.cat(_gather(x, group), dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        world = _place(ctx.group)[1]
        asked = _exchange(torch.stack(grads[0].chunk(world, dim=1)), ctx.group)
        return asked.sum(0), None


@torch.no_grad()
def _heads_are_independent(mixer: MultiHeadMixer, world: int) -> bool:
    """Whether each process's heads alone give what they give among all: tried on random tokens, not believed."""
    was_training = mixer.training
    mixer.eval()
    try:
        return all(_alone_as_among_all(mixer, world, length) for length in _telling_lengths(mixer))
    finally:
        mixer.train(was_training)


def _telling_lengths(mixer: TokenMixer) -> list[int]:
    """A short one and a longer one: heads that read different places differ only where not all pairs are read."""
    short = max(64, mixer.info.min_length)
    long = max(1024, short)
    while (
        long < 8192
        and mixer.sizes(batch=1, length=long)["P"] > 0.8 * TokenMixer.sizes(mixer, batch=1, length=long)["P"]
    ):
        long *= 2
    return [short, long if long < 8192 else max(1024, short)]


def _alone_as_among_all(mixer: MultiHeadMixer, world: int, length: int) -> bool:
    weight = mixer.q_proj.weight
    x = torch.randn(1, length, mixer.dim, generator=torch.Generator().manual_seed(0)).to(weight)
    q, k, v = (mixer.split_heads(project(x)) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    grid = (length, *[1] * (min(mixer.info.grid_ranks) - 1)) if mixer.info.grid_ranks else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        aux = mixer.side_input(q, k, x=x, query_padding_mask=None, grid=grid, generator=None)
        return mixer.attend(q, k, v, key_padding_mask=None, aux=aux)

    copies = math.lcm(k.shape[1], world) // k.shape[1]
    k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    together = run(q, k, v)
    try:
        # All shares, on every process: they must come to the same decision.
        alone = torch.cat([run(*share) for share in zip(*(t.chunk(world, dim=1) for t in (q, k, v)))], dim=1)
    except (RuntimeError, ValueError, IndexError):
        return False  # made for its full number of heads
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    return alone.shape == together.shape and torch.allclose(alone, together, rtol=tolerance, atol=tolerance)


# --- processes ------------------------------------------------------------------------------------------------------


def _place(group: Group | None) -> tuple[int, int]:
    """(rank of this process, number of processes) in the group."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "there is no process group; start the processes with torchrun and call torch.distributed.init_process_group"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the group")
    return rank, dist.get_world_size(group)


def _agree(facts: Sequence[int | bool | None], device: torch.device, group: Group | None) -> None:
    """Refuse, on every process, a call that is not the same on all: it would hang or mix up tensors otherwise."""
    numbers = [-(2**40) if f is None else int(f) for f in facts]
    every = [t.tolist() for t in _gather(torch.tensor(numbers, device=device), group)]
    if any(other != numbers for other in every):
        raise ValueError(
            "the processes call with different shapes or options; each needs shares of the same size "
            f"(got q of {', '.join(str(tuple(other[:4])) for other in every)})"
        )


def _gather(x: Tensor, group: Group | None) -> list[Tensor]:
    """`x` of every process, in the order of the ranks; without gradient."""
    flat = _bytes(x)
    found = [torch.empty_like(flat) for _ in range(_place(group)[1])]
    dist.all_gather(found, flat, group=group)
    return [_from_bytes(f, x) for f in found]


def _exchange(x: Tensor, group: Group | None) -> Tensor:
    """x[p] goes to process p; what process p sent here comes at [p]."""
    flat = _bytes(x)
    found = torch.empty_like(flat)
    dist.all_to_all_single(found, flat, group=group)
    return _from_bytes(found, x)


def _move(block: Sequence[Tensor], by: int, group: Group | None) -> Callable[[], list[Tensor]]:
    """Start sending `block` to the process `by` ranks on; the result waits for the one that comes here."""
    rank, world = _place(group)
    if by % world == 0:
        return lambda: [*block]
    sent = torch.cat([_bytes(t) for t in block])
    found = torch.empty_like(sent)
    to, source = (rank + by) % world, (rank - by) % world
    if group is not None:
        to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
    pending = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, to, group=group), dist.P2POp(dist.irecv, found, source, group=group)]
    )

    def wait() -> list[Tensor]:
        for p in pending:
            p.wait()
        pieces = found.split([t.numel() * t.element_size() for t in block])
        return [_from_bytes(piece, t) for piece, t in zip(pieces, block)]

    return wait


def _bytes(x: Tensor) -> Tensor:
    """As plain bytes: not every communication library knows every dtype."""
    return x.detach().contiguous().flatten().view(torch.uint8)


def _from_bytes(flat: Tensor, like: Tensor) -> Tensor:
    return flat.view(like.dtype).view(like.shape)
