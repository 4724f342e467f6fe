"""Open Inference Protocol (v2): what an infer request asks of tables, and its reply.

A table is a model: input `ids`, and for bags `offsets` and `weights`; outputs `embeddings` and `found`. The model
`embstore` is all tables together, answered from one release: an input and an output for each table, named after it,
with `{table}.offsets`, `{table}.weights` and `{table}.found` beside them; its versions are the releases. The name is
taken: a table that is called `embstore` too has its own lookups under /v1 and in this model.
"""

# Shapes: B ids of a table, G bags of them, D embedding_dim.

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import BadRequest, ConfigError, DataError, DeadlineExceeded, Unprocessable, WrongDtype
from embstore.pooling import Bags
from server.api.codecs.tensors import (
    BYTES,
    InferRequest,
    Output,
    OutputRequest,
    Tensor,
    decode_infer,
    encode_infer,
)
from server.api.codecs.vectors import LONG_NUMBERS, check_on_missing, encode_rows, json_vectors
from server.api.query import Answer, Call, Encoded, Query
from server.api.shared_memory import Access, Regions
from server.api.shared_objects import Window, check_apart, write_all
from server.http.limits import Limits
from server.http.messages import Request
from server.http.problems import clip
from server.http.routing import MANY

IDS, OFFSETS, WEIGHTS, EMBEDDINGS, FOUND = "ids", "offsets", "weights", "embeddings", "found"
PROTOCOL = "open-inference"
DTYPES = {"float32": "float32", "FP32": "float32", "float16": "float16", "FP16": "float16"}
_INT64_MAX = (1 << 63) - 1
DATATYPES = {"float32": "FP32", "float16": "FP16"}
MANY_NUMBERS = 1 << 18
"""Copying this many floats to shared memory takes a fraction of a millisecond: more are copied in a thread."""


def decode(request: Request, limits: Limits, regions: Regions) -> Call:
    """What `POST /v2/models/{model}[/versions/{n}]/infer` asks, of one table or of the model `embstore`."""
    memory = Access(regions, request.headers, limits.max_body_bytes)
    asks = decode_infer(request.headers, request.body, limits.max_ids, memory.read)
    _apply_timeout(request, asks.parameters.get("timeout"))
    return (_many if request.route.table == MANY else _one)(request, asks, memory)


def _one(request: Request, asks: InferRequest, memory: Access) -> Call:
    """A model that is one table."""
    route = request.route
    if IDS not in asks.inputs:
        raise BadRequest(f"model {route.table!r} needs an input {IDS!r}", table=route.table)
    for name in asks.inputs:
        if name not in (IDS, OFFSETS, WEIGHTS):
            raise BadRequest(f"model {route.table!r} has no input {clip(name)}; it has {IDS}, {OFFSETS}, {WEIGHTS}")
    outputs = asks.outputs or [OutputRequest(name, asks.binary, {}) for name in (EMBEDDINGS, FOUND)]
    for output in outputs:
        if output.name not in (EMBEDDINGS, FOUND):
            raise _no_output(output.name, route.table, (EMBEDDINGS, FOUND))
    sources = [(0, output.name == FOUND) for output in outputs]
    dtypes = [_dtype(asks, output, "") for output in outputs]
    windows = _windows(outputs, memory)
    encode = partial(_encode, asks.id, outputs, sources, dtypes, windows, many=False)
    query = _query(asks, route.table, IDS, "")
    return Call([query], encode, PROTOCOL, _inline_numbers(outputs), version=route.version)


