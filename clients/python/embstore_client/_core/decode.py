"""Rows from an answer's octets or JSON; whatever is not exactly right raises `ProtocolError`.

Shapes: n ids in the call, g rows (n, or one a bag), d embedding_dim of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.rows import Rows
from embstore_client._errors import ProtocolError

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("u1"),
}
"""What travels, as numpy types: bfloat16 as its bits, int8 as bytes."""
_INT8_TAIL = 8  # a float32 scale and a float32 bias after the codes of a row


def row_items(dtype: str, d: int) -> int:
    """Numbers of `DTYPES[dtype]` in one row."""
    return d + _INT8_TAIL if dtype == "int8" else d


def rows_from_octets(
    headers: Mapping[str, str],
    body: bytes,
    *,
    num_ids: int,
    num_rows: int,
    dtype: str,
    version: int | None,
) -> Rows:
    """Row-major little-endian rows, then found bits where an id was missing; headers say how much of each."""
    labelled = headers.get("x-embedding-dtype")
    if labelled != dtype:
        raise ProtocolError(f"asked for {dtype}, header x-embedding-dtype is {labelled!r:.80}")
    answered = _natural(headers, "x-embedding-version")
    check_answered(answered, version)
    g, d = _shape(headers)
    if g != num_rows or d < 1:
        raise ProtocolError(f"asked for {num_rows} rows, header x-embedding-shape is {g},{d}")
    missing = _natural(headers, "x-embedding-missing")
    if missing > num_ids:
        raise ProtocolError(f"header x-embedding-missing is {missing}, more than the {num_ids} ids asked for")

    item = DTYPES[dtype]
    items = row_items(dtype, d)
    rows_size = g * items * item.itemsize
    bits_size = (num_ids + 7) // 8 if missing else 0
    if len(body) != rows_size + bits_size:
        raise ProtocolError(
            f"{g},{d} {dtype} rows with {missing} missing take {rows_size + bits_size} bytes, got {len(body)}"
        )
    vectors, encoded = widened(np.frombuffer(body, item, count=g * items).reshape(g, items), dtype)
    return Rows(
        vectors=vectors,
        found=_found_from_bits(body, rows_size, num_ids, missing),
        version=answered,
        missing=missing,
        dtype=dtype,
        release=headers.get("x-embedding-release"),
        request_id=headers.get("x-request-id"),
        encoded=encoded,
    )


def widened(wire: NDArray[Any], dtype: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """`vectors` and `encoded` of rows as they travelled, of `DTYPES[dtype]`; what numpy can read is not copied."""
    if dtype == "bfloat16":
        vectors = wire.astype(np.uint32)
        vectors <<= 16
        return _read_only(vectors.view(np.float32)), wire
    if dtype == "int8":
        tail = np.ascontiguousarray(wire[:, -_INT8_TAIL:]).view("<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # what a server sends is not for this process to warn of
            return _read_only(wire[:, :-_INT8_TAIL] * tail[:, :1] + tail[:, 1:]), wire
    return wire, None


def wire_rows(rows: Rows) -> NDArray[Any]:
    """Rows as they travelled: what `widened` made `vectors` and `encoded` from."""
    return rows.vectors if rows.encoded is None else rows.encoded


def _found_from_bits(body: bytes, offset: int, n: int, missing: int) -> NDArray[np.bool_]:
    """Bit i of byte i // 8, least significant first, is 1 where id i was found; no bits: every id was."""
    if not missing:
        found = np.ones(n, dtype=np.bool_)
    else:
        bits = np.frombuffer(body, np.uint8, offset=offset)
        found = np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)
        if n - int(np.count_nonzero(found)) != missing:
            raise ProtocolError(f"header x-embedding-missing is {missing}, the found bits say otherwise")
    return _read_only(found)


