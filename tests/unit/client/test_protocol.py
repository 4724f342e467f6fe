"""The client's bytes: what it sends, without any IO; what it makes of answers is tested beside."""

from __future__ import annotations

import array
import json
from typing import Any

import numpy as np
import pytest
from embstore_client import ProtocolError
from embstore_client._core.ids import MAX_ID, MIN_ID, normalize_ids
from embstore_client._core.protocol import (
    Reply,
    build_lookup,
    build_lookup_many,
    build_ready,
    build_tables,
    fold_headers,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.client_cases import as_json

# What is sent


def test_integer_ids_are_little_endian_int64_and_nothing_else() -> None:
    """The body of a lookup of integers is their int64 bytes, golden."""
    request = build_lookup("item", [1, -2, 2**53 + 1])
    assert request.body == bytes.fromhex("0100000000000000 feffffffffffffff 0100000000002000")
    assert (request.method, request.target) == ("POST", "/v1/tables/item/lookup")
    assert dict(request.headers) == {
        "content-type": "application/octet-stream",
        "accept": "application/octet-stream",
    }


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, "/v1/tables/item/lookup"),
        ({"version": 7}, "/v1/tables/item/versions/7/lookup"),
        ({"version": np.int64(7)}, "/v1/tables/item/versions/7/lookup"),
        ({"label": "stable"}, "/v1/tables/item/labels/stable/lookup"),
        ({"on_missing": "error"}, "/v1/tables/item/lookup?on_missing=error"),
        ({"dtype": "float16"}, "/v1/tables/item/lookup?dtype=float16"),
        (
            {"version": 7, "on_missing": "hash", "dtype": "float16"},
            "/v1/tables/item/versions/7/lookup?on_missing=hash&dtype=float16",
        ),
    ],
)
def test_options_become_path_and_query(options: dict[str, Any], target: str) -> None:
    """Version, label and options appear exactly where the contract has them; defaults are left out."""
    assert build_lookup("item", [1], **options).target == target


@pytest.mark.parametrize(
    ("table", "quoted"),
    [("a/b", "a%2Fb"), ("a b?", "a%20b%3F"), ("ö", "%C3%B6"), ("%2e", "%252e"), ("x.y", "x.y")],
)
def test_a_name_never_leaves_its_path_segment(table: str, quoted: str) -> None:
    """A table's name is quoted so that no character of it can reach another path."""
    assert build_lookup(table, [1]).target == f"/v1/tables/{quoted}/lookup"


def test_string_keys_travel_as_json_and_ask_for_octets() -> None:
    """String keys go as JSON with the options as fields, and the rows are asked for in binary."""
    request = build_lookup("country", ["se", "nø"], on_missing="default", label="stable")
    assert json.loads(request.body) == {"ids": ["se", "nø"], "on_missing": "default", "dtype": "float32"}
    assert request.target == "/v1/tables/country/labels/stable/lookup"
    assert dict(request.headers) == {"content-type": "application/json", "accept": "application/octet-stream"}


def test_many_tables_travel_as_one_json_document() -> None:
    """Every table's ids are in one call, exact beyond 2^53, with the options beside them."""
    request = build_lookup_many({"user": np.array([2**53 + 1]), "country": ["se"]}, release="r/1", on_missing="error")
    assert request.target == "/v1/releases/r%2F1/lookup"
    assert json.loads(request.body) == {
        "tables": {
            "user": {"ids": [2**53 + 1], "on_missing": "error", "dtype": "float32"},
            "country": {"ids": ["se"], "on_missing": "error", "dtype": "float32"},
        }
    }
    assert build_lookup_many({"user": []}).target == "/v1/lookup"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"version": 1, "label": "x"}, ValueError, "not both"),
        ({"version": 0}, ValueError, "positive integer"),
        ({"version": True}, TypeError, "positive integer"),
        ({"version": 1.0}, TypeError, "positive integer"),
        ({"version": "7"}, TypeError, "positive integer"),
        ({"label": ""}, ValueError, "label must be a name"),
        ({"label": ".."}, ValueError, "label must be a name"),
        ({"label": 3}, TypeError, "label must be a string"),
        ({"table": "."}, ValueError, "table must be a name"),
        ({"on_missing": "skip"}, ValueError, "zero, default, error, hash"),
        ({"dtype": "float64"}, ValueError, "float32, float16, bfloat16, int8, got 'float64'"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_it_is_sent(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Wrong options raise here, and the message says what would be right."""
    with pytest.raises(error, match=message):
        build_lookup(**{"table": "item", "ids": [1]} | options)


def test_many_needs_a_table_and_names() -> None:
    """A call for no table at all, or for a nameless one, is refused."""
    with pytest.raises(ValueError, match="at least one table"):
        build_lookup_many({})
    with pytest.raises(ValueError, match="table must be a name"):
        build_lookup_many({"": [1]})
    with pytest.raises(ValueError, match="release must be a name"):
        build_lookup_many({"item": [1]}, release="..")
    with pytest.raises(ValueError, match="int8 is for one table"):
        build_lookup_many({"item": [1]}, dtype="int8")


# Ids


class Column:
    """Like a tensor or a data frame's column: no array, but knows how to become one."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del dtype, copy
        return np.array([3, 14], dtype=np.int32)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 14],
        (3, 14),
        range(3, 15, 11),
        array.array("q", [3, 14]),
        [np.int32(3), 14],
        [np.uint64(3), np.int8(14)],
        *(np.array([3, 14], dtype=dtype) for dtype in "bBhHiIlLqQ"),
        np.array([3, 14], dtype=">i8"),
        np.array([3, 0, 14, 0], dtype=np.int64)[::2],
        np.array([14, 3])[::-1],
        np.array([3, 14], dtype=object),
        Column(),
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
)
def test_integers_of_any_kind_are_the_same_ids(ids: Any) -> None:
    """Whatever holds the integers, and however it lies in memory, the same bytes are sent."""
    assert build_lookup("item", ids).body == np.array([3, 14], dtype="<i8").tobytes()


