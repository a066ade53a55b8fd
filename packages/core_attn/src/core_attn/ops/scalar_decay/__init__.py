"""Linear attention with scalar decay: a state of keys times values that decays by one factor a head and token.

"Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models" (S215), with
decay that depends on the data as in "Transformers are SSMs" (Dao and Gu, 2024). Shapes: B batch, H heads of values, G
heads of queries and keys, L tokens, D channels of a key, Dv channels of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core_attn.dispatch import Backend, Operator, Request
from core_attn.ops.arguments import check_dtypes, default_scale, prepare_qkv
from core_attn.ops.packed import by_sequence, packing
from core_attn.ops.scalar_decay import chunked, recurrent, reference, triton

# Up to how many tokens a loop over them is faster than cutting them into chunks.
FEW = 4


def _is_few(request: Request) -> str | None:
    few = request.query[2] <= FEW and not request.requires_grad
    return f"for up to {FEW} tokens without gradients the recurrence itself is faster" if few else None


def _is_many(request: Request) -> str | None:
    return None if request.query[2] <= FEW else "one step a token is slower than chunks of tokens"


OPERATOR = Operator(
    "scalar_decay_attention",
    [
        Backend("triton", triton.run, triton.why_not, lambda request: _is_few(request) or triton.pass_over(request)),
        Backend("torch", by_sequence(chunked.run, "log_decay"), pass_over=_is_few),
        Backend("recurrent", by_sequence(recurrent.run, "log_decay"), pass_over=_is_many),
        Backend("reference", by_sequence(reference.run, "log_decay")),
    ],
)


def scalar_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = e^(g_t) S_{t-1} + k_t v_tᵀ and o_t = scale · q_tᵀ S_t: causal, in time and memory linear in L.

    Decays are given as logarithms, which neither underflow nor lose digits near 1; any strength is computed exactly,
    with no NaN and no infinity, in values and in gradients. A token that must neither decay the state nor write to it
    has zeros for k, v and its log-decay. Sums and states are float32 for 16-bit inputs, float64 for float64.

    Args:
        q: (B, G, L, D), floating point. G divides H: heads of values may share their queries and keys, head h has
            those of h // (H / G), as the groups of Mamba-2; nothing is repeated in memory.
        k: (B, G, L, D).
        v: (B, H, L, Dv).
        log_decay: logarithms g of the decays, at most 0, any floating dtype: (H,) the same for all tokens, or
            (B, H, L). Values above 0 are refused on the CPU; on other devices and in compiled graphs, where looking
            would make the program wait, they are not looked for, and give growing states.
        scale: factor of the outputs; 1/√D by default.
        initial_state: (B, H, D, Dv) state before the first token, of packed sequences (N, H, D, Dv); zeros by default.
        return_state: also return the state behind the last token.
        cu_seqlens: (N + 1,) int32 or int64: the L tokens of the one batch entry (B = 1) are N sequences packed one
            after the other, some perhaps empty, and this is 0, then where each of them ends. Each is computed as if it
            were alone: it starts from its own state, and the states are (N, H, D, Dv). The host reads this tensor, so
            it is best on the CPU: on a GPU every call waits for it. torch.compile breaks its graph at this point. In
            Triton one launch serves all sequences; the other forms take one after the other.
        backend: "auto", "triton", "torch" (in chunks), "recurrent" (a loop over tokens, fast for few) or "reference".

    Returns:
        (B, H, L, Dv), dtype of q (under autocast, of autocast); with `return_state` a pair of that and the state
        (B, H, D, Dv), of packed sequences (N, H, D, Dv), in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or cu_seqlens that do not fit; a log-decay above 0.
        BackendError: the backend asked for cannot run for these inputs, and why.
        UnknownNameError: no such backend.
    """
    _check(q, k, v, log_decay)
    packed = packing(q, cu_seqlens)
    sequences = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state_shape = (sequences, v.shape[1], k.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        axes = "(B, H, D, Dv)" if cu_seqlens is None else "(N, H, D, Dv)"
        raise ValueError(f"initial_state must have shape {axes} = {state_shape}, got {tuple(initial_state.shape)}")
    q, k, v = prepare_qkv(q, k, v)
    scale = default_scale(q, scale)
    out, state = OPERATOR(
        q, k, v, log_decay=log_decay, scale=scale, initial_state=initial_state, backend=backend, **packed
    )
    return (out, state) if return_state else out


def scalar_decay_step(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One or more further tokens of a sequence: outputs (B, H, T, Dv), and the state behind them.

    Args:
        q, k, v, log_decay, scale: see `scalar_decay_attention`, with T further tokens in place of L.
        state: (B, H, D, Dv) state so far; zeros at the start. It is not changed.

    Raises:
        ValueError: see `scalar_decay_attention`.
    """
    found = scalar_decay_attention(q, k, v, log_decay=log_decay, scale=scale, initial_state=state, return_state=True)
    assert isinstance(found, tuple)
    return found


def pairs_in_chunks(length: int) -> int:
    """Pairs of tokens of one chunk, summed over the chunks of a sequence: what the form in chunks multiplies."""
    whole, rest = divmod(length, chunked.CHUNK)
    return whole * chunked.CHUNK**2 + rest**2


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must have one shape (B, G, L, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.dim() != 4 or (v.shape[0], v.shape[2]) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"v must have shape (B, H, L, Dv) with B and L of q, {q.shape[0]} and {q.shape[2]}, got {tuple(v.shape)}"
        )
    if v.shape[1] != q.shape[1] and (q.shape[1] == 0 or v.shape[1] % q.shape[1]):
        raise ValueError(f"the {q.shape[1]} heads of q and k must divide the {v.shape[1]} heads of v")
    check_dtypes(q=q, k=k, v=v)
    if log_decay.shape not in (v.shape[1:2], v.shape[:3]) or not log_decay.is_floating_point():
        raise ValueError(
            f"log_decay must be floating point of shape (H,) or (B, H, L), {tuple(v.shape[1:2])} or "
            f"{tuple(v.shape[:3])}, got {tuple(log_decay.shape)} of {log_decay.dtype}"
        )
    if log_decay.device.type != "cpu" or torch.compiler.is_compiling() or not log_decay.numel():
        return
    highest = float(log_decay.detach().amax())
    if highest > 0:
        raise ValueError(
            f"log_decay must be at most 0 (a factor of at most 1), got {highest:.3g}; use logsigmoid, or log of the "
            "decay"
        )
