"""Open Inference Protocol bodies without a server: what is sent is what is read, and whatever is wrong is said."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.infer_cases import LENGTH, MAX, Tensors, answer, body_of, published

from embstore.errors import BadRequest, EmbstoreError, IdOutOfRange, TooManyIds, Unprocessable
from server.api.codecs.tensors import DTYPES, KEPT_HEAD_BYTES, InferRequest
from server.api.codecs.tensors import decode_infer as decode_infer_with
from server.api.shared_memory import Access, Regions
from server.http.auth import ApiKeys
from server.tables.snapshot import Snapshot

KEYS = ApiKeys([], [], host="127.0.0.1")


def decode_infer(headers: dict[bytes, bytes], body: bytes, max_elements: int) -> InferRequest:
    """What a request says where there is no shared memory."""
    return decode_infer_with(headers, body, max_elements, Access(Regions(KEYS, 0), headers, MAX).read)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Three tables of one release."""
    return published(tmp_path_factory.mktemp("store"))


@st.composite
def integers(draw: st.DrawFn) -> tuple[str, list[int]]:
    """An integer datatype and values that it holds."""
    datatype = draw(st.sampled_from([name for name in DTYPES if "INT" in name]))
    limits = np.iinfo(DTYPES[datatype])
    return datatype, draw(st.lists(st.integers(int(limits.min), int(limits.max)), max_size=20))


STRINGS = st.tuples(st.just("BYTES"), st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
FLOATS = st.tuples(st.just("FP32"), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), integers() | STRINGS | FLOATS),
    st.sets(st.integers(0, 9)),
    st.booleans(),
)
def test_tensors_come_out_as_they_went_in(tensors: Tensors, chosen: set[int], columns: bool) -> None:
    """Any inputs, each as JSON or as binary data, flat or as a column, are read as the values that were sent."""
    binary = {name for i, name in enumerate(tensors) if i in chosen}
    headers, body = body_of(tensors, binary, columns, id="7", parameters={"binary_data_output": True})
    request = decode_infer(headers, body, MAX)
    assert (request.id, request.binary, request.outputs) == ("7", True, None)
    assert {name: (tensor.datatype, list(tensor.values)) for name, tensor in request.inputs.items()} == tensors
    assert all(t.values.flags.aligned for t in request.inputs.values() if isinstance(t.values, np.ndarray))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["name", "shape", "datatype", "data", "parameters", "binary_data_size", "id", "inputs", "outputs"]


@given(st.binary(max_size=60), st.none() | st.integers(-2, 70).map(lambda n: b"%d" % n) | st.binary(max_size=5))
def test_arbitrary_bytes_are_refused_in_order(body: bytes, length: bytes | None) -> None:
    """Whatever bytes come, the answer is a request or an error of ours."""
    with suppress(BadRequest):
        decode_infer({} if length is None else {LENGTH: length}, body, MAX)


@given(st.sampled_from(FIELDS), JSON_VALUES, st.integers(0, 80), st.binary(max_size=30))
def test_damaged_requests_are_refused_in_order(
    snapshot: Snapshot, field: str, value: Any, cut: int, tail: bytes
) -> None:
    """A good request with one field replaced, cut short or with bytes behind it gets a reply or an error of ours."""
    headers, good = body_of({"ids": ("INT64", [1, 2]), "offsets": ("INT64", [0])}, {"offsets"}, id="x")
    at = int(headers[LENGTH])
    head = json.loads(good[:at])
    place = head if field in ("id", "inputs", "outputs") else head["inputs"][1]
    (place.setdefault("parameters", {}) if field == "binary_data_size" else place)[field] = value
    damaged = json.dumps(head).encode()
    for table in ("item", "embstore"):
        for length, body in (
            (len(damaged), damaged + good[at:] + tail),
            (len(damaged), damaged),
            (at, good[:cut] + tail),
        ):
            with suppress(EmbstoreError):
                answer(snapshot, table, {LENGTH: b"%d" % length}, body)


