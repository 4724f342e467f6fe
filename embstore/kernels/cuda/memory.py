"""One array that all ids share, in one launch: blocks at hashed places (robe), single numbers at hashed places (lma).

Multiplying is all the arithmetic there is, so results are the torch reference's bit for bit.
"""

# Shapes: B ids of a program, C chunks of a program, Z floats of a chunk, D columns of a program, M floats of memory.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embstore.hashing import GAMMA
from embstore.kernels.cuda.rows import bucket, launch, launch_chunks, mix, program, put, tile_columns, tile_ids

NEXT_SEED = tl.constexpr(GAMMA)
WORD_BITS = tl.constexpr(64)


@triton.jit
def _signs(word_BC, inside_Z, BLOCK_Z: tl.constexpr):
    """Which numbers of the chunks are negated: bit j mod 64 of mix64(word, j div 64)."""
    offset = tl.zeros((1,), tl.uint64) + NEXT_SEED
    bits_BCZ = mix(word_BC, offset)[:, :, None]
    for w in tl.static_range(1, (BLOCK_Z + WORD_BITS - 1) // WORD_BITS):
        offset += NEXT_SEED
        bits_BCZ = tl.where((inside_Z // WORD_BITS == w)[None, None, :], mix(word_BC, offset)[:, :, None], bits_BCZ)
    return ((bits_BCZ >> (inside_Z % WORD_BITS).to(tl.uint64)[None, None, :]) & 1) == 1


@program
def _gather_blocks(
    ids, num_ids: tl.int64, out, memory, size: tl.int64, offset: tl.int64, scale: tl.float32,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SIGNED: tl.constexpr, LAPS: tl.constexpr, BLOCK_Z: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    chunk_C = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_Z = tl.arange(0, BLOCK_Z)
    column_CZ = chunk_C[:, None] * CHUNK + inside_Z[None, :]
    mask_BCZ = found_B[:, None, None] & ((inside_Z < CHUNK)[None, :] & (column_CZ < WIDTH))[None, :, :]
    word_BC = mix(id_B[:, None] * CHUNKS + chunk_C[None, :], offset)
    start_BC = (((word_BC >> 32) * size.to(tl.uint64)) >> 32).to(tl.int64)
    place_BCZ = start_BC[:, :, None] + inside_Z[None, None, :]
    place_BCZ = place_BCZ % size if LAPS else tl.where(place_BCZ >= size, place_BCZ - size, place_BCZ)
    value_BCZ = tl.load(memory + place_BCZ, mask=mask_BCZ, other=0.0)
    factor = tl.where(_signs(word_BC, inside_Z, BLOCK_Z), -scale, scale) if SIGNED else scale
    tl.store(out + at_B[:, None, None] * WIDTH + column_CZ[None, :, :], value_BCZ * factor, mask=mask_BCZ)


def gather_blocks(
    memory: Tensor, ids_B: Tensor, block: int, offset: int, signed: bool, scale: float, out_BD: Tensor
) -> None:
    """out = blocks of `memory` at hashed places, with hashed signs, times `scale`; schemes/robe.py has the formula.

    offset: `hashing.seed_offset` of the table's seed. A chunk's hash is taken once for all its columns.
    """
    width, size = out_BD.shape[1], len(memory)
    num_chunks, block_z = triton.cdiv(width, block), triton.next_power_of_2(min(block, width))
    constants = {"CHUNKS": num_chunks, "CHUNK": block, "SIGNED": signed, "LAPS": block_z > size, "BLOCK_Z": block_z}
    launch_chunks(_gather_blocks, ids_B, out_BD, (num_chunks, block_z), memory, size, offset, scale, **constants)


@program
def _gather_by_signature(
    ids, num_ids: tl.int64, out, memory, signatures, masks, offsets, size: tl.int64,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    mask_D = tl.load(masks + column_D, mask=column_D < WIDTH, other=0)
    offset_D = tl.load(offsets + column_D, mask=column_D < WIDTH, other=0)
    key_BD = tl.load(signatures + id_B)[:, None] & mask_D[None, :]
    place_BD = bucket(key_BD, size, offset_D[None, :])
    put(out, at_B, column_D, tl.load(memory + place_BD, mask=mask_BD, other=0.0), mask_BD, WIDTH)


def gather_by_signature(
    memory: Tensor, signatures: Tensor, masks: Tensor, offsets: Tensor, ids_B: Tensor, out_BD: Tensor
) -> None:
    """out[:, d] = memory[bucket of (signatures[ids] & masks[d])], hashed with offsets[d]; schemes/lma.py says why."""
    launch(_gather_by_signature, ids_B, out_BD, memory, signatures, masks, offsets, len(memory))
