"""Open Inference Protocol (v2): infer requests answered from tables.

A table is a model: input `ids`, and for bags `offsets` and `weights`; outputs `embeddings` and `found`. The model
`embstore` is all tables together, answered from one release: an input and an output for each table, named after it,
with `{table}.offsets`, `{table}.weights` and `{table}.found` beside them; its versions are the releases. The name is
taken: a table that is called `embstore` too has its own lookups under /v1 and in this model.
"""

# Shapes: B ids of a table, G bags of them, D embedding_dim.

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import Any, Protocol, TypeVar

import numpy as np

from embstore.errors import BadRequest, ConfigError, DataError, DeadlineExceeded, Unprocessable
from embstore.ids import Ids as Keys
from embstore.pooling import Bags
from embstore.table import ON_MISSING, Fetched, Floats, Table
from server.api.codecs import json as codec
from server.api.codecs.tensors import (
    Asked,
    InferRequest,
    Output,
    Tensor,
    decode_infer,
    encode_infer,
    floats,
    int64s,
    keys_of,
)
from server.http.buffer_pool import Buffers
from server.http.messages import Reply, Request
from server.http.problems import clip
from server.lookup.service import abandon, all_of
from server.metrics.recorder import Lookups
from server.tables.registry import Snapshot

T = TypeVar("T")
MANY = "embstore"
"""Name of the model that is all tables together."""
IDS, OFFSETS, WEIGHTS, EMBEDDINGS, FOUND = "ids", "offsets", "weights", "embeddings", "found"
PROTOCOL = "open-inference"
DTYPES = {"float32": "float32", "FP32": "float32", "float16": "float16", "FP16": "float16"}
DATATYPES = {"float32": "FP32", "float16": "FP16"}


