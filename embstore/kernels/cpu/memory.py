"""CPU loops over one array that all ids share: blocks at hashed places (robe), single numbers at hashed places (lma).

Both run some ids in front of themselves: they resolve an id to places, ask the processor for them, and read them
later. Multiplying by one number is all the arithmetic there is, so results are the torch reference's bit for bit.
A negative id leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, M floats of memory, N num_embeddings.

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from embstore.hashing import GAMMA
from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import LINE_BYTES, prefetch_1d
from embstore.kernels.cpu.rows import AHEAD, IDS, OUT, float32, int64, mix, void

MEMORY = types.Array(types.float32, 1, "C", readonly=True)
WORDS = types.Array(types.int64, 1, "C", readonly=True)
FLOATS_IN_LINE = LINE_BYTES // 4
WORD_BITS = 64
LMA_AHEAD = 2
"""An id of lma asks for a cache line a column: with two ids on the way the processor can take no more."""


@njit(inline="always")
def _place(hashed, size):
    """The hash's high 32 bits into [0, size), as `hashing.bucket` does."""
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


def _put_lanes(num_lanes: int) -> Any:
    """The operation out[i, at + j] = memory[start + j] * factor, negated where bit j of `signs` is set, j < num_lanes.

    Vector instructions by hand: numba does not find them, because it cannot know that `memory` and `out` are apart.
    """
    lanes, i32 = ir.VectorType(ir.FloatType(), num_lanes), ir.IntType(32)
    bits = ir.IntType(num_lanes)
    masks = ir.VectorType(ir.IntType(1), num_lanes)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def pointer(array: int, indices: list[Any]) -> Any:
            struct = context.make_array(sig.args[array])(context, builder, args[array])
            item = cgutils.get_item_pointer(context, builder, sig.args[array], struct, indices)
            return builder.bitcast(item, lanes.as_pointer())

        values = builder.load(pointer(0, [args[1]]))
        values.align = 4
        anything = ir.Constant(lanes, ir.Undefined)
        first = builder.insert_element(anything, args[3], i32(0))
        factors = builder.shuffle_vector(first, anything, ir.Constant(ir.VectorType(i32, num_lanes), [0] * num_lanes))
        scaled = builder.fmul(values, factors)
        negative = builder.bitcast(builder.trunc(args[2], bits), masks)
        builder.store(builder.select(negative, builder.fneg(scaled), scaled), pointer(4, [args[5], args[6]])).align = 4
        return context.get_dummy_value()

    @intrinsic
    def operation(typing_context, memory, start, signs, factor, out, i, at):  # noqa: ARG001
        return void(memory, types.intp, types.uint64, types.float32, out, types.intp, types.intp), emit

    return operation


_put_16, _put_8 = _put_lanes(16), _put_lanes(8)


@njit(error_model="numpy")
def _put_chunk(memory, hashed, signed, scale, out, i, at, length):
    """out[i, at:at + length] = memory from the hash's place on, round its end, with the hash's signs, times `scale`."""
    size = memory.shape[0]
    start = _place(hashed, size)
    word = np.uint64(0)
    while length > 0:
        word += np.uint64(GAMMA)
        signs = mix(hashed, word) if signed else np.uint64(0)
        left = min(length, WORD_BITS)
        length -= left
        while left >= 16 and start + 16 <= size:
            _put_16(memory, start, signs, scale, out, i, at)
            start, at, left, signs = start + 16, at + 16, left - 16, signs >> np.uint64(16)
        if left >= 8 and start + 8 <= size:
            _put_8(memory, start, signs, scale, out, i, at)
            start, at, left, signs = start + 8, at + 8, left - 8, signs >> np.uint64(8)
        if start == size:
            start = 0
        while left > 0:
            value = memory[start] * scale
            out[i, at] = -value if signs & np.uint64(1) else value
            start, at, left, signs = start + 1, at + 1, left - 1, signs >> np.uint64(1)
            if start == size:
                start = 0


@compiled(void(MEMORY, IDS, int64, int64, types.boolean, float32, OUT))
def gather_blocks(memory, ids, block, offset, signed, scale, out):
    """out = blocks of `memory` at hashed places, with hashed signs, times `scale`; schemes/robe.py has the formula.

    offset: `hashing.seed_offset` of the table's seed.
    """
    num_ids, width, size = ids.shape[0], out.shape[1], memory.shape[0]
    num_chunks = (width + block - 1) // block
    ring = np.empty(AHEAD * num_chunks, np.uint64)
    for step in range(num_ids + AHEAD):
        base = step % AHEAD * num_chunks
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            at = 0
            if block == 16:  # robe's default: a chunk is one vector operation; 1,000 ids x 64 in 31 us instead of 40
                for k in range(base, base + num_chunks):
                    hashed = ring[k]
                    start = _place(hashed, size)
                    if at + 16 <= width and start + 16 <= size:
                        signs = mix(hashed, np.uint64(GAMMA)) if signed else np.uint64(0)
                        _put_16(memory, start, signs, scale, out, i, at)
                    else:
                        _put_chunk(memory, hashed, signed, scale, out, i, at, min(block, width - at))
                    at += block
            else:
                for k in range(base, base + num_chunks):
                    _put_chunk(memory, ring[k], signed, scale, out, i, at, min(block, width - at))
                    at += block
        if step < num_ids and ids[step] >= 0:
            key = np.uint64(ids[step]) * np.uint64(num_chunks)
            for k in range(base, base + num_chunks):
                hashed = mix(key, offset)
                ring[k] = hashed
                key += np.uint64(1)
                start = _place(hashed, size)
                last = min(start + block, size) - 1
                prefetch_1d(memory, start)
                prefetch_1d(memory, last)
                if block > FLOATS_IN_LINE:
                    for place in range(start + FLOATS_IN_LINE, last, FLOATS_IN_LINE):
                        prefetch_1d(memory, place)


@compiled(void(MEMORY, WORDS, WORDS, WORDS, IDS, OUT))
def gather_by_signature(memory, signatures, masks, offsets, ids, out):
    """out[:, d] = memory[bucket of (signatures[ids] & masks[d])], hashed with offsets[d]; schemes/lma.py says why."""
    num_ids, width, size = ids.shape[0], out.shape[1], memory.shape[0]
    places = np.empty((LMA_AHEAD, width), np.int64)
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            prefetch_1d(signatures, ids[i])
    for step in range(num_ids + LMA_AHEAD):
        slot = step % LMA_AHEAD
        i = step - LMA_AHEAD
        if i >= 0 and ids[i] >= 0:
            for d in range(width):
                out[i, d] = memory[places[slot, d]]
        if step + AHEAD < num_ids and ids[step + AHEAD] >= 0:
            prefetch_1d(signatures, ids[step + AHEAD])
        if step < num_ids and ids[step] >= 0:
            signature = signatures[ids[step]]
            for d in range(width):
                places[slot, d] = _place(mix(signature & masks[d], offsets[d]), size)
            for d in range(width):
                prefetch_1d(memory, places[slot, d])
