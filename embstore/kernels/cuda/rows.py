"""Rows of a table in any storage dtype, read inside a Triton program: what `cpu_rows` is to the CPU's loops.

A program composes BLOCK_B ids times BLOCK_D columns. The pointer's dtype says how rows are stored, and is resolved
when the kernel is compiled; WIDTH, the floats of a row, is a constant too, so whole rows are read 16 bytes a thread.

A negative id, like the lanes past the last id, leads where id 0 does and is not written: every address that can be
computed is inside its table, and masks only spare traffic.

The arithmetic is the torch reference's, operation by operation; sums of products are taken as the CPU's loops take
them. `launch` has multiplications and additions compiled apart, which a GPU's compiler would otherwise fuse: under
Triton's interpreter results are the CPU's bits, and a GPU should give the same. Tests on one allow 1e-6.
"""

# Shapes: B ids of a program, D columns of a program, W floats of a row, P columns (of bytes) of a packed row.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from embstore import hashing

MUL1, MUL2 = tl.constexpr(hashing.MUL1), tl.constexpr(hashing.MUL2)
TILE = 2048
"""Floats of a program's tile: 16 a thread of four warps, enough reads in flight to hide memory's latency."""
WIDEST = 128
"""Columns of a program at most; wider vectors are several programs."""


def program(function: Any) -> Any:
    """Decorator: `triton.jit`, compiled for a table, not for a request.

    Integers (annotate them tl.int64 or tl.int32) and the place of `ids` in memory differ from call to call, so nothing
    is specialised on them; Triton would compile anew for a number that is 1, or a multiple of 16.
    """
    numbers = [name for name, kind in function.__annotations__.items() if kind in ("tl.int32", "tl.int64")]
    return triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=["ids"])