IDS = {"name": "ids", "shape": [2], "datatype": "INT64", "data": [1, 2]}
SIZED = {"parameters": {"binary_data_size": 16}}
REFUSED: dict[str, tuple[Any, bytes, type[EmbstoreError], str]] = {
    "no inputs": ({}, b"", BadRequest, "inputs"),
    "no ids": ({"inputs": [IDS | {"name": "id"}]}, b"", BadRequest, "'item' needs an input 'ids'"),
    "unknown input": ({"inputs": [IDS, IDS | {"name": "x"}]}, b"", BadRequest, "no input 'x'; it has ids, offsets"),
    "input twice": ({"inputs": [IDS, IDS]}, b"", BadRequest, "'ids' is given twice"),
    "negative shape": ({"inputs": [IDS | {"shape": [-2]}]}, b"", BadRequest, "'ids' has shape '[-2]'"),
    "huge shape": ({"inputs": [IDS | {"shape": [10**12]}]}, b"", TooManyIds, "1,000,000,000,000 elements"),
    "overflowing shape": ({"inputs": [IDS | {"shape": [2**62, 4]}]}, b"", BadRequest, "must be [n] or [n, 1]"),
    "no shape": ({"inputs": [IDS | {"shape": []}]}, b"", BadRequest, "must be [n] or [n, 1]"),
    "short data": ({"inputs": [IDS | {"data": [1]}]}, b"", BadRequest, "shape [2], but 1 elements of data"),
    "no data": ({"inputs": [{k: v for k, v in IDS.items() if k != "data"}]}, b"", BadRequest, "neither data nor"),
    "both": ({"inputs": [IDS | SIZED]}, b"8 bytes.8 bytes.", BadRequest, "both data and binary_data_size"),
    "fractions": ({"inputs": [IDS | {"data": [1, 2.5]}]}, b"", BadRequest, "Expected `int`, got `float`"),
    "too large": ({"inputs": [IDS | {"datatype": "INT8", "data": [1, 300]}]}, b"", BadRequest, "'300' is out of range"),
    "past int64": ({"inputs": [IDS | {"datatype": "UINT64", "data": [1, 2**63]}]}, b"", BadRequest, "signed 64-bit"),
    "wrong type": ({"inputs": [IDS | {"datatype": "FP32"}]}, b"", Unprocessable, "'ids' is FP32: send INT64"),
    "no type": ({"inputs": [IDS | {"datatype": "int"}]}, b"", Unprocessable, "datatype 'int' is not one of INT64"),
    "no digits": (
        {"inputs": [IDS | {"datatype": "BYTES", "data": ["1", "x"]}]},
        b"",
        BadRequest,
        "input 'ids'[1] is 'x'",
    ),
    "shared memory without a size": (
        {"inputs": [{"name": "ids", "shape": [1], "datatype": "INT64", "parameters": {"shared_memory_region": "a"}}]},
        b"",
        BadRequest,
        "shared_memory_region needs shared_memory_byte_size as a number of bytes, got 'None'",
    ),
    "classes": (
        {"inputs": [IDS], "outputs": [{"name": "embeddings", "parameters": {"classification": 3}}]},
        b"",
        Unprocessable,
        "classification is not supported",
    ),
    "unknown output": ({"inputs": [IDS], "outputs": [{"name": "y"}]}, b"", BadRequest, "has no output 'y'"),
    "output twice": ({"inputs": [IDS], "outputs": [{"name": "found"}] * 2}, b"", BadRequest, "asked for twice"),
    "policy": ({"inputs": [IDS], "parameters": {"on_missing": "nul"}}, b"", Unprocessable, "on_missing must be one"),
    "dtype": ({"inputs": [IDS], "parameters": {"dtype": "FP8"}}, b"", Unprocessable, "FP16), got 'FP8'"),
    "pooling": ({"inputs": [IDS], "parameters": {"pooling": "sum"}}, b"", Unprocessable, "give offsets"),
    "timeout": ({"inputs": [IDS], "parameters": {"timeout": "soon"}}, b"", BadRequest, "whole microseconds"),
    "missing": (
        {"inputs": [IDS | {"data": [1, 10**9]}], "parameters": {"on_missing": "error"}},
        b"",
        IdOutOfRange,
        "does not have id 1000000000",
    ),
}
BINARY_REFUSED: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "size lies": ({"shape": [2], "parameters": {"binary_data_size": 8}}, b"8 bytes.", "takes 16 bytes"),
    "too little": ({"shape": [2]} | SIZED, b"8 bytes.", "binary_data_size is 16, but 8 bytes are left"),
    "negative": ({"shape": [2], "parameters": {"binary_data_size": -8}}, b"", "must be a number of bytes, got '-8'"),
    "too much": ({"shape": [2]} | SIZED, b"8 bytes." * 3, "8 bytes follow the last input"),
    "strings": (
        {"shape": [2], "datatype": "BYTES"} | SIZED,
        b"\1\0\0\0a\xff\xff\xff\xff" + b"x" * 7,
        "expected 2 length-prefixed strings",
    ),
    "not UTF-8": ({"shape": [4], "datatype": "BYTES"} | SIZED, b"\1\0\0\0\xff" + b"\0" * 11, "element 0 is not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(snapshot: Snapshot, case: str) -> None:
    """Every wrong request is refused with the name of what is wrong in it."""
    head, tail, error, text = REFUSED[case]
    raw = json.dumps(head).encode()
    with pytest.raises(error) as raised:
        answer(snapshot, "item", {LENGTH: b"%d" % len(raw)} if tail else {}, raw + tail)
    assert text in str(raised.value)


@pytest.mark.parametrize("case", BINARY_REFUSED)
def test_binary_data_that_does_not_fit_is_named(snapshot: Snapshot, case: str) -> None:
    """Sizes that lie are refused before anything is read by them."""
    about, tail, text = BINARY_REFUSED[case]
    raw = json.dumps({"inputs": [{"name": "ids", "datatype": "INT64"} | about]}).encode()
    with pytest.raises(BadRequest) as raised:
        answer(snapshot, "item", {LENGTH: b"%d" % len(raw)}, raw + tail)
    assert "input 'ids'" in str(raised.value) or case == "too much"
    assert text in str(raised.value)


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"", b"99999", b"9" * 40])
def test_a_length_of_json_that_cannot_be_is_refused(length: bytes) -> None:
    """Inference-Header-Content-Length is a number of bytes that are there."""
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        decode_infer({LENGTH: length}, b'{"inputs":[]}', MAX)


def test_a_head_that_is_known_says_nothing_of_another_body() -> None:
    """Heads are read once: each request still has its own ids, its own bytes are checked, and the limit is today's."""
    for first in range(3):
        headers, body = body_of({"ids": ("INT64", [first, 7])}, {"ids"}, parameters={"binary_data_output": True})
        asked = decode_infer(headers, body, MAX)
        assert asked.inputs["ids"].values.tolist() == [first, 7]
        assert asked.binary
        for damaged in (body[:-1], body + b"\0"):
            with pytest.raises(BadRequest):
                decode_infer(headers, damaged, MAX)
        with pytest.raises(TooManyIds):
            decode_infer(headers, body, 1)
    long = {"binary_data_output": True, "note": "x" * KEPT_HEAD_BYTES}
    headers, body = body_of({"ids": ("INT64", [5])}, {"ids"}, parameters=long)
    assert decode_infer(headers, body, MAX).inputs["ids"].values.tolist() == [5]