def rows_from_json(
    entry: Any,
    *,
    table: str,
    num_ids: int,
    num_rows: int,
    dtype: str,
    version: int | None,
    release: str | None,
    request_id: str | None,
) -> Rows:
    """One table's `{"table","version","embedding_dim","dtype","vectors","found"?}`."""
    if not isinstance(entry, dict):
        raise ProtocolError(f"table {table!r}: rows must be an object, got {entry!r:.80}")
    if entry.get("table") != table:
        raise ProtocolError(f"asked for table {table!r}, got {entry.get('table')!r:.80}")
    if entry.get("dtype") != dtype:
        raise ProtocolError(f"table {table!r}: asked for {dtype}, got {entry.get('dtype')!r:.80}")
    if "release" in entry and entry["release"] != release:
        raise ProtocolError(
            f"table {table!r} is from release {entry['release']!r:.80}, the answer from {release!r:.80}"
        )
    answered, d = entry.get("version"), entry.get("embedding_dim")
    if type(answered) is not int or type(d) is not int or d < 1:
        raise ProtocolError(f"table {table!r}: version {answered!r:.40}, embedding_dim {d!r:.40} must be integers")
    check_answered(answered, version)
    vectors, encoded = _vectors_from_json(entry.get("vectors"), table, num_rows, d, dtype)
    found = _found_from_json(entry.get("found"), table, num_ids)
    return Rows(
        vectors=vectors,
        found=found,
        version=answered,
        missing=num_ids - int(np.count_nonzero(found)),
        dtype=dtype,
        release=release,
        request_id=request_id,
        encoded=encoded,
    )


def _vectors_from_json(
    vectors: Any, table: str, g: int, d: int, dtype: str
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    wrong = f"table {table!r}: vectors must be {g} rows of {d} numbers that fit {dtype}"
    if not isinstance(vectors, list) or len(vectors) != g or dtype == "int8":  # JSON has no place for scales
        raise ProtocolError(wrong)
    try:
        wide = np.array(vectors) if g else np.empty((0, d))
        if wide.dtype.kind not in "if" or wide.shape != (g, d):
            raise ProtocolError(wrong)
        with np.errstate(over="raise"):
            rows: NDArray[Any] = wide.astype(np.float16 if dtype == "float16" else np.float32)
    except (ValueError, FloatingPointError) as error:  # rows of different lengths; a number too large
        raise ProtocolError(wrong) from error
    if dtype != "bfloat16":
        return _read_only(rows), None
    bits = rows.view(np.uint32)
    if (bits & 0xFFFF).any():
        raise ProtocolError(wrong)
    return widened(_read_only((bits >> 16).astype(np.uint16)), dtype)


def _found_from_json(found: Any, table: str, n: int) -> NDArray[np.bool_]:
    if found is None:
        array = np.ones(n, dtype=np.bool_)
    elif isinstance(found, list) and len(found) == n and set(map(type, found)) <= {bool}:
        array = np.array(found, dtype=np.bool_)
    else:
        raise ProtocolError(f"table {table!r}: found must be {n} booleans")
    return _read_only(array)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def check_answered(answered: int, version: int | None) -> None:
    if answered < 1:
        raise ProtocolError(f"a version is a positive integer, got {answered}")
    if version is not None and answered != version:
        raise ProtocolError(f"asked for version {version}, version {answered} answered")


def _natural(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name)
    if text is None:
        raise ProtocolError(f"header {name} is missing")
    return digits(text, f"header {name}", text)


def _shape(headers: Mapping[str, str]) -> tuple[int, int]:
    text = headers.get("x-embedding-shape")
    if text is None:
        raise ProtocolError("header x-embedding-shape is missing")
    g, _, d = text.partition(",")
    return digits(g, "header x-embedding-shape", text), digits(d, "header x-embedding-shape", text)


def digits(part: str, name: str, text: str) -> int:
    """The number that decimal digits stand for; `name` and the whole `text` are for the message."""
    part = part.strip(" ")
    if not (part.isascii() and part.isdigit() and len(part) <= 19):
        raise ProtocolError(f"{name} is {text!r:.80}, which is not what it should hold")
    return int(part)