def _many(request: Request, asks: InferRequest, memory: Access) -> Call:
    """The model that is all tables together."""
    if asks.raw:
        raise BadRequest(
            f"model {MANY!r} takes one input per table: a raw binary request is not supported, send the JSON header"
        )
    names = [name for name in asks.inputs if not _belongs(name, (OFFSETS, WEIGHTS), asks.inputs)]
    if not names:
        raise BadRequest(f"model {MANY!r} needs at least one input, named after its table")
    for name in asks.inputs:
        if name not in names and not _belongs(name, (OFFSETS, WEIGHTS), names):
            raise BadRequest(f"input {clip(name)} belongs to no table of this request")
    outputs = asks.outputs or [OutputRequest(name, asks.binary, {}) for name in names]
    for output in outputs:
        if output.name not in names and not _belongs(output.name, (FOUND,), names):
            raise _no_output(output.name, MANY, [*names, *(f"{name}.{FOUND}" for name in names)])
    sources = [
        (names.index(output.name), False)
        if output.name in names
        else (names.index(output.name.removesuffix(f".{FOUND}")), True)
        for output in outputs
    ]
    dtypes = [_dtype(asks, output, f"{output.name}.") for output in outputs]
    windows = _windows(outputs, memory)
    encode = partial(_encode, asks.id, outputs, sources, dtypes, windows, many=True)
    queries = [_query(asks, name, name, f"{name}.") for name in names]
    version = request.route.version
    release = None if version is None else str(version)
    return Call(queries, encode, PROTOCOL, _inline_numbers(outputs), release=release)


def _query(asks: InferRequest, table: str, name: str, prefix: str) -> Query:
    """What a request asks of a table whose ids are input `name`; `prefix` stands before what else is its own."""
    on_missing = _option(asks, prefix, "on_missing", "zero")
    check_on_missing(on_missing)
    datatype, values = tensor = asks.inputs[name]
    fault, ids = None, values
    if datatype != BYTES:
        try:
            ids = int64s(name, tensor)
        except BadRequest as error:
            fault = WrongDtype(f"table {table!r} has int64 ids; {error}", table=table)
    offsets, weights = asks.inputs.get(prefix + OFFSETS), asks.inputs.get(prefix + WEIGHTS)
    pooling = asks.parameters.get(prefix + "pooling")
    if pooling is None and prefix and (offsets is not None or weights is not None):
        pooling = asks.parameters.get("pooling")
    bags = None
    if not (offsets is None and weights is None and pooling is None):
        bags = _bags(table, prefix, len(ids), offsets, weights, pooling)
    return Query(table, ids, on_missing, "float32", bags, f"input {clip(name)}", fault)


def _bags(
    table: str, prefix: str, num_ids: int, offsets: Tensor | None, weights: Tensor | None, pooling: object
) -> Bags:
    offsets_G = None if offsets is None else int64s(prefix + OFFSETS, offsets)
    weights_B = None if weights is None else floats(prefix + WEIGHTS, weights)
    try:
        return Bags.of(num_ids, offsets_G, pooling, weights_B)
    except (ConfigError, DataError) as error:
        raise Unprocessable(str(error), table=table) from error


def int64s(name: str, tensor: Tensor) -> NDArray[np.int64]:
    """An input of any integer type as int64 [N]."""
    datatype, values = tensor
    if datatype == "INT64":
        return values  # type: ignore[return-value]
    if isinstance(values, list) or values.dtype.kind == "f":
        raise Unprocessable(f"input {clip(name)} is {datatype}: send INT64, or another integer type")
    if datatype == "UINT64" and values.size and int(values.max()) > _INT64_MAX:
        at = int(np.argmax(values > _INT64_MAX))
        raise BadRequest(
            f"input {clip(name)}: element {at} is {values[at]}, which does not fit a signed 64-bit integer"
        )
    return values.astype(np.int64)


def floats(name: str, tensor: Tensor) -> NDArray[Any]:
    """An input of numbers [N]."""
    if isinstance(tensor.values, list):
        raise Unprocessable(f"input {clip(name)} is {BYTES}: send FP32")
    return tensor.values


