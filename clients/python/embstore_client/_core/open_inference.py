"""Many tables in one binary call: Open Inference Protocol v2 with binary tensors, model `embstore`.

A body is a JSON head, then the bytes of each tensor in the order of the head; a header says where the head ends.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.decode import check_answered, digits
from embstore_client._core.options import segment
from embstore_client._core.protocol import OCTETS, Reply, Request, check_ok, check_release, load_json, sizes_of
from embstore_client._core.query import Query
from embstore_client._core.rows import ManyRows, Rows
from embstore_client._errors import ProtocolError

MODEL = "embstore"
HEAD_LENGTH = "inference-header-content-length"
_DATATYPES = {"float32": "FP32", "float16": "FP16"}
_KINDS = ("offsets", "weights", "found")


def suits(tables: Mapping[str, Query], release: str | None, dtype: str) -> bool:
    """Whether this call can travel so: a dtype that the protocol has, a release that is a number, plain names."""
    if dtype not in _DATATYPES or not tables:
        return False
    if release is not None and not (release.isascii() and release.isdigit() and release[0] != "0"):
        return False
    # A table that is called as another one's tensor would be taken for it.
    return not any(f"{table}.{kind}" in tables for table in tables for kind in _KINDS)


def build_infer_many(
    tables: Mapping[str, Query], *, release: str | None, on_missing: str, dtype: str
) -> Request[ManyRows]:
    """The call that looks ids up in several tables of one release, binary both ways; see `suits`."""
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    parameters: dict[str, Any] = {"on_missing": on_missing, "dtype": dtype, "binary_data_output": True}

    def add(name: str, datatype: str, length: int, data: bytes) -> None:
        size = {"binary_data_size": len(data)}
        inputs.append({"name": name, "datatype": datatype, "shape": [length], "parameters": size})
        buffers.append(data)

    for table, query in tables.items():
        segment("table", table)
        if isinstance(query.ids, list):
            add(table, "BYTES", len(query.ids), _strings(query.ids))
        else:
            add(table, "INT64", len(query.ids), query.ids.tobytes())
        if query.offsets is not None:
            add(f"{table}.offsets", "INT64", len(query.offsets), query.offsets.tobytes())
            parameters[f"{table}.pooling"] = query.pooling
        if query.weights is not None:
            add(f"{table}.weights", "FP32", len(query.weights), query.weights.tobytes())
        outputs += [{"name": table}, {"name": f"{table}.found"}]
    head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}, separators=(",", ":")).encode()
    path = f"/v2/models/{MODEL}/infer" if release is None else f"/v2/models/{MODEL}/versions/{release}/infer"
    headers = (("content-type", OCTETS), ("accept", OCTETS), (HEAD_LENGTH, str(len(head))))
    parse = partial(parse_infer_many, sizes=sizes_of(tables), dtype=dtype, release=release)
    return Request("POST", path, headers, b"".join([head, *buffers]), parse)


def _strings(keys: list[str]) -> bytes:
    """Each key after its length in 4 bytes."""
    encoded = [key.encode() for key in keys]
    return b"".join(part for key in encoded for part in (struct.pack("<I", len(key)), key))


def parse_infer_many(
    reply: Reply, *, sizes: Mapping[str, tuple[int, int]], dtype: str, release: str | None
) -> ManyRows:
    """The rows of every table that was asked for; one wrong or absent tensor refuses the whole answer.

    Raises:
        ServiceError: the server answered with an error; the subclass says which.
        ProtocolError: the answer is truncated, mislabelled, to another question, or from two releases.
    """
    kind = check_ok(reply, size=sum(map(max, sizes.values())))
    if kind != OCTETS:
        raise ProtocolError(f"tensors must come as {OCTETS}, got {kind or 'no content type'!r}")
    length_text = reply.headers.get(HEAD_LENGTH)
    if length_text is None:
        raise ProtocolError(f"header {HEAD_LENGTH} is missing")
    at = digits(length_text, f"header {HEAD_LENGTH}", length_text)
    if at > len(reply.body):
        raise ProtocolError(f"header {HEAD_LENGTH} is {at}, the answer has {len(reply.body)} bytes")
    document = load_json(reply.body[:at])
    if not isinstance(document, dict) or document.get("model_name") != MODEL:
        raise ProtocolError(f"asked for model {MODEL!r}, got {document!r:.80}")
    answered = _release(document)
    check_release(reply, answered, release)
    entries = _entries(document.get("outputs"), sizes)
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in entries.items():
        tensors[name], at = _tensor(reply.body, at, entry, name)
    if at != len(reply.body):
        raise ProtocolError(f"{len(reply.body) - at} bytes follow the last tensor")
    request_id = reply.headers.get("x-request-id")
    rows = {
        table: _rows(table, entries[table], tensors, size, dtype, answered, request_id) for table, size in sizes.items()
    }
    return ManyRows(rows, release=answered, request_id=request_id)


def _release(document: dict[str, Any]) -> str | None:
    """The release that the answer names, in two places; None where it names none."""
    named, parameters = document.get("model_version"), document.get("parameters", {})
    if not isinstance(named, str) or not isinstance(parameters, dict):
        raise ProtocolError(f"`model_version` must be a string and `parameters` an object, got {named!r:.80}")
    release = parameters.get("release")
    if (named or None) != release:
        raise ProtocolError(f"the answer names two releases, {named!r:.80} and {release!r:.80}")
    return release


def _entries(outputs: Any, sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """The description of each tensor by its name: two for each table, neither more nor fewer."""
    wanted = {name for table in sizes for name in (table, f"{table}.found")}
    if not isinstance(outputs, list) or not all(isinstance(entry, dict) for entry in outputs):
        raise ProtocolError(f"`outputs` must be a list of objects, got {outputs!r:.80}")
    names = [entry.get("name") for entry in outputs]
    if not all(isinstance(name, str) for name in names) or len(names) != len(wanted) or set(names) != wanted:
        raise ProtocolError(f"asked for outputs {sorted(wanted)!r:.200}, got {names!r:.200}")
    return {entry["name"]: entry for entry in outputs}


_ITEMS: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "FP16": np.dtype("<f2"), "BOOL": np.dtype("u1")}


def _tensor(body: bytes, at: int, entry: dict[str, Any], name: str) -> tuple[NDArray[Any], int]:
    """A tensor from its bytes, and where they end."""
    shape, item, parameters = entry.get("shape"), _ITEMS.get(str(entry.get("datatype"))), entry.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if item is None or not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ProtocolError(
            f"output {name!r}: {entry.get('datatype')!r:.40} of shape {shape!r:.40} is no tensor of ours"
        )
    count = 1
    for n in shape:
        count *= n
    if type(size) is not int or size != count * item.itemsize or size > len(body) - at:
        raise ProtocolError(
            f"output {name!r}: shape {shape} takes {count * item.itemsize} bytes, "
            f"binary_data_size is {size!r:.40}, {len(body) - at} bytes are left"
        )
    tensor = np.frombuffer(body, item, count=count, offset=at)
    if at % item.itemsize:  # the head has any length, and numbers that lie askew are slow to read
        tensor = tensor.copy()
        tensor.flags.writeable = False
    return tensor.reshape(shape), at + size


def _rows(
    table: str,
    entry: dict[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    size: tuple[int, int],
    dtype: str,
    release: str | None,
    request_id: str | None,
) -> Rows:
    """One table's rows from its two tensors."""
    (num_ids, num_rows), vectors, found = size, tensors[table], tensors[f"{table}.found"]
    facts = entry["parameters"]
    if facts.get("release", release) != release:
        raise ProtocolError(
            f"table {table!r} is from release {facts['release']!r:.80}, the answer from {release!r:.80}"
        )
    if entry["datatype"] != _DATATYPES[dtype] or vectors.ndim != 2 or len(vectors) != num_rows or not vectors.shape[1]:
        raise ProtocolError(
            f"table {table!r}: asked for {num_rows} rows of {dtype}, got {entry['datatype']} of shape {vectors.shape}"
        )
    if found.dtype != np.uint8 or found.shape != (num_ids,) or (num_ids and found.max() > 1):
        raise ProtocolError(f"table {table!r}: found must be {num_ids} booleans, got shape {found.shape}")
    version, missing = facts.get("version"), facts.get("missing")
    if type(version) is not int or type(missing) is not int:
        raise ProtocolError(f"table {table!r}: version {version!r:.40}, missing {missing!r:.40} must be integers")
    check_answered(version, None)
    if num_ids - int(np.count_nonzero(found)) != missing:
        raise ProtocolError(f"table {table!r}: missing is {missing}, found says otherwise")
    return Rows(
        vectors=vectors,
        found=found.view(np.bool_),
        version=version,
        missing=missing,
        dtype=dtype,
        release=release,
        request_id=request_id,
    )