class Service(Protocol):
    """What looks keys up: the vectors at once where that is quick, else something to wait for."""

    def lookup(
        self, table: Table, keys: Keys, on_missing: str, out: Floats | None = None
    ) -> Fetched | Awaitable[Fetched]:
        """Vectors of B keys."""

    def lookup_bags(self, table: Table, keys: Keys, on_missing: str, bags: Bags) -> Fetched | Awaitable[Fetched]:
        """One vector a bag."""

    def do(self, work: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        """Something in a thread."""


@dataclass(slots=True)
class _Part:
    """What a request asks of one table. `prefix` stands before the names of inputs and parameters that are its own."""

    table: Table
    prefix: str
    keys: Keys
    on_missing: str
    bags: Bags | None

    @property
    def num_rows(self) -> int:
        """Vectors in the answer."""
        return self.bags.num_bags if self.bags is not None else len(self.keys)


class Inference:
    """Answers infer requests with a lookup service."""

    def __init__(
        self, service: Service, lookups: Lookups, buffers: Buffers, *, max_ids: int, max_reply_bytes: int
    ) -> None:
        self._service, self._lookups, self._buffers = service, lookups, buffers
        self.max_ids, self.max_reply_bytes = max_ids, max_reply_bytes

    def answer(self, request: Request, snapshot: Snapshot) -> Reply | Awaitable[Reply]:
        """The reply to `POST /v2/models/{model}[/versions/{n}]/infer`; raises EmbstoreError."""
        route = request.route
        if route.table == MANY:
            return self._many(request, snapshot)
        return self._one(request, snapshot.table(route.table, version=route.version))

    # ---- one table --------------------------------------------------------------------------------------------

    def _one(self, request: Request, table: Table) -> Reply | Awaitable[Reply]:
        asked = self._decode(request)
        if IDS not in asked.inputs:
            raise BadRequest(f"model {table.name!r} needs an input {IDS!r}", table=table.name)
        _refuse_others(asked.inputs, (IDS, OFFSETS, WEIGHTS), table.name)
        part = _part(asked, table, IDS, "")
        self._check([part])
        outputs = asked.outputs or [Asked(name, asked.binary, {}) for name in (EMBEDDINGS, FOUND)]
        for output in outputs:
            if output.name not in (EMBEDDINGS, FOUND):
                raise _no_output(output.name, table.name, (EMBEDDINGS, FOUND))
        dtypes = [_dtype(asked, output, "") for output in outputs]
        if part.bags is None:
            out, lent = self._buffers.take(len(part.keys), table.embedding_dim)
            fetched = self._service.lookup(table, part.keys, part.on_missing, out)
        else:
            lent, fetched = None, self._service.lookup_bags(table, part.keys, part.on_missing, part.bags)
        encode = partial(_encoded, part, outputs, dtypes)
        reply = partial(self._reply, request, asked, part, lent)
        long = _takes_long(outputs, part.num_rows * table.embedding_dim)
        if isinstance(fetched, Fetched) and not long:
            return reply(fetched, encode(fetched))
        return self._later(fetched, encode, reply, long)

    def _reply(
        self, request: Request, asked: InferRequest, part: _Part, lent: Any, fetched: Fetched, encoded: list[Output]
    ) -> Reply:
        request.check_deadline()
        sent_as_is = any(output.binary and output.datatype == "FP32" for output in encoded)
        lease = lent if sent_as_is else None
        table = part.table
        reply = encode_infer(table.name, str(table.version), asked.id, encoded, {}, lease)
        if not sent_as_is:
            self._buffers.give_back(lent)
        self._count(request, part, fetched)
        return reply

    # ---- many tables ------------------------------------------------------------------------------------------

    def _many(self, request: Request, snapshot: Snapshot) -> Reply | Awaitable[Reply]:
        asked = self._decode(request)
        if asked.raw:
            raise BadRequest(f"model {MANY!r} has an input for each table: a body without JSON cannot say which")
        names = [name for name in asked.inputs if not _belongs(name, (OFFSETS, WEIGHTS), asked.inputs)]
        if not names:
            raise BadRequest(f"model {MANY!r} needs at least one input, named after its table")
        for name in asked.inputs:
            if name not in names and not _belongs(name, (OFFSETS, WEIGHTS), names):
                raise BadRequest(f"input {clip(name)} belongs to no table that is asked for")
        version = request.route.version
        release, tables = snapshot.together(names, None if version is None else str(version))
        parts = {name: _part(asked, tables[name], name, f"{name}.") for name in names}
        self._check(list(parts.values()))
        outputs = asked.outputs or [Asked(name, asked.binary, {}) for name in names]
        for output in outputs:
            if output.name not in parts and not _belongs(output.name, (FOUND,), parts):
                raise _no_output(output.name, MANY, [*names, *(f"{name}.{FOUND}" for name in names)])
        dtypes = [_dtype(asked, output, f"{output.name}.") for output in outputs]
        fetched: list[Any] = []
        try:
            fetched.extend(self._fetches(parts.values()))
        except Exception:
            abandon(fetched)
            raise
        encode = partial(_encoded_many, parts, outputs, dtypes)
        reply = partial(self._reply_many, request, asked, release, parts)
        long = _takes_long(outputs, sum(part.num_rows * part.table.embedding_dim for part in parts.values()))
        if not long and not any(map(isawaitable, fetched)):
            return reply(fetched, encode(fetched))
        return self._later(all_of(fetched), encode, reply, long)

    def _fetches(self, parts: Any) -> Iterator[Fetched | Awaitable[Fetched]]:
        """Each table's vectors, or what to wait for."""
        for part in parts:
            if part.bags is None:
                yield self._service.lookup(part.table, part.keys, part.on_missing)
            else:
                yield self._service.lookup_bags(part.table, part.keys, part.on_missing, part.bags)

    def _reply_many(
        self,
        request: Request,
        asked: InferRequest,
        release: str | None,
        parts: Mapping[str, _Part],
        fetched: Sequence[Fetched],
        encoded: list[Output],
    ) -> Reply:
        request.check_deadline()
        for part, vectors in zip(parts.values(), fetched, strict=True):
            self._count(request, part, vectors)
        parameters = {} if release is None else {"release": release}
        return encode_infer(MANY, release or "", asked.id, encoded, parameters)

    # ---- both -------------------------------------------------------------------------------------------------

    async def _later(
        self,
        fetched: T | Awaitable[T],
        encode: Callable[[T], list[Output]],
        reply: Callable[[T, list[Output]], Reply],
        long: bool,
    ) -> Reply:
        """The reply, once what it needs was looked up, and written in a thread where that takes long."""
        done: Any = await fetched if isawaitable(fetched) else fetched
        return reply(done, await self._service.do(encode, done) if long else encode(done))

    def _decode(self, request: Request) -> InferRequest:
        """What the body asks, unless the time it allows is over."""
        asked = decode_infer(request.headers, request.body, self.max_ids)
        timeout = asked.parameters.get("timeout")
        if timeout:
            if type(timeout) is not int or timeout < 0:
                raise BadRequest(f"parameter timeout must be whole microseconds, got {clip(repr(timeout))}")
            request.deadline = min(request.deadline, request.began + min(timeout, 1 << 53) / 1e6)
            if time.perf_counter() > request.deadline:
                raise DeadlineExceeded(f"the {timeout:,} microseconds of parameter timeout are over")
        return asked

    def _check(self, parts: Sequence[_Part]) -> None:
        """TooManyIds when tables together are asked for more than one request may ask, or one reply hold."""
        num_ids = num_rows = num_bytes = 0
        for part in parts:
            rows = part.num_rows
            num_ids += len(part.keys)
            num_rows += rows
            num_bytes += 4 * rows * part.table.embedding_dim
        codec.check_count(num_ids, self.max_ids)
        codec.check_count(num_rows, self.max_ids, "rows asked for")
        codec.check_reply(num_bytes, self.max_reply_bytes)

    def _count(self, request: Request, part: _Part, fetched: Fetched) -> None:
        seconds = time.perf_counter() - request.began
        self._lookups.count(part.table.name, PROTOCOL, seconds, len(part.keys), fetched.missing)


def _part(asked: InferRequest, table: Table, name: str, prefix: str) -> _Part:
    """What a request asks of a table whose ids are input `name`."""
    keys = keys_of(name, asked.inputs[name], table)
    on_missing = _option(asked, prefix, "on_missing", "zero")
    if on_missing not in ON_MISSING:
        raise Unprocessable(f"on_missing must be one of {', '.join(ON_MISSING)}, got {clip(str(on_missing))}")
    offsets = asked.inputs.get(prefix + OFFSETS)
    weights = asked.inputs.get(prefix + WEIGHTS)
    pooling = asked.parameters.get(prefix + "pooling")
    if pooling is None and prefix and (offsets is not None or weights is not None):
        pooling = asked.parameters.get("pooling")
    if offsets is None and weights is None and pooling is None:
        return _Part(table, prefix, keys, on_missing, None)
    return _Part(table, prefix, keys, on_missing, _bags(table, prefix, len(keys), offsets, weights, pooling))


def _bags(
    table: Table, prefix: str, num_ids: int, offsets: Tensor | None, weights: Tensor | None, pooling: object
) -> Bags:
    offsets_G = None if offsets is None else int64s(prefix + OFFSETS, offsets)
    weights_B = None if weights is None else floats(prefix + WEIGHTS, weights)
    try:
        return Bags.of(num_ids, offsets_G, pooling, weights_B)
    except (ConfigError, DataError) as error:
        raise Unprocessable(str(error), table=table.name) from error


def _option(asked: InferRequest, prefix: str, name: str, default: str) -> Any:
    """A parameter of one table, else of the whole request."""
    own = asked.parameters.get(prefix + name)
    return own if own is not None else asked.parameters.get(name, default)


def _dtype(asked: InferRequest, output: Asked, prefix: str) -> str:
    """Type of an output's numbers: as the output says, else the table's parameter, else the request's."""
    wanted = output.parameters.get("dtype") or _option(asked, prefix, "dtype", "float32")
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else None
    if dtype is None:
        raise Unprocessable(f"dtype must be float32 (FP32) or float16 (FP16), got {clip(str(wanted))}")
    return dtype


def _takes_long(outputs: Sequence[Asked], num_numbers: int) -> bool:
    """Whether writing so many numbers as JSON would hold the event loop up."""
    return num_numbers > codec.LONG_NUMBERS and not all(output.binary for output in outputs)


def _encoded(part: _Part, outputs: list[Asked], dtypes: list[str], fetched: Fetched) -> list[Output]:
    """The outputs of one table."""
    return [
        _vectors(output, dtype, fetched) if output.name == EMBEDDINGS else _found(output, fetched, len(part.keys))
        for output, dtype in zip(outputs, dtypes, strict=True)
    ]


def _encoded_many(
    parts: Mapping[str, _Part], outputs: list[Asked], dtypes: list[str], fetched: Sequence[Fetched]
) -> list[Output]:
    """The outputs of many tables."""
    answers = dict(zip(parts, fetched, strict=True))
    encoded = []
    for output, dtype in zip(outputs, dtypes, strict=True):
        if output.name in parts:
            answer = answers[output.name]
            facts = {"version": parts[output.name].table.version, "missing": answer.missing}
            encoded.append(_vectors(output, dtype, answer)._replace(parameters=facts))
        else:
            name = output.name.removesuffix(f".{FOUND}")
            encoded.append(_found(output, answers[name], len(parts[name].keys)))
    return encoded


def _vectors(output: Asked, dtype: str, fetched: Fetched) -> Output:
    """Vectors [B, D] or [G, D] as one output."""
    vectors = fetched.vectors_BD
    data = codec.encode_rows(vectors, dtype) if output.binary else codec.json_vectors(vectors, dtype, flat=True)
    return Output(output.name, DATATYPES[dtype], vectors.shape, data, output.binary)


def _found(output: Asked, fetched: Fetched, num_ids: int) -> Output:
    """Whether each of B ids was found, as one output."""
    data: Any = np.ones(num_ids, np.bool_) if fetched.found_B is None else fetched.found_B
    return Output(output.name, "BOOL", (num_ids,), data.tobytes() if output.binary else data, output.binary)


def _belongs(name: str, kinds: Sequence[str], tables: Container[str]) -> bool:
    """Whether `name` is `{table}.{kind}` of a table that is asked for; a name that is asked for itself is its own."""
    stem, dot, kind = name.rpartition(".")
    return bool(dot) and kind in kinds and stem in tables


def _refuse_others(inputs: Mapping[str, Tensor], known: Sequence[str], model: str) -> None:
    """BadRequest when there is an input that the model does not take."""
    for name in inputs:
        if name not in known:
            raise BadRequest(f"model {model!r} has no input {clip(name)}; it has {', '.join(known)}")


def _no_output(name: str, model: str, known: Sequence[str]) -> BadRequest:
    shown = ", ".join(known[:16])
    return BadRequest(f"model {model!r} has no output {clip(name)}; it has {shown}")
