"""Vectors as bytes and as text, and the header lines that describe them: what the codecs share. No state, no I/O."""

# Shapes: B rows of a reply, D embedding_dim.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from embstore import wire
from embstore.errors import DataError, Unprocessable
from embstore.table import ON_MISSING
from server.api.query import Answer
from server.http.messages import Buffer
from server.http.problems import clip

OCTET_STREAM = "application/octet-stream"
JSON = "application/json"
TEXT_DTYPES = ("float32", "float16", "bfloat16")
DTYPES = (*TEXT_DTYPES, "int8")
LONG_NUMBERS = 1 << 16
"""Writing this many floats as JSON takes about a millisecond: more are written in a thread."""
PLACEHOLDER = orjson.Fragment(b"\0")
"""Where a text that is written already goes: JSON has this byte nowhere else, strings escape it."""
_HEAD = (
    b"content-type: %s\r\nx-embedding-version: %d\r\nx-embedding-shape: %d,%d\r\nx-embedding-dtype: %s\r\n"
    b"x-embedding-missing: %d\r\n"
)


def check_on_missing(value: object) -> None:
    """Unprocessable unless this is a policy for missing ids."""
    if value not in ON_MISSING:
        raise Unprocessable(f"on_missing must be one of {', '.join(ON_MISSING)}, got {clip(str(value))}")


def check_dtype(value: object, allowed: Sequence[str] = DTYPES) -> None:
    """Unprocessable unless rows can be sent as this type."""
    if value not in allowed:
        raise Unprocessable(f"dtype must be one of {', '.join(allowed)}, got {clip(str(value))}")


def vectors_head(content_type: str, answer: Answer, release: str | None) -> bytes:
    """Header lines that say which version answered, and with what."""
    query, table, fetched = answer
    shape = len(fetched.vectors_BD), table.embedding_dim
    head = _HEAD % (content_type.encode(), table.version, *shape, query.dtype.encode(), fetched.missing)
    return head + release_head(release)


def release_head(release: str | None) -> bytes:
    """The header line of a release, nothing where there is none."""
    return b"" if release is None else b"x-embedding-release: %s\r\n" % release.encode()


def encode_rows(vectors_BD: NDArray[np.float32], dtype: str) -> Buffer:
    """Row-major little-endian rows; float32 without a copy. Unprocessable when a number does not fit the type."""
    if dtype == "float32":
        return vectors_BD.data.cast("B") if vectors_BD.size else b""
    try:
        return wire.encode_rows(vectors_BD, dtype)
    except DataError as error:
        raise Unprocessable(str(error)) from error


def encode_found(found_B: NDArray[np.bool_]) -> bytes:
    """Found bits: bit i of byte i // 8, least significant first."""
    return np.packbits(found_B, bitorder="little").tobytes()


def json_vectors(vectors_BD: NDArray[np.float32], dtype: str, *, flat: bool = False) -> memoryview:
    """Vectors as the text of a list of lists, or of all their numbers: those that `dtype` has, shortest digits."""
    if dtype != "float32":
        vectors_BD = wire.decode_rows(encode_rows(vectors_BD, dtype), dtype, vectors_BD.shape[1])
    return wire.json_rows(vectors_BD, flat=flat)


def encode_json(value: Any, texts: Sequence[memoryview]) -> tuple[Buffer, ...]:
    """JSON in pieces; arrays as lists, and each PLACEHOLDER is the next of `texts`, which are not copied."""
    first, *others = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).split(b"\0")
    pieces: list[Buffer] = [first]
    for text, other in zip(texts, others, strict=True):
        pieces += text, other
    return tuple(pieces)
