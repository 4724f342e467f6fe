"""Bytes and JSON to ids, vectors to bytes and JSON. No state, no I/O; bad input raises BadRequest with the place."""

# Shapes: B ids in a request, D embedding_dim.

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from embstore import wire
from embstore.errors import BadRequest, ConfigError, DataError, TooManyIds, Unprocessable, WrongDtype
from embstore.ids import Ids as Keys
from embstore.pooling import Bags
from embstore.table import ON_MISSING, Table
from server.http.problems import clip

OCTET_STREAM = "application/octet-stream"
JSON = "application/json"
DTYPES = ("float32", "float16", "bfloat16", "int8")
JSON_DTYPES = ("float32", "float16", "bfloat16")
LONG_NUMBERS = 1 << 16
"""So many floats take about a millisecond to write as JSON: more are written in a thread."""
PLACE = orjson.Fragment(b"\0")
"""Where a text that is written already goes: JSON has this byte nowhere else, strings escape it."""
_INT64 = range(-(1 << 63), 1 << 63)


class LookupBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a JSON lookup of one table."""

    ids: list[int | str]
    on_missing: str = "zero"
    dtype: str = "float32"
    found: bool = False
    offsets: list[int] | None = None
    pooling: str | None = None
    weights: list[float] | None = None


class ManyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a JSON lookup of many tables."""

    tables: dict[str, LookupBody]


_one = msgspec.json.Decoder(LookupBody)
_many = msgspec.json.Decoder(ManyBody)


def decode_lookup(body: bytes) -> LookupBody:
    """A checked JSON lookup body."""
    return check_options(_decode(_one, body))


def decode_many(body: bytes) -> ManyBody:
    """A checked JSON body of many tables."""
    many: ManyBody = _decode(_many, body)
    if not many.tables:
        raise BadRequest('"tables" is empty: name at least one table, {"tables": {"item": {"ids": [1, 2]}}}')
    for one in many.tables.values():
        check_options(one)
    return many


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"body: {error}") from error


def check_options(body: LookupBody) -> LookupBody:
    """The body itself, when its options are known ones."""
    if body.on_missing not in ON_MISSING:
        raise Unprocessable(f"on_missing must be one of {', '.join(ON_MISSING)}, got {clip(body.on_missing)}")
    if body.dtype not in DTYPES:
        raise Unprocessable(f"dtype must be one of {', '.join(DTYPES)}, got {clip(body.dtype)}")
    return body


def bags_of(body: LookupBody, table: str) -> Bags | None:
    """The bags a body asks for, None when it asks for a vector an id; Unprocessable when they do not fit its ids."""
    if body.offsets is None and body.pooling is None and body.weights is None:
        return None
    try:
        return Bags.of(len(body.ids), body.offsets, body.pooling, body.weights)
    except (ConfigError, DataError) as error:
        raise Unprocessable(str(error), table=table) from error


def keys_of(ids: Sequence[int | str], table: Table) -> Keys:
    """JSON ids as what the table takes: int64 [B] (decimal strings accepted), or strings; else WrongDtype."""
    kinds = set(map(type, ids))
    if table.ids.key_type is str:
        if kinds - {str}:
            at = next(i for i, key in enumerate(ids) if not isinstance(key, str))
            raise _wrong_ids(table, at, ids[at])
        return ids  # type: ignore[return-value]
    if str in kinds:
        ids = [_integer(key, at, table) if isinstance(key, str) else key for at, key in enumerate(ids)]
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        at = next(i for i, key in enumerate(ids) if key not in _INT64)
        raise _wrong_ids(table, at, ids[at]) from None


def _integer(text: str, at: int, table: Table) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        raise _wrong_ids(table, at, text)
    return int(text)


def _wrong_ids(table: Table, at: int, key: int | str) -> WrongDtype:
    """What to raise for the first id that is none of the table's type."""
    kind = "string" if table.ids.key_type is str else "int64"
    shown = clip(key) if isinstance(key, str) else clip(str(key)).strip("'")
    return WrongDtype(f"table {table.name!r} has {kind} ids; ids[{at}] is {shown}", table=table.name)


