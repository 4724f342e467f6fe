"""Rows from an answer's octets or JSON; whatever is not exactly right raises `ProtocolError`.

Shapes: n ids in the call, d embedding_dim of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._errors import ProtocolError
from ._rows import Rows

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def rows_from_octets(headers: Mapping[str, str], body: bytes, *, num_ids: int, dtype: str, version: int | None) -> Rows:
    """Row-major little-endian rows, then found bits where an id was missing; headers say how much of each."""
    labelled = headers.get("x-embedding-dtype")
    if labelled != dtype:
        raise ProtocolError(f"asked for {dtype}, header x-embedding-dtype is {labelled!r:.80}")
    answered = _natural(headers, "x-embedding-version")
    check_answered(answered, version)
    n, d = _shape(headers)
    if n != num_ids or d < 1:
        raise ProtocolError(f"asked for {num_ids} ids, header x-embedding-shape is {n},{d}")
    missing = _natural(headers, "x-embedding-missing")
    if missing > n:
        raise ProtocolError(f"header x-embedding-missing is {missing}, more than the {n} ids asked for")

    item = DTYPES[dtype]
    rows_size = n * d * item.itemsize
    bits_size = (n + 7) // 8 if missing else 0
    if len(body) != rows_size + bits_size:
        raise ProtocolError(
            f"{n},{d} {dtype} rows with {missing} missing take {rows_size + bits_size} bytes, got {len(body)}"
        )
    return Rows(
        vectors=np.frombuffer(body, item, count=n * d).reshape(n, d),
        found=_found_from_bits(body, rows_size, n, missing),
        version=answered,
        missing=missing,
        dtype=dtype,
        release=headers.get("x-embedding-release"),
        request_id=headers.get("x-request-id"),
    )


def _found_from_bits(body: bytes, offset: int, n: int, missing: int) -> NDArray[np.bool_]:
    """Bit i of byte i // 8, least significant first, is 1 where id i was found; no bits: every id was."""
    if not missing:
        found = np.ones(n, dtype=np.bool_)
    else:
        bits = np.frombuffer(body, np.uint8, offset=offset)
        found = np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)
        if n - int(np.count_nonzero(found)) != missing:
            raise ProtocolError(f"header x-embedding-missing is {missing}, the found bits say otherwise")
    found.flags.writeable = False
    return found


def rows_from_json(
    entry: Any,
    *,
    table: str,
    num_ids: int,
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
    answered, d = entry.get("version"), entry.get("embedding_dim")
    if type(answered) is not int or type(d) is not int or d < 1:
        raise ProtocolError(f"table {table!r}: version {answered!r:.40}, embedding_dim {d!r:.40} must be integers")
    check_answered(answered, version)
    vectors = _vectors_from_json(entry.get("vectors"), table, num_ids, d, dtype)
    found = _found_from_json(entry.get("found"), table, num_ids)
    return Rows(
        vectors=vectors,
        found=found,
        version=answered,
        missing=num_ids - int(np.count_nonzero(found)),
        dtype=dtype,
        release=release,
        request_id=request_id,
    )


def _vectors_from_json(vectors: Any, table: str, n: int, d: int, dtype: str) -> NDArray[Any]:
    wrong = f"table {table!r}: vectors must be {n} rows of {d} numbers that fit {dtype}"
    if not isinstance(vectors, list) or len(vectors) != n:
        raise ProtocolError(wrong)
    try:
        wide = np.array(vectors) if n else np.empty((0, d))
        if wide.dtype.kind not in "if" or wide.shape != (n, d):
            raise ProtocolError(wrong)
        with np.errstate(over="raise"):
            rows: NDArray[Any] = wide.astype(DTYPES[dtype])
    except (ValueError, FloatingPointError) as error:  # rows of different lengths; a number too large
        raise ProtocolError(wrong) from error
    rows.flags.writeable = False
    return rows


def _found_from_json(found: Any, table: str, n: int) -> NDArray[np.bool_]:
    if found is None:
        array = np.ones(n, dtype=np.bool_)
    elif isinstance(found, list) and len(found) == n and set(map(type, found)) <= {bool}:
        array = np.array(found, dtype=np.bool_)
    else:
        raise ProtocolError(f"table {table!r}: found must be {n} booleans")
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
    return _digits(text, name, text)


def _shape(headers: Mapping[str, str]) -> tuple[int, int]:
    text = headers.get("x-embedding-shape")
    if text is None:
        raise ProtocolError("header x-embedding-shape is missing")
    n, _, d = text.partition(",")
    return _digits(n, "x-embedding-shape", text), _digits(d, "x-embedding-shape", text)


def _digits(digits: str, name: str, text: str) -> int:
    digits = digits.strip(" ")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19):
        raise ProtocolError(f"header {name} is {text!r:.80}, which is not what it should hold")
    return int(digits)
