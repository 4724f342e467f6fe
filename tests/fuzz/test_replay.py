"""The targets of tests/fuzz on seeds, seeds with bytes changed, and whatever Hypothesis makes of them."""

from __future__ import annotations

import struct

import orjson
import pytest
from fuzz import targets
from hypothesis import given, settings
from hypothesis import strategies as st

from embstore.errors import StoreError
from server.http.problems import KINDS

OCTETS = struct.pack("<5q", 0, -7, 999_996, 1 << 62, -(1 << 63))
INFER = orjson.dumps(
    {
        "id": "a",
        "inputs": [
            {"name": "ids", "shape": [3], "datatype": "INT64", "data": [1, 2, 49]},
            {"name": "offsets", "shape": [2, 1], "datatype": "INT64", "data": [[0], [2]]},
            {"name": "weights", "shape": [3], "datatype": "FP32", "data": [1.0, 0.5, 2]},
        ],
        "outputs": [{"name": "embeddings", "parameters": {"binary_data": True}}],
        "parameters": {"pooling": "mean"},
    }
)
INFER_BINARY = orjson.dumps(
    {
        "inputs": [
            {"name": "dense", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}},
            {"name": "named", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}},
        ],
        "parameters": {"binary_data_output": True, "on_missing": "default"},
    }
)
TENSORS = struct.pack("<2q", 3, 4) + struct.pack("<I", 5) + b"sku-3"
BODIES = [
    b'{"ids": [1, "2", -3, 9223372036854775807], "on_missing": "hash", "dtype": "float16", "found": true}',
    b'{"ids": ["sku-1", "", "\\u0000", "\\ud800"]}',
    b'{"ids": [1, 2, 3], "offsets": [0, 1], "pooling": "sum", "weights": [1e38, -1.5, 0]}',
    b'{"ids": [1e400, NaN, 18446744073709551616, "' + b"9" * 30 + b'"]}',
    b'{"tables": {"dense": {"ids": [1]}, "named": {"ids": ["sku-9"], "offsets": [0], "pooling": "max"}}}',
    b'{"tables": {}}',
    b"[" * 2000,
    b"\xff\xfe{}",
    OCTETS,
    OCTETS[:-1],
    b"",
]
URLS = [
    b"/v1/tables/dense/lookup?on_missing=error&dtype=int8",
    b"/v1/tables/%00%ff%0d%0aX:1/versions/00/lookup",
    b"http://host:80/v1/releases/1/lookup?",
    b"/v2/models/embstore/versions/99999999999999999999/infer",
    b"/v1/tables//labels/%F0%9F%98%80/lookup?dtype=%zz&&=",
    b"//", b"*", b"?", b"\x80", b"/livez?x", b"a:443",
]  # fmt: skip
WORDS = [b"0", b"1500", b"-1", b" 5", b"1e3", "٣".encode(), b"\xb2", b"9" * 5000, b"a b", b"a\r\nb: c", b"\0", b""]


def _number(target: object) -> bytes:
    return bytes([targets.TARGETS.index(target)])


def seeds() -> list[bytes]:
    """Inputs that reach the inside of every target."""
    found = [
        _number(target) + body for target in (targets.octets, targets.one_body, targets.many_body) for body in BODIES
    ]
    found += [_number(targets.url) + url for url in URLS]
    found += [_number(target) + word for target in (targets.deadline, targets.request_id) for word in WORDS]
    infer = [
        b"\xff\xff" + INFER,
        b"\0\0" + OCTETS,
        len(INFER_BINARY).to_bytes(2, "big") + INFER_BINARY + TENSORS,
        b"\0\x05" + INFER,
    ]
    found += [_number(targets.infer_body) + body for body in infer]
    for path in range(len(targets.TARGETS_OF_CALLS)):
        for kind in range(len(targets.TYPES)):
            head = _number(targets.call) + bytes([path, kind, kind])
            found += [head + b"\0\0" + body for body in (*BODIES, INFER)]
            found.append(head + len(INFER_BINARY).to_bytes(2, "big") + INFER_BINARY + TENSORS)
    bodies = (b"", OCTETS, OCTETS[:-1], BODIES[0], INFER, OCTETS + b"POST /v1/lookup HTTP/1.1\r\n\r\n")
    for target in range(0, len(targets.TARGETS_OF_CALLS), 3):
        for line in range(len(targets.HEAD_LINES)):
            head = _number(targets.known_head) + bytes([target, line, line])
            found += [head + bytes([at % 3, 40 * at]) + body for at, body in enumerate(bodies)]
    return found


SEEDS = seeds()


def test_every_seed_is_answered_or_refused() -> None:
    """Seeds cover each target and every decoder; none is a crash."""
    for seed in SEEDS:
        targets.one_input(seed)
    assert {seed[0] for seed in SEEDS} == set(range(len(targets.TARGETS)))


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A seed with some bytes replaced, taken out, put in or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 8)))
        piece = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"[", b'"', b"\\u", b"1e999", b"null", b"-"]))
        )
        data[at:end] = piece + data[at:end] if draw(st.booleans()) else piece
    return bytes(data)


@given(changed())
@settings(max_examples=1500)
def test_changed_seeds_are_answered_or_refused(data: bytes) -> None:
    """A byte more, less or other never makes a failure of ours."""
    targets.one_input(data)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_anything_is_answered_or_refused(data: bytes) -> None:
    """Bytes of no kind at all are answered or refused, and never crash a decoder."""
    targets.one_input(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["ids", "on_missing", "dtype", "found", "offsets", "pooling", "weights", "tables", "dense", "named"]
FIELDS += ["inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "id", "binary_data_size"]
NAMED = st.recursive(
    JSON | st.lists(st.integers(-2, 60), max_size=6) | st.sampled_from(["hash", "mean", "INT64", "BYTES", "ids"]),
    lambda inner: st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(range(len(targets.TARGETS_OF_CALLS))), NAMED)
@settings(max_examples=500)
def test_json_of_any_shape_is_answered_or_refused(path: int, value: object) -> None:
    """Any value under the names that bodies have is an answer or a problem with a status below 500."""
    try:
        body = orjson.dumps(value)
    except TypeError:  # an integer past 64 bits
        return
    targets.one_input(_number(targets.call) + bytes([path, 1, 1, 0, 0]) + body)


def test_an_error_that_is_not_the_requests_fault_is_a_crash() -> None:
    """What the targets let pass are refusals with a status below 500, nothing else."""

    def fail() -> None:
        raise StoreError("the disk said no")

    with pytest.raises((AssertionError, KeyError)):
        targets.refused_or(fail)
    assert KINDS["malformed_request"].status == 400
