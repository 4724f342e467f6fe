"""Open Inference Protocol (v2) bodies to tensors and back: JSON, and Triton's binary tensor data. No state, no I/O.

A request is a JSON object, after which the bytes of its binary inputs may follow in the order of the inputs; the
header `Inference-Header-Content-Length` says where the JSON ends. 0 there means no JSON at all: the body is one
input. Replies are built the same way. What is asked for is checked before memory is taken for it. A tensor may be in
shared memory instead.
"""

# Shapes: N elements of a tensor.

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from embstore.errors import BadRequest, TooManyIds, Unprocessable
from server.api.codecs.vectors import PLACEHOLDER, encode_json
from server.api.places import Place, place_of
from server.api.query import Encoded
from server.http.problems import clip

BYTES = "BYTES"
_DTYPES = {
    "INT64": "<i8",
    "INT32": "<i4",
    "INT16": "<i2",
    "INT8": "i1",
    "UINT64": "<u8",
    "UINT32": "<u4",
    "UINT16": "<u2",
    "UINT8": "u1",
    "FP32": "<f4",
    "FP64": "<f8",
    "FP16": "<f2",
}
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(code) for name, code in _DTYPES.items()}
"""Datatypes of inputs beside BYTES: what ids, offsets and weights may come as."""
RAW_INPUT = "ids"
_MAX_RANK = 2
KEPT_HEADS, KEPT_HEAD_BYTES = 1024, 1024
_SHARED = b'"shared_memory_region"'
_length = struct.Struct("<I").unpack_from


class Tensor(NamedTuple):
    """One input: numbers [N] of its datatype, or N strings where that is BYTES."""

    datatype: str
    values: NDArray[Any] | list[str]


class OutputRequest(NamedTuple):
    """One output that the caller names."""

    name: str
    binary: bool
    parameters: Mapping[str, Any]
    place: Place | None = None
    """Where it is written in shared memory."""


class InferRequest(NamedTuple):
    """An infer request, decoded."""

    id: str | None
    inputs: dict[str, Tensor]
    outputs: list[OutputRequest] | None
    """None: the model's usual ones."""
    parameters: Mapping[str, Any]
    binary: bool
    """Outputs go as binary data unless one says otherwise."""
    raw: bool = False
    """The body had no JSON: the model must take one input."""


