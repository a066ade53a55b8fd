"""Steps that the Triton kernels of linear attention share: places of chunks, tiles of matrices, products with states.

It imports Triton, so only modules of kernels import it. A sequence is cut into chunks of CHUNK tokens. Packed sequences
lie one after the other along the tokens of one batch entry, each with chunks of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(program, heads, tokens, length, offsets, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Of the sequence and head number `program`: entry, head, batch, first token, length, first row and first chunk.

    `entry` counts sequences and `batch` entries of the batch axis, one where sequences are packed. The row is counted
    in a contiguous (batch, heads, tokens, ·) tensor, the chunk over all sequences.
    """
    head = program % heads
    entry = program // heads
    batch = entry.to(tl.int64)
    first = tl.cast(0, tl.int64)
    chunk = batch * tl.cdiv(length, CHUNK)
    if PACKED:
        first = tl.load(offsets + entry).to(tl.int64)
        length = (tl.load(offsets + entry + 1) - first).to(tl.int32)
        # Each sequence may have one chunk more than its tokens fill, so that no table of chunks is needed.
        chunk = first // CHUNK + entry
        batch = tl.cast(0, tl.int64)
    row = (batch * heads + head) * tokens + first
    return entry.to(tl.int64), head, batch, first, length, row, chunk


@triton.jit
def load_tile(base, stride, start, stop, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, COLUMNS) from row `start` and `column` of a matrix of WIDTH columns; zeros from row `stop` on."""
    row = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    return tl.load(at, mask=(start + row < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(
    base,
    stride,
    start,
    stop,
    column,
    x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write what `load_tile` reads."""
    row = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    x = operand(x, base, UPCAST).to(base.dtype.element_ty)
    tl.store(at, x, mask=(start + row < stop)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_row(base, stride, row, stop, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(COLUMNS,) of one row, float32; zeros where it is not below `stop`."""
    columns = column + tl.arange(0, COLUMNS)
    at = base + tl.cast(row, tl.int64) * stride + columns
    return tl.load(at, mask=columns < tl.where(row < stop, WIDTH, 0), other=0.0).to(tl.float32)


@triton.jit
def operand(x, base, UPCAST: tl.constexpr):
    """Round a float32 tile to the dtype of the tensor at `base`.

    Triton's interpreter multiplies the bit patterns of bfloat16 and cuts bits off instead of rounding: with UPCAST the
    tile stays float32, of the nearest bfloat16, ties to even.
    """
    if UPCAST and base.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(base.dtype.element_ty)


@triton.jit
def given(x, UPCAST: tl.constexpr):
    """A tile as it was loaded, as an operand of `tl.dot`."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def dot(a, b):
    """a b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def state_dot(x, state, base, UPCAST: tl.constexpr):
    """x state for float32 tiles, with operands as fine as the dtype of the tensor at `base`.

    Sums over a long sequence leave the range of float16, so that its states are multiplied as tf32, which has as many
    digits and the range of float32.
    """
    if base.dtype.element_ty == tl.float16:
        return tl.dot(x.to(tl.float32), state, input_precision="tf32")
    else:
        return dot(operand(x, base, UPCAST), operand(state, base, UPCAST))