def launch(kernel: Any, ids_B: Tensor, out_BD: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel(ids, num_ids, out, *arguments)` over the tiles of `out`; nothing waits for the device.

    What the kernel is compiled for depends on the table alone (dtypes, widths, block sizes), never on the batch: a
    lookup at load time, of any ids, leaves nothing to compile for a request. `out` that starts off a 16-byte boundary
    (a slice) would need other code, so it is composed beside and copied.
    """
    launch_chunks(kernel, ids_B, out_BD, (out_BD.shape[1], 1), *arguments, **constants)


def launch_chunks(
    kernel: Any, ids_B: Tensor, out_BD: Tensor, chunks: tuple[int, int], *arguments: Any, **constants: Any
) -> None:
    """The same for kernels whose columns come in chunks: how many there are, and floats in a tile's chunk (a power of
    two). BLOCK_D then counts chunks."""
    num_ids, width = out_BD.shape
    if num_ids == 0:
        return
    if out_BD.data_ptr() % 16:
        aligned_BD = out_BD.clone()
        launch_chunks(kernel, ids_B, aligned_BD, chunks, *arguments, **constants)
        out_BD.copy_(aligned_BD)
        return
    count, floats = chunks
    block_d = min(triton.next_power_of_2(count), max(1, WIDEST // floats))
    block_b = max(1, TILE // (block_d * floats))
    grid = (triton.cdiv(num_ids, block_b), triton.cdiv(count, block_d))
    with torch.cuda.device_of(out_BD):
        kernel[grid](
            ids_B, num_ids, out_BD, *arguments,
            WIDTH=width, BLOCK_B=block_b, BLOCK_D=block_d, enable_fp_fusion=False, **constants,
        )  # fmt: skip


def row_width(table: Tensor) -> int:
    """Floats in a row of a table; see embstore/quantize.py."""
    pitch = table.shape[1]
    if table.dtype == torch.uint8:
        return pitch - 8
    return (pitch - 4) * 2 if table.dtype == torch.int8 else pitch


@triton.jit
def mod(id_, num_rows):
    """id mod num_rows, unsigned: ids are not negative."""
    return (id_.to(tl.uint64) % num_rows.to(tl.uint64)).to(tl.int64)


@triton.jit
def mix(key, offset):
    """`hashing.mix64` of a key, as uint64; offset is `hashing.seed_offset(seed)`."""
    z = key.to(tl.uint64) + offset.to(tl.uint64)
    z = (z ^ (z >> 30)) * MUL1
    z = (z ^ (z >> 27)) * MUL2
    return z ^ (z >> 31)


@triton.jit
def bucket(id_, num_rows, offset):
    """`hashing.bucket` of an id."""
    return (((mix(id_, offset) >> 32) * num_rows.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def tile_ids(ids, num_ids, BLOCK_B: tl.constexpr):
    """The program's rows of `out`, the ids they ask for (0 where there is none), and whether there is one."""
    at_B = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    ids_B = tl.load(ids + at_B, mask=at_B < num_ids, other=-1)
    return at_B, tl.maximum(ids_B, 0), ids_B >= 0


@triton.jit
def tile_columns(found_B, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's columns of `out`, and which elements of its tile to compose: columns below WIDTH of found ids."""
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return column_D, found_B[:, None] & (column_D < WIDTH)[None, :]


@triton.jit
def put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH: tl.constexpr):
    """out[at, column] = vectors."""
    tl.store(out + at_B[:, None] * WIDTH + column_D[None, :], vectors_BD, mask=mask_BD)


@triton.jit
def _word(table, at):
    """Two bytes, low first, at any address: packed rows start anywhere."""
    low = tl.load(table + at).to(tl.uint8, bitcast=True).to(tl.uint32)
    return low | (tl.load(table + at + 1).to(tl.uint8, bitcast=True).to(tl.uint32) << 8)


@triton.jit
def scale_bias(table, row, WIDTH: tl.constexpr):
    """Scale and bias of packed rows; 1 and 0 where numbers stand for themselves."""
    if table.dtype.element_ty == tl.uint8:
        tail = row * (WIDTH + 8) + WIDTH
        scale = (_word(table, tail) | (_word(table, tail + 2) << 16)).to(tl.float32, bitcast=True)
        bias = (_word(table, tail + 4) | (_word(table, tail + 6) << 16)).to(tl.float32, bitcast=True)
        return scale, bias
    elif table.dtype.element_ty == tl.int8:
        tail = row * (WIDTH // 2 + 4) + WIDTH // 2
        scale = _word(table, tail).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        bias = _word(table, tail + 2).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, bias
    else:
        return 1.0, 0.0


@triton.jit
def elements(table, row, column, scale, bias, mask, WIDTH: tl.constexpr):
    """Elements (row, column) of rows whose scale and bias were read, as float32; anything where masked."""
    if table.dtype.element_ty == tl.uint8:
        code = tl.load(table + row * (WIDTH + 8) + column, mask=mask, other=0)
        return code.to(tl.float32) * scale + bias
    elif table.dtype.element_ty == tl.int8:
        byte = tl.load(table + row * (WIDTH // 2 + 4) + (column >> 1), mask=mask, other=0).to(tl.uint8, bitcast=True)
        return ((byte >> ((column & 1) << 2).to(tl.uint8)) & 15).to(tl.float32) * scale + bias
    elif table.dtype.element_ty == tl.bfloat16:
        bits = tl.load(table + row * WIDTH + column, mask=mask, other=0).to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)  # a cast does the same, but not to subnormals
    else:
        return tl.load(table + row * WIDTH + column, mask=mask, other=0).to(tl.float32)


@triton.jit
def read_rows(table, row_B, column_D, mask_BD, WIDTH: tl.constexpr):
    """Float32 [B, D]: these columns of one row an id, of a table whose rows hold WIDTH floats."""
    scale_B, bias_B = scale_bias(table, row_B, WIDTH)
    if table.dtype.element_ty == tl.uint8 or table.dtype.element_ty == tl.int8:
        scale, bias = scale_B[:, None], bias_B[:, None]
        return elements(table, row_B[:, None], column_D[None, :], scale, bias, mask_BD, WIDTH)
    else:
        return elements(table, row_B[:, None], column_D[None, :], 1.0, 0.0, mask_BD, WIDTH)


@triton.jit
def columns_of_part(column_D, mask_BD, j, OP: tl.constexpr, PART: tl.constexpr):
    """Which columns of row j of an id go into the program's, and where: all of them, or (concat) PART side by side."""
    if OP == "concat":
        inside_D = (column_D >= j * PART) & (column_D < (j + 1) * PART)
        return column_D - j * PART, mask_BD & inside_D[None, :]
    else:
        return column_D, mask_BD


@triton.jit
def combine(vectors_BD, row_BD, part_BD, FIRST: tl.constexpr, OP: tl.constexpr):
    """`vectors` with a row of an id taken in; the first as it is, for 0 + -0.0 would not be -0.0."""
    if OP == "concat":
        return tl.where(part_BD, row_BD, vectors_BD)
    elif FIRST:
        return row_BD
    elif OP == "mult":
        return vectors_BD * row_BD
    else:
        return vectors_BD + row_BD
