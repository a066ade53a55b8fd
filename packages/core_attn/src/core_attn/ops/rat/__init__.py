"""RAT: a gated recurrence inside chunks of tokens, softmax attention across the ends of chunks.

"RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling" (S15), section 2.2.

Shapes: B batch, H heads, L tokens, D channels of a head, N chunks that are complete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import check_qkv, default_scale, prepare_qkv
from core_attn.ops.rat import chunked, recurrent, reference
from core_attn.ops.rat.reference import RatState, state_dtype

__all__ = ["OPERATOR", "RatState", "rat_attention", "rat_start", "rat_step"]

# Up to how many tokens a loop over them is faster than chunks.
FEW = 4


def _is_few(request: Request) -> str | None:
    few = request.query[2] <= FEW and not request.requires_grad and not (request.options or {})["real"]
    return f"for up to {FEW} tokens without gradients the recurrence itself is faster" if few else None


def _is_many(request: Request) -> str | None:
    return None if request.query[2] <= FEW else "one step a token is slower than chunks of tokens"


OPERATOR = Operator(
    "rat_attention",
    [
        Backend("torch", chunked.run, pass_over=_is_few),
        Backend("recurrent", recurrent.run, pass_over=_is_many),
        Backend("reference", reference.run),
    ],
)


def rat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    chunk_size: int = 16,
    scale: float | None = None,
    rotary_base: float | None = None,
    key_padding_mask: Tensor | None = None,
    initial_state: RatState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RatState]:
    """Softmax over one summary of each earlier chunk, and over the token's own, causal; time O(L²D / chunk_size).

    Inside a chunk k̃_t = g_t ⊙ k̃_{t-1} + (1 - g_t) ⊙ k_t from zero, and ṽ alike with the same gate g = e^log_gate. Token
    t of chunk c reads the last k̃, ṽ of the chunks 0 … c - 1, and its own k̃_t, ṽ_t, in one softmax of scale · q_tᵀ k̃.
    The last chunk may be short. Sums and states are float32 for 16-bit inputs, float64 for float64. Memory is linear
    in L.

    Args:
        q, k, v: (B, H, L, D), floating point; v as wide as k, because they share the gate.
        log_gate: (B, H, L, D) logarithms of the gates, at most 0, any floating dtype. Values above 0 are refused on the
            CPU; on other devices and in compiled graphs, where looking would make the program wait, they are not looked
            for.
        chunk_size: tokens of a chunk, at least 1.
        scale: factor of the scores; 1/√D by default.
        rotary_base: rotate q and k̃ by the number of their chunk with this base, see `core_attn.positions.rotary`; of
            an odd D all channels but the last. No rotation by default.
        key_padding_mask: (B, L) bool, True = real. A padded token neither decays nor writes, and nobody reads a chunk
            without any real token. Not together with a state.
        initial_state: from `rat_start`, or what an earlier call returned.
        return_state: also return the state behind the last token.
        backend: "auto", "torch" (chunks), "recurrent" (a loop over tokens, fast for few) or "reference".

    Returns:
        (B, H, L, D), dtype of q (under autocast, of autocast); with `return_state` a pair of that and the state.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a log-gate above 0.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    check_qkv(q, k, v, key_padding_mask)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            "rat_attention takes q, k and v of one shape (B, H, L, D), got "
            f"{', '.join(str(tuple(t.shape)) for t in (q, k, v))}"
        )
    if log_gate.shape != k.shape or not log_gate.is_floating_point():
        raise ValueError(
            f"log_gate must be floating point of shape (B, H, L, D) = {tuple(k.shape)}, got {tuple(log_gate.shape)} of "
            f"{log_gate.dtype}"
        )
    _check_domain(log_gate)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if rotary_base is not None and rotary_base <= 0:
        raise ValueError(f"rotary_base must be positive, got {rotary_base}")
    if key_padding_mask is not None and (initial_state is not None or return_state):
        raise ValueError("a state of rat_attention holds no padding: pass key_padding_mask or states, not both")
    if initial_state is not None:
        _check_state(initial_state, q, chunk_size)
    q, k, v = prepare_qkv(q, k, v, key_padding_mask)
    if key_padding_mask is not None:
        log_gate = log_gate.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
    out, state = OPERATOR(
        q,
        k,
        v,
        log_gate=log_gate,
        chunk_size=chunk_size,
        scale=default_scale(q, scale),
        rotary_base=rotary_base,
        real=key_padding_mask,
        state=rat_start(q) if initial_state is None else initial_state,
        backend=backend,
    )
    return (out, state) if return_state else out


def rat_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    state: RatState,
    chunk_size: int = 16,
    scale: float | None = None,
    rotary_base: float | None = None,
) -> tuple[Tensor, RatState]:
    """One or more further tokens of a sequence: outputs (B, H, T, D), and the state behind them.

    A token costs O(L D / chunk_size), and the state grows by 2 D numbers a head and chunk.

    Args:
        q, k, v, log_gate, chunk_size, scale, rotary_base: see `rat_attention`, with T further tokens in place of L.
        state: from `rat_start`, or of the step before. It is not changed.

    Raises:
        ValueError: see `rat_attention`.
    """
    options = {"chunk_size": chunk_size, "scale": scale, "rotary_base": rotary_base}
    found = rat_attention(q, k, v, log_gate=log_gate, initial_state=state, return_state=True, **options)  # type: ignore[arg-type]
    assert isinstance(found, tuple)
    return found


def rat_start(like: Tensor) -> RatState:
    """The state before the first token, for heads `like` (B, H, L, D): on its device, in the dtype of its sums."""
    batch, heads, _, width = like.shape
    none = like.new_zeros(batch, heads, width, dtype=state_dtype(like))
    empty = none.new_zeros(batch, heads, 0, width)
    return RatState(none, none, empty, empty, 0)


def _check_state(state: RatState, q: Tensor, chunk_size: int) -> None:
    batch, heads, _, width = q.shape
    if not isinstance(state, RatState):
        raise ValueError(f"initial_state must be a RatState, got {type(state).__name__}; start with rat_start")
    ends = (batch, heads, state.seen // chunk_size, width)
    shapes = [tuple(x.shape) for x in state[:4]]
    if shapes != [(batch, heads, width)] * 2 + [ends] * 2:
        raise ValueError(
            f"a state of {state.seen} tokens in chunks of {chunk_size} has shapes (B, H, D) = {(batch, heads, width)} "
            f"and (B, H, N, D) = {ends}, got {shapes[0]} and {shapes[2]}"
        )


def _check_domain(log_gate: Tensor) -> None:
    if log_gate.device.type != "cpu" or torch.compiler.is_compiling() or not log_gate.numel():
        return
    highest = float(log_gate.detach().amax())
    if highest > 0:
        raise ValueError(
            f"log_gate must be at most 0 (the logarithm of a factor in (0, 1]), got values up to {highest:.3g}"
        )