def decode_octets(body: bytes, table: Table) -> NDArray[np.int64]:
    """Little-endian int64 ids [B] as they stand in the body, without a copy; WrongDtype when the table has strings."""
    if table.ids.key_type is not int:
        first = f"ids[0] is {int.from_bytes(body[:8], 'little', signed=True)}, and " if len(body) >= 8 else ""
        raise WrongDtype(
            f"table {table.name!r} has string ids; {first}{OCTET_STREAM} is int64: send strings as {JSON}",
            table=table.name,
        )
    if len(body) % 8:
        raise BadRequest(f"the body has {len(body):,} bytes; int64 ids take a multiple of 8")
    return np.frombuffer(body, "<i8")


def check_count(num_ids: int, max_ids: int, what: str = "ids") -> None:
    """TooManyIds when a request asks for more than it may."""
    if num_ids > max_ids:
        raise TooManyIds(f"{num_ids:,} {what} in one request; the limit is {max_ids:,}", limit=max_ids)


def check_reply(num_bytes: int, limit: int) -> None:
    """TooManyIds when the vectors asked for make a larger reply than there may be."""
    if num_bytes > limit:
        raise TooManyIds(f"these ids make a reply of {num_bytes:,} bytes; the limit is {limit:,}", limit=limit)


def check_json_dtype(dtype: str) -> None:
    """Unprocessable when a type has no place in JSON."""
    if dtype not in JSON_DTYPES:
        raise Unprocessable(f"{dtype} rows are bytes: ask for them with `Accept: {OCTET_STREAM}`")


def encode_rows(vectors_BD: NDArray[np.float32], dtype: str) -> memoryview | bytes:
    """Row-major little-endian rows; float32 without a copy. Unprocessable when a number does not fit the type."""
    if dtype == "float32":
        return vectors_BD.data.cast("B") if vectors_BD.size else b""
    try:
        return wire.encode_rows(vectors_BD, dtype)
    except DataError as error:
        raise Unprocessable(str(error)) from error


def json_vectors(vectors_BD: NDArray[np.float32], dtype: str, *, flat: bool = False) -> memoryview:
    """Vectors rounded to a type, as the text of a list of lists, or of all their numbers."""
    if dtype != "float32":
        vectors_BD = wire.decode_rows(encode_rows(vectors_BD, dtype), dtype, vectors_BD.shape[1])
    return wire.json_rows(vectors_BD, flat=flat)


@lru_cache(1024)
def decode_query(query: bytes) -> tuple[str, str]:
    """on_missing and dtype of a query string."""
    if not query:
        return "zero", "float32"
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise BadRequest(f"query string: {error}") from error
    options = dict(pairs)
    unknown = sorted(set(options) - {"on_missing", "dtype"})
    if unknown:
        raise BadRequest(f"unknown query parameter {clip(unknown[0])}: there are on_missing and dtype")
    if len(options) < len(pairs):
        raise BadRequest("a query parameter is given twice")
    on_missing, dtype = options.get("on_missing", "zero"), options.get("dtype", "float32")
    check_options(LookupBody(ids=[], on_missing=on_missing, dtype=dtype))
    return on_missing, dtype


def refuse_query(query: bytes) -> None:
    """BadRequest when options of a JSON call stand where nobody reads them."""
    if query:
        raise BadRequest("a JSON lookup takes on_missing and dtype in its body, not in the query string")


def json_table(
    name: str,
    version: int,
    dtype: str,
    vectors_BD: NDArray[np.float32],
    found_B: NDArray[np.bool_] | None,
    num_ids: int,
    wants_found: bool,
    texts: list[memoryview],
) -> dict[str, Any]:
    """A table's part of a JSON reply; the text of its vectors goes to `texts`."""
    texts.append(json_vectors(vectors_BD, dtype))
    out: dict[str, Any] = {
        "table": name,
        "version": version,
        "embedding_dim": vectors_BD.shape[1],
        "dtype": dtype,
        "vectors": PLACE,
    }
    if found_B is not None or wants_found:
        out["found"] = np.ones(num_ids, np.bool_) if found_B is None else found_B
    return out


def encode_found(found_B: NDArray[np.bool_]) -> bytes:
    """Found bits: bit i of byte i // 8, least significant first."""
    return np.packbits(found_B, bitorder="little").tobytes()


def encode_json(value: Any, texts: Sequence[memoryview]) -> tuple[bytes | memoryview, ...]:
    """JSON in pieces; arrays as lists, and each PLACE is the next of `texts`, which are not copied."""
    pieces: list[bytes | memoryview] = []
    first, *others = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).split(b"\0")
    pieces.append(first)
    for text, other in zip(texts, others, strict=True):
        pieces += text, other
    return tuple(pieces)