class Output(NamedTuple):
    """One output of a reply: a buffer of its bytes where it goes as binary data, else its text in JSON, or a flat array
    that JSON is made of."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any
    binary: bool
    parameters: Mapping[str, str | int] = {}
    place: Place | None = None
    """Where its bytes are in shared memory: they are not in the reply then."""


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Head(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Output] | None = None
    parameters: dict[str, Any] | None = None


_head = msgspec.json.Decoder(_Head)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _decoders(kind: Any) -> tuple[msgspec.json.Decoder[Any], msgspec.json.Decoder[Any]]:
    """Readers of `data` as a flat list and as rows of one element."""
    return msgspec.json.Decoder(list[kind]), msgspec.json.Decoder(list[tuple[kind]])


_INTEGERS, _FLOATS, _STRINGS = _decoders(int), _decoders(float), _decoders(str)


def decode_infer(
    headers: Mapping[bytes, bytes], body: bytes, max_elements: int, read: Callable[[Place, str], bytes]
) -> InferRequest:
    """What an infer request says; BadRequest, Unprocessable or TooManyIds names the input that is wrong.

    read: gives the bytes of an input that is in shared memory, from its place and what to call it in an error.
    """
    length = _head_length(headers, body)
    if length == 0:
        if len(body) // 8 > max_elements:
            raise _too_many(RAW_INPUT, len(body) // 8, max_elements)
        if len(body) % 8:
            raise BadRequest(f"the body has {len(body):,} bytes; without JSON it is int64 ids, 8 bytes each")
        return InferRequest(None, {RAW_INPUT: Tensor("INT64", np.frombuffer(body, "<i8"))}, None, {}, True, raw=True)
    if length is None:
        known = len(body) <= KEPT_HEAD_BYTES and _SHARED in body
        head, at = (_kept_head if known else _read_head)(body, max_elements), len(body)
    elif length <= KEPT_HEAD_BYTES:
        head, at = _kept_head(body[:length], max_elements), length
    else:
        head, at = _read_head(memoryview(body)[:length], max_elements), length
    inputs: dict[str, Tensor] = {}
    for given, source in head.inputs:
        if source is None:
            inputs[given.name] = _from_json(given, given.shape[0])
        elif isinstance(source, Place):
            inputs[given.name] = _from_bytes(given, read(source, f"input {clip(given.name)}"), given.shape[0])
        else:
            _check_left(given, source, len(body) - at)
            data = body[at : at + source]  # a copy, for its alignment
            inputs[given.name] = _from_bytes(given, data, given.shape[0])
            at += source
    if at != len(body):
        raise BadRequest(f"{len(body) - at:,} bytes follow the last input: their sizes do not add up to the body")
    return InferRequest(head.id, inputs, head.outputs, head.parameters, head.binary)


_Source = int | Place | None
"""Where the data of an input is: in so many bytes after the JSON, in shared memory, or (None) in the JSON itself."""


class _Checked(NamedTuple):
    """A head without a fault of its own: inputs with their sources, and what InferRequest says."""

    id: str | None
    inputs: list[tuple[_Input, _Source]]
    outputs: list[OutputRequest] | None
    parameters: Mapping[str, Any]
    binary: bool


def _read_head(text: bytes | memoryview, max_elements: int) -> _Checked:
    """The JSON of a request."""
    try:
        head = _head.decode(text)
    except _UNREADABLE as error:
        raise BadRequest(f"body: {error}") from error
    inputs: dict[str, tuple[_Input, _Source]] = {}
    for given in head.inputs:
        if given.name in inputs:
            raise BadRequest(f"input {clip(given.name)} is given twice")
        _check_shape(given, max_elements)
        inputs[given.name] = given, _source(given)
    parameters = head.parameters or {}
    binary = _flag(parameters.get("binary_data_output"), "parameter binary_data_output", False)
    outputs = None if not head.outputs else _asked(head.outputs, binary)
    return _Checked(head.id, list(inputs.values()), outputs, parameters, binary)


_kept_head = lru_cache(KEPT_HEADS)(_read_head)
"""With binary data, or data in shared memory, a head says the same in every request of as many ids: it is read once."""


def _head_length(headers: Mapping[bytes, bytes], body: bytes) -> int | None:
    """Bytes of JSON at the start of the body; None: all of it."""
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not (text.isdigit() and len(text) < 12 and int(text) <= len(body)):
        shown = clip(text.decode("latin-1"))
        raise BadRequest(f"Inference-Header-Content-Length is {shown}; the body has {len(body):,} bytes")
    return int(text)


def _check_shape(given: _Input, max_elements: int) -> None:
    """The shape of an input is [n] or [n, 1], n not too large."""
    name, shape = clip(given.name), given.shape
    if given.datatype not in DTYPES and given.datatype != BYTES:
        raise Unprocessable(f"input {name}: datatype {clip(given.datatype)} is not one of {', '.join(DTYPES)}, {BYTES}")
    if not 1 <= len(shape) <= _MAX_RANK or shape[0] < 0 or shape[1:] not in ([], [1]):
        raise BadRequest(f"input {name} has shape {clip(str(shape))}; it must be [n] or [n, 1]")
    if shape[0] > max_elements:
        raise _too_many(given.name, shape[0], max_elements)


def _too_many(name: str, num_elements: int, limit: int) -> TooManyIds:
    text = f"input {clip(name)} has {num_elements:,} elements; the limit is {limit:,} (max_ids)"
    return TooManyIds(text, limit=limit)


def _source(given: _Input) -> _Source:
    """Where an input's data is; BadRequest when it says two things."""
    name, parameters = clip(given.name), given.parameters or {}
    size, place = parameters.get("binary_data_size"), place_of(parameters, f"input {name}")
    if place is not None:
        if size is not None or bytes(given.data):
            raise BadRequest(f"input {name} has data beside its shared memory: send one of them")
        return place
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise BadRequest(f"input {name}: binary_data_size must be a number of bytes, got {clip(repr(size))}")
    if bytes(given.data):
        raise BadRequest(f"input {name} has both data and binary_data_size: send one of them")
    return size


def _check_left(given: _Input, size: int, num_left: int) -> None:
    """BadRequest unless an input's binary data can be in what is left of the body."""
    if size > num_left:
        raise BadRequest(
            f"input {clip(given.name)}: binary_data_size is {size:,}, but {num_left:,} bytes are left after the JSON, "
            "which ends where Inference-Header-Content-Length says"
        )


def _from_bytes(given: _Input, data: bytes, num_elements: int) -> Tensor:
    """An input from its binary data."""
    name = clip(given.name)
    if given.datatype == BYTES:
        return Tensor(BYTES, _split(name, data, num_elements))
    dtype = DTYPES[given.datatype]
    if len(data) != num_elements * dtype.itemsize:
        raise BadRequest(
            f"input {name}: shape {given.shape} of {given.datatype} takes {num_elements * dtype.itemsize:,} bytes, "
            f"its data has {len(data):,}"
        )
    return Tensor(given.datatype, np.frombuffer(data, dtype))


