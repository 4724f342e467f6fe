"""Vectors as the bytes of a reply: float32, float16, bfloat16, int8, or JSON.

Row-major and little-endian. float16 and bfloat16 are rounded to nearest even. An int8 row is its codes, then a float32
scale and a float32 bias: what `embstore.quantize` stores, and FBGEMM. What is not float32 is finite, or DataError.
"""

# Shapes: B vectors, D embedding_dim.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ConfigError, DataError
from embstore.kernels import Loops

cpu_wire, cpu_decimal = Loops("cpu.wire"), Loops("cpu.decimal")

DTYPES = ("float32", "float16", "bfloat16", "int8")
_TOO_LARGE = {"float16": np.float32(65520.0), "bfloat16": np.float32(255.5 * 2.0**120)}
"""The first numbers that round to infinity."""
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def row_bytes(dtype: str, embedding_dim: int) -> int:
    """Bytes of one encoded vector; ConfigError for a dtype that replies do not have."""
    if dtype == "float32":
        return 4 * embedding_dim
    if dtype in ("float16", "bfloat16"):
        return 2 * embedding_dim
    if dtype == "int8":
        return embedding_dim + 8
    raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def encode_rows(
    vectors_BD: Floats, dtype: str, out: bytearray | memoryview | Bytes | None = None
) -> memoryview | bytes:
    """The vectors as bytes, B * row_bytes of them; float32 without a copy, or written into `out` where it is given.

    DataError names the first row that has a number too large for the dtype, or one that is not finite.
    """
    num_bytes = len(vectors_BD) * row_bytes(dtype, vectors_BD.shape[1])
    encoded = np.empty(num_bytes, np.uint8) if out is None else np.frombuffer(out, np.uint8)
    if len(encoded) != num_bytes:
        raise DataError(f"out has {len(encoded):,} bytes; {len(vectors_BD):,} rows of {dtype} take {num_bytes:,}")
    if not num_bytes:
        return b""
    contiguous_BD = np.ascontiguousarray(vectors_BD, "<f4")
    if dtype == "float32":
        if out is None:
            return contiguous_BD.data.cast("B")
        encoded[:] = contiguous_BD.reshape(-1).view(np.uint8)
    elif dtype == "int8":
        _encode_int8(contiguous_BD, encoded)
    else:
        _encode_halves(contiguous_BD, dtype, encoded.view("<u2"))
    return encoded.data


def _encode_int8(vectors_BD: Floats, encoded: Bytes) -> None:
    bad = cpu_wire.to_int8(vectors_BD.view(np.uint32), encoded.reshape(len(vectors_BD), -1))
    if bad >= 0:
        row_D = vectors_BD[bad]
        raise DataError(f"row {bad:,} goes from {row_D.min():g} to {row_D.max():g}, too far for int8; ask for float32")


def _encode_halves(vectors_BD: Floats, dtype: str, encoded: NDArray[np.uint16]) -> None:
    encode = cpu_wire.to_float16 if dtype == "float16" else cpu_wire.to_bfloat16
    if encode(vectors_BD.reshape(-1).view(np.uint32), encoded):
        return
    most, other = ("65504", "bfloat16, int8 or float32") if dtype == "float16" else ("3.38953e+38", "float32")
    sizes_BD = np.abs(vectors_BD)
    bad = int(np.flatnonzero(~(sizes_BD < _TOO_LARGE[dtype]).all(axis=1))[0])
    raise DataError(f"row {bad:,} reaches {sizes_BD[bad].max():g}, {dtype} holds numbers up to {most}; ask for {other}")


def decode_rows(data: bytes | bytearray | memoryview, dtype: str, embedding_dim: int) -> Floats:
    """The float32 vectors [B, D] that encoded rows stand for."""
    rows_BP = np.frombuffer(data, np.uint8).reshape(-1, row_bytes(dtype, embedding_dim))
    if dtype == "float32":
        return rows_BP.view("<f4")
    if dtype == "float16":
        return rows_BP.view("<f2").astype(np.float32)
    if dtype == "bfloat16":
        return (rows_BP.view("<u2").astype(np.uint32) << 16).view(np.float32)
    tail_B2 = np.ascontiguousarray(rows_BP[:, embedding_dim:]).view("<f4")
    vectors_BD: Floats = rows_BP[:, :embedding_dim] * tail_B2[:, :1] + tail_B2[:, 1:]
    return vectors_BD


def json_rows(vectors_BD: Floats, *, flat: bool = False) -> memoryview:
    """The vectors as a JSON array of arrays, or of all their numbers: each in the fewest digits that read back as it.

    What is not finite is null. D is at least 1. The GIL is not held.
    """
    num_rows, width = vectors_BD.shape
    text = np.empty(cpu_decimal.MOST_BYTES * vectors_BD.size + 2 * num_rows + 2, np.uint8)
    bits = np.ascontiguousarray(vectors_BD, np.float32).reshape(-1).view(np.uint32)
    return text[: cpu_decimal.put_numbers(bits, 0 if flat else width, text)].data