def _apply_timeout(request: Request, timeout: object) -> None:
    """The protocol's own deadline: parameter `timeout`, in microseconds."""
    if not timeout:
        return
    if type(timeout) is not int or timeout < 0:
        raise BadRequest(f"parameter timeout must be whole microseconds, got {clip(repr(timeout))}")
    request.deadline = min(request.deadline, request.began + min(timeout, 1 << 53) / 1e6)
    if time.perf_counter() > request.deadline:
        raise DeadlineExceeded(f"the {timeout:,} microseconds of parameter timeout are over")


def _option(asks: InferRequest, prefix: str, name: str, default: str) -> Any:
    """A parameter of one table, else of the whole request."""
    own = asks.parameters.get(prefix + name)
    return own if own is not None else asks.parameters.get(name, default)


def _dtype(asks: InferRequest, output: OutputRequest, prefix: str) -> str:
    """Type of an output's numbers: as the output says, else the table's parameter, else the request's."""
    wanted = output.parameters.get("dtype") or _option(asks, prefix, "dtype", "float32")
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else None
    if dtype is None:
        raise Unprocessable(f"dtype must be float32 (FP32) or float16 (FP16), got {clip(str(wanted))}")
    return dtype


def _inline_numbers(outputs: Sequence[OutputRequest]) -> int | None:
    """How many numbers of these outputs take no time to encode."""
    if not all(output.binary for output in outputs):
        return LONG_NUMBERS
    return MANY_NUMBERS if any(output.place is not None for output in outputs) else None


def _windows(outputs: Sequence[OutputRequest], memory: Access) -> list[Window | None]:
    """Where each output goes in shared memory; None where it goes into the reply."""
    windows = [
        None if output.place is None else memory.find(output.place, f"output {clip(output.name)}") for output in outputs
    ]
    check_apart(window for window in windows if window is not None)
    return windows


def _encode(
    request_id: str | None,
    outputs: Sequence[OutputRequest],
    sources: Sequence[tuple[int, bool]],
    dtypes: Sequence[str],
    windows: Sequence[Window | None],
    answers: list[Answer],
    release: str | None,
    *,
    many: bool,
) -> Encoded:
    """The reply with these outputs; `sources` says of each which answer it shows, and whether its `found`."""
    encoded = []
    for output, (at, is_found), dtype in zip(outputs, sources, dtypes, strict=True):
        answer = answers[at]
        one = (_found(output, answer) if is_found else _vectors(output, dtype, answer))._replace(place=output.place)
        if many and not is_found:
            one = one._replace(parameters={"version": answer.table.version, "missing": answer.fetched.missing})
        encoded.append(one)
    write_all((window, one.data) for window, one in zip(windows, encoded, strict=True) if window is not None)
    if many:
        return encode_infer(MANY, release or "", request_id, encoded, {} if release is None else {"release": release})
    table = answers[0].table
    return encode_infer(table.name, str(table.version), request_id, encoded, {})


def _vectors(output: OutputRequest, dtype: str, answer: Answer) -> Output:
    """Vectors [B, D] or [G, D] as one output."""
    vectors = answer.fetched.vectors_BD
    data = encode_rows(vectors, dtype) if output.binary else json_vectors(vectors, dtype, flat=True)
    return Output(output.name, DATATYPES[dtype], vectors.shape, data, output.binary)


def _found(output: OutputRequest, answer: Answer) -> Output:
    """Whether each of B ids was found, as one output."""
    num_ids, found_B = len(answer.query.ids), answer.fetched.found_B
    data: Any = np.ones(num_ids, np.bool_) if found_B is None else found_B
    return Output(output.name, "BOOL", (num_ids,), data.tobytes() if output.binary else data, output.binary)


def _belongs(name: str, kinds: Sequence[str], tables: Container[str]) -> bool:
    """Whether `name` is `{table}.{kind}` of a table of the request; a name that is a table itself is its own."""
    stem, dot, kind = name.rpartition(".")
    return bool(dot) and kind in kinds and stem in tables


def _no_output(name: str, model: str, known: Sequence[str]) -> BadRequest:
    return BadRequest(f"model {model!r} has no output {clip(name)}; it has {', '.join(known[:16])}")