def _split(name: str, data: bytes, num_elements: int) -> list[str]:
    """Strings that each follow their length, 4 bytes little-endian."""
    strings, at = [], 0
    try:
        for _ in range(num_elements):
            start = at + 4
            at = start + _length(data, at)[0]
            strings.append(data[start:at].decode())
    except UnicodeDecodeError as error:
        raise BadRequest(f"input {name}: element {len(strings)} is not UTF-8") from error
    except struct.error:
        at = -1
    if at != len(data):
        raise BadRequest(
            f"input {name}: malformed BYTES tensor: expected {num_elements:,} length-prefixed strings, "
            f"got {len(data):,} bytes"
        )
    return strings


def _from_json(given: _Input, num_elements: int) -> Tensor:
    """An input from the JSON itself, its data flat or in rows."""
    name = clip(given.name)
    if not bytes(given.data):
        raise BadRequest(f"input {name} has neither data nor binary_data_size")
    dtype = DTYPES.get(given.datatype)
    flat, rows = _STRINGS if dtype is None else _FLOATS if dtype.kind == "f" else _INTEGERS
    values = _read(name, given, flat, rows)
    if len(values) != num_elements:
        raise BadRequest(f"input {name} has shape {given.shape}, but {len(values):,} elements of data")
    if dtype is None:
        return Tensor(BYTES, values)
    try:
        with np.errstate(over="ignore"):  # infinite weights are refused by name where they are used
            return Tensor(given.datatype, np.array(values, dtype))
    except OverflowError:
        limits = np.iinfo(dtype)
        at, value = next((i, v) for i, v in enumerate(values) if not limits.min <= v <= limits.max)
        raise BadRequest(
            f"input {name}: data[{at}] = {clip(str(value))} is out of range for {given.datatype}"
        ) from None


def _read(name: str, given: _Input, flat: msgspec.json.Decoder[Any], rows: msgspec.json.Decoder[Any]) -> list[Any]:
    try:
        return flat.decode(given.data)  # type: ignore[no-any-return]
    except _UNREADABLE as error:
        reason = str(error)
    if len(given.shape) == _MAX_RANK:
        try:
            return [row[0] for row in rows.decode(given.data)]
        except _UNREADABLE as error:
            reason = f"{reason}, nor as rows of one: {error}"
    raise BadRequest(f"input {name} of {given.datatype}: data: {reason}")


def _asked(outputs: list[_Output], binary: bool) -> list[OutputRequest]:
    """The outputs a caller names."""
    asked = []
    for output in outputs:
        parameters, what = output.parameters or {}, f"output {clip(output.name)}"
        if "classification" in parameters:
            raise Unprocessable(f"{what}: classification is not supported")
        flag = _flag(parameters.get("binary_data"), f"{what}: binary_data", binary)
        place = place_of(parameters, what)
        asked.append(OutputRequest(output.name, flag or place is not None, parameters, place))
    if len({output.name for output in asked}) < len(asked):
        raise BadRequest("an output is asked for twice")
    return asked


def _flag(value: object, what: str, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{what} must be true or false, got {clip(repr(value))}")
    return value


def encode_infer(
    model: str,
    version: str,
    request_id: str | None,
    outputs: Sequence[Output],
    parameters: Mapping[str, str | int],
) -> Encoded:
    """The reply that carries these outputs; buffers of binary ones are sent as they are, but for those placed."""
    listed, texts, buffers = [], [], []
    for output in outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.place is not None:
            entry["parameters"] = {**output.parameters, **output.place.parameters(len(output.data))}
        elif output.binary:
            entry["parameters"] = {**output.parameters, "binary_data_size": len(output.data)}
            buffers.append(output.data)
        else:
            if output.parameters:
                entry["parameters"] = output.parameters
            entry["data"] = output.data
            if isinstance(output.data, memoryview):
                entry["data"] = PLACEHOLDER
                texts.append(output.data)
        listed.append(entry)
    body: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": listed}
    if request_id is not None:
        body["id"] = request_id
    if parameters:
        body["parameters"] = parameters
    head = encode_json(body, texts)
    if not buffers:
        return Encoded(b"content-type: application/json\r\n", head)
    length = sum(map(len, head))
    lines = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % length
    sends_rows = any(one.binary and one.datatype == "FP32" and one.place is None for one in outputs)
    return Encoded(lines, (*head, *buffers), sends_rows)