@given(
    hnp.arrays(
        st.one_of(hnp.integer_dtypes(endianness="?"), hnp.unsigned_integer_dtypes(endianness="?")),
        hnp.array_shapes(max_dims=1, min_side=0, max_side=20),
    )
)
def test_every_integer_array_keeps_its_values_or_is_refused(ids: np.ndarray) -> None:
    """No integer is ever changed on its way to the wire: it arrives as it is, or the call is refused."""
    if any(value > MAX_ID for value in ids.tolist()):
        with pytest.raises(ValueError, match="must fit int64"):
            build_lookup("item", ids)
    else:
        assert np.frombuffer(build_lookup("item", ids).body, "<i8").tolist() == ids.tolist()


@given(st.lists(st.integers(MIN_ID, MAX_ID), min_size=1, max_size=20))
def test_every_int64_in_a_list_keeps_its_value(ids: list[int]) -> None:
    """A list of Python ints arrives as it is, to the ends of int64."""
    assert np.asarray(normalize_ids(ids)).tolist() == ids


@pytest.mark.parametrize(
    "ids",
    [
        [1, MAX_ID + 1],
        [1, MIN_ID - 1],
        np.array([1, MAX_ID + 1], dtype=np.uint64),
        [1, np.uint64(MAX_ID + 1)],
        np.array([1, MAX_ID + 1], dtype=object),
    ],
)
def test_an_integer_outside_int64_is_named(ids: Any) -> None:
    """An id that does not fit is refused by value and position, never wrapped."""
    with pytest.raises(ValueError, match=rf"id ({MAX_ID + 1}|{MIN_ID - 1}) at position 1 does not"):
        normalize_ids(ids)


@pytest.mark.parametrize(
    "ids",
    [
        [1.0, 2.0],
        [1, float("nan")],
        [1, True],
        [1, None],
        [1, "2"],
        [b"se"],
        [np.bool_(True)],
        np.array([1.0]),
        np.array([True]),
        np.array([b"se"]),
        np.array([1, None], dtype=object),
        np.array(["2024-01-01"], dtype="datetime64[D]"),
        np.ma.array([1, 2], mask=[0, 1]),
        "item-3",
        b"\x00",
        3,
        np.int64(3),
        None,
        {1, 2},
        {1: 2},
        pytest.param(iter([1]), id="iterator"),
    ],
    ids=repr,
)
def test_what_is_not_plainly_ids_is_refused(ids: Any) -> None:
    """Floats, bools, None, bytes, mixtures, sets and single values are refused, not converted."""
    with pytest.raises(TypeError, match="ids must"):
        normalize_ids(ids)


@pytest.mark.parametrize("ids", [[[1, 2]], [(1,)], np.zeros((2, 2), dtype=np.int64), np.array(3)], ids=repr)
def test_ids_have_one_dimension(ids: Any) -> None:
    """Nested ids are refused rather than flattened by guess."""
    with pytest.raises(ValueError, match="1-d"):
        normalize_ids(ids)


@pytest.mark.parametrize(
    "keys", [["se", "no"], ("se", "no"), np.array(["se", "no"]), np.array(["se", "no"], dtype=object)]
)
def test_string_keys_of_any_kind_are_the_same_keys(keys: Any) -> None:
    """Keys in lists and in string arrays are the same plain strings."""
    assert normalize_ids(keys) == ["se", "no"]


@pytest.mark.parametrize("ids", [[], (), np.array([]), np.array([], dtype=object)], ids=repr)
def test_no_ids_of_no_kind_suit_every_table(ids: Any) -> None:
    """An empty call that does not say of what goes as JSON, which tables of integers and of keys both take."""
    request = build_lookup("country", ids)
    assert json.loads(request.body)["ids"] == []
    assert dict(request.headers)["content-type"] == "application/json"


def test_no_integers_are_no_bytes() -> None:
    """An empty array of integers goes as octets, like any other."""
    request = build_lookup("item", np.arange(0))
    assert request.body == b""
    assert dict(request.headers)["content-type"] == "application/octet-stream"


# About the service


def test_tables_are_a_list_of_objects() -> None:
    """The list of tables is read bare or under `tables`; anything else is refused."""
    request = build_tables()
    assert (request.method, request.target) == ("GET", "/v1/tables")
    tables = [{"table": "item", "scheme": "qr"}]
    assert request.parse(as_json(tables)) == tables
    assert request.parse(as_json({"tables": tables})) == tables
    for other in ({}, ["item"], "item", {"tables": None}):
        with pytest.raises(ProtocolError):
            request.parse(as_json(other))
    with pytest.raises(ProtocolError, match="text/html"):
        request.parse(Reply(200, {"content-type": "text/html"}, b"[]"))


def test_ready_is_yes_no_or_not_an_embstore() -> None:
    """200 is ready and 503 is not, whatever the body; a redirect is neither."""
    request = build_ready()
    assert (request.method, request.target) == ("GET", "/readyz")
    assert request.parse(Reply(200, {}, b"ok")) is True
    assert request.parse(Reply(503, {}, b"loading")) is False
    with pytest.raises(ProtocolError):
        request.parse(Reply(302, {}, b""))


def test_headers_fold_without_losing_a_value() -> None:
    """Names are found in any case, and a header sent twice is not taken for one."""
    folded = fold_headers([(b"X-Embedding-Version", b"7"), (b"x-embedding-version", b"8"), (b"Date", b"now")])
    assert folded == {"x-embedding-version": "7, 8", "date": "now"}
