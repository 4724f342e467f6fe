"""The client's bytes: what it sends, and what it makes of an answer, without any IO."""

from __future__ import annotations

import array
import json
from typing import Any

import numpy as np
import pytest
from embstore_client import ProtocolError, Rows
from embstore_client._ids import MAX_ID, MIN_ID, normalize_ids
from embstore_client._protocol import (
    Reply,
    build_lookup,
    build_lookup_many,
    build_ready,
    build_tables,
    fold_headers,
    parse_lookup,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Golden: two rows of two float32, ids 1.0 -2.0 / 0.5 0.0, little-endian, written out by hand.
GOLDEN_ROWS = bytes.fromhex("0000803f 000000c0 0000003f 00000000")


def octets(body: bytes, **headers: str) -> Reply:
    """A right answer of two found rows, unless `headers` say otherwise (None leaves one out)."""
    given_headers = {
        "content-type": "application/octet-stream",
        "x-embedding-version": "7",
        "x-embedding-shape": "2,2",
        "x-embedding-dtype": "float32",
        "x-embedding-missing": "0",
    }
    given_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(200, {name: value for name, value in given_headers.items() if value is not None}, body)


def read(reply: Reply, n: int = 2, **options: Any) -> Rows:
    return parse_lookup(reply, **{"table": "item", "num_ids": n, "dtype": "float32"} | options)


def entry(**fields: Any) -> dict[str, Any]:
    right = {
        "table": "item",
        "version": 7,
        "embedding_dim": 2,
        "dtype": "float32",
        "vectors": [[1.0, -2.0], [0.5, 0.0]],
    }
    return {name: value for name, value in (right | fields).items() if value is not ...}


def as_json(document: Any, **headers: str) -> Reply:
    return Reply(200, {"content-type": "application/json", **headers}, json.dumps(document).encode())


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
        ({"dtype": "int8"}, ValueError, "float32 and float16, not 'int8'"),
        ({"dtype": "bfloat16"}, ValueError, "float32 and float16, not 'bfloat16'"),
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


# What comes back


def test_golden_rows_are_read() -> None:
    """The golden answer gives the golden vectors and every fact in its headers."""
    rows = read(octets(GOLDEN_ROWS, x_embedding_release="r-1", x_request_id="q"))
    assert rows.vectors.dtype == np.float32
    assert rows.vectors.tolist() == [[1.0, -2.0], [0.5, 0.0]]
    assert rows.found.dtype == np.bool_
    assert rows.found.tolist() == [True, True]
    assert (rows.version, rows.missing, rows.dtype, rows.release, rows.request_id) == (
        7,
        0,
        "float32",
        "r-1",
        "q",
    )
    assert len(rows) == 2
    assert repr(rows) == "Rows(2 x 2 float32, version=7, missing=0)"


def test_vectors_lie_over_the_answer_itself() -> None:
    """Vectors are not copied: they share the memory of the reply's bytes, and so cannot be written."""
    body = bytes(GOLDEN_ROWS)
    vectors = read(octets(body)).vectors
    assert np.shares_memory(vectors, np.frombuffer(body, np.uint8))
    owner = vectors
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert owner is body
    assert not vectors.flags.writeable


def test_float16_rows_are_read() -> None:
    """`float16` halves the bytes and keeps the dtype."""
    body = bytes.fromhex("003c 00c0 0038 0000")
    rows = read(octets(body, x_embedding_dtype="float16"), dtype="float16")
    assert rows.vectors.dtype == np.float16
    assert rows.vectors.tolist() == [[1.0, -2.0], [0.5, 0.0]]


def test_found_bits_are_least_significant_first() -> None:
    """Bit i of byte i // 8, from the least significant, is id i: golden for nine ids."""
    rows_9x1 = np.arange(9, dtype="<f4").tobytes()
    reply = octets(rows_9x1 + b"\x7d\x01", x_embedding_shape="9,1", x_embedding_missing="2")
    rows = read(reply, n=9)
    assert rows.found.tolist() == [True, False, True, True, True, True, True, False, True]
    assert rows.missing == 2
    assert rows.vectors[:, 0].tolist() == list(range(9))


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from(["float32", "float16"]),
)
def test_rows_and_found_survive_the_wire(found: list[bool], d: int, dtype: str) -> None:
    """Any rows and any pattern of missing ids are read as they were written."""
    n, missing = len(found), found.count(False)
    vectors = np.arange(n * d, dtype=dtype).reshape(n, d)
    bits = np.packbits(found, bitorder="little").tobytes() if missing else b""
    shape = {"x_embedding_shape": f"{n},{d}", "x_embedding_dtype": dtype, "x_embedding_missing": str(missing)}
    rows = read(octets(vectors.tobytes() + bits, **shape), n=n, dtype=dtype)
    assert rows.vectors.tobytes() == vectors.tobytes()
    assert rows.found.tolist() == found
    assert rows.missing == missing


def test_no_ids_give_no_rows_of_the_right_width() -> None:
    """An empty call has an empty answer of shape (0, d)."""
    rows = read(octets(b"", x_embedding_shape="0,64"), n=0)
    assert rows.vectors.shape == (0, 64)
    assert rows.found.shape == (0,)
    assert len(rows) == 0


@pytest.mark.parametrize("size", range(len(GOLDEN_ROWS)))
def test_a_truncated_answer_is_refused(size: int) -> None:
    """However much of the answer is lost, no vectors come out."""
    with pytest.raises(ProtocolError, match=f"take 16 bytes, got {size}"):
        read(octets(GOLDEN_ROWS[:size]))


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {name: None}
            for name in (
                "x_embedding_version",
                "x_embedding_shape",
                "x_embedding_dtype",
                "x_embedding_missing",
            )
        ),
        {"content_type": None},
        {"content_type": "text/html"},
        {"x_embedding_shape": "1,4"},
        {"x_embedding_shape": "4,1"},
        {"x_embedding_shape": "2,0"},
        {"x_embedding_shape": "2,2,1"},
        {"x_embedding_shape": "2"},
        {"x_embedding_shape": "-2,-2"},
        {"x_embedding_shape": "2,2, 2,2"},
        {"x_embedding_shape": "2," + "9" * 5000},
        {"x_embedding_dtype": "float16"},
        {"x_embedding_dtype": "float64"},
        {"x_embedding_version": "0"},
        {"x_embedding_version": "7, 8"},
        {"x_embedding_version": "+7"},
        {"x_embedding_version": "\N{ARABIC-INDIC DIGIT SEVEN}"},
        {"x_embedding_version": "latest"},
        {"x_embedding_missing": "1"},
        {"x_embedding_missing": "3"},
        {"x_embedding_missing": "-1"},
    ],
    ids=str,
)
def test_a_mislabelled_answer_is_refused(headers: dict[str, Any]) -> None:
    """A header that is absent, malformed, or at odds with the call or the body refuses the whole answer."""
    with pytest.raises(ProtocolError):
        read(octets(GOLDEN_ROWS, **headers))


@pytest.mark.parametrize("extra", [b"\x00", b"\x03"])
def test_bytes_after_the_rows_need_a_reason(extra: bytes) -> None:
    """Found bits without a missing id, or that count otherwise than the header, refuse the answer."""
    with pytest.raises(ProtocolError, match="take 16 bytes, got 17"):
        read(octets(GOLDEN_ROWS + extra))
    with pytest.raises(ProtocolError, match="say otherwise"):
        read(octets(GOLDEN_ROWS + extra, x_embedding_missing="1"))


def test_another_version_than_the_pinned_one_is_refused() -> None:
    """A pinned version is what answered, or nothing."""
    assert read(octets(GOLDEN_ROWS), version=7).version == 7
    with pytest.raises(ProtocolError, match="asked for version 8, version 7 answered"):
        read(octets(GOLDEN_ROWS), version=8)
    with pytest.raises(ProtocolError, match="asked for version 8, version 7 answered"):
        read(as_json(entry()), version=8)


@pytest.mark.parametrize("status", [201, 204, 206, 302, 307])
def test_a_status_that_is_neither_rows_nor_an_error_is_refused(status: int) -> None:
    """Only a 200 holds rows; a redirect says where it points."""
    with pytest.raises(ProtocolError, match=f"got {status}, pointing at /elsewhere"):
        read(Reply(status, octets(b"").headers | {"location": "/elsewhere"}, GOLDEN_ROWS))


def test_json_rows_are_read_too() -> None:
    """A server that answers in JSON gives the same rows."""
    rows = read(as_json(entry(found=[True, False]), **{"x-request-id": "q", "x-embedding-release": "r-1"}))
    assert rows.vectors.dtype == np.float32
    assert rows.vectors.tolist() == [[1.0, -2.0], [0.5, 0.0]]
    assert rows.found.tolist() == [True, False]
    assert (rows.version, rows.missing, rows.release, rows.request_id) == (7, 1, "r-1", "q")
    assert read(as_json(entry())).found.tolist() == [True, True]
    assert read(as_json(entry(vectors=[])), n=0).vectors.shape == (0, 2)


@given(hnp.arrays(np.float32, (2, 2), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_json_keeps_every_float32(vectors: np.ndarray) -> None:
    """A float32 written in JSON is read back as the same float32."""
    assert read(as_json(entry(vectors=vectors.tolist()))).vectors.tobytes() == vectors.tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        *({name: ...} for name in ("table", "version", "embedding_dim", "dtype", "vectors")),
        {"table": "user"},
        {"version": "7"},
        {"version": True},
        {"version": 0},
        {"embedding_dim": 3},
        {"embedding_dim": 0},
        {"dtype": "float16"},
        {"vectors": [[1.0, 2.0]]},
        {"vectors": [[1.0, 2.0], [3.0]]},
        {"vectors": [["1", "2"], ["3", "4"]]},
        {"vectors": [[1.0, None], [0.5, 0.0]]},
        {"vectors": [[True, True], [True, True]]},
        {"vectors": [[1e300, 0.0], [0.0, 0.0]]},
        {"vectors": [[2**70, 0], [0, 0]]},
        {"vectors": "rows"},
        {"found": [True]},
        {"found": [1, 0]},
        {"found": "all"},
    ],
    ids=str,
)
def test_mislabelled_json_is_refused(fields: dict[str, Any]) -> None:
    """A JSON answer whose fields are absent, mistyped or at odds with the call gives no vectors."""
    with pytest.raises(ProtocolError):
        read(as_json(entry(**fields)))


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"null"], ids=lambda body: repr(body[:4]))
def test_broken_json_is_refused(body: bytes) -> None:
    """A body that says JSON and is not, or is another document, is a ProtocolError whatever it holds."""
    reply = Reply(200, {"content-type": "application/json"}, body)
    with pytest.raises(ProtocolError):
        read(reply)
    with pytest.raises(ProtocolError):
        build_lookup_many({"item": [1, 2]}).parse(reply)


@given(st.binary(max_size=64), st.dictionaries(st.sampled_from(list(octets(b"").headers)), st.text(max_size=8)))
def test_no_answer_at_all_can_crash_the_reader(body: bytes, headers: dict[str, str]) -> None:
    """Whatever bytes and headers come, the outcome is rows of the asked shape or a ProtocolError."""
    try:
        rows = read(Reply(200, dict(octets(b"").headers) | headers, body))
    except ProtocolError:
        return
    assert rows.vectors.shape[0] == 2
    assert rows.vectors.nbytes <= len(body)


# Many tables


def many_reply(**fields: Any) -> Reply:
    document = {
        "release": "r-1",
        "tables": {"item": entry(), "user": entry(table="user", version=3, found=[True, False])},
    }
    return as_json(document | fields, **{"x-request-id": "q"})


def test_many_tables_come_from_one_release() -> None:
    """Each table's rows are under its name, with one release for all."""
    many = build_lookup_many({"item": [1, 2], "user": [3, 4]}, release="r-1").parse(many_reply())
    assert many.release == many["item"].release == many["user"].release == "r-1"
    assert (many["item"].version, many["user"].version) == (7, 3)
    assert many["item"].found.all()
    assert many["user"].missing == 1
    assert list(many) == ["item", "user"]
    assert len(many) == 2
    assert many.request_id == "q"
    assert "item" in repr(many)
    with pytest.raises(KeyError):
        many["seller"]


@pytest.mark.parametrize(
    "fields",
    [
        {"release": "r-2"},
        {"release": None},
        {"release": 1},
        {"tables": {"item": entry()}},
        {"tables": {"item": entry(), "user": entry(table="user"), "seller": entry(table="seller")}},
        {"tables": {"item": entry(table="user"), "user": entry(table="item")}},
        {"tables": {"item": entry(), "user": None}},
        {"tables": []},
    ],
    ids=str,
)
def test_many_tables_are_what_was_asked_for_or_refused(fields: dict[str, Any]) -> None:
    """Another release, or a table absent, extra or swapped, refuses the whole answer."""
    with pytest.raises(ProtocolError):
        build_lookup_many({"item": [1, 2], "user": [3, 4]}, release="r-1").parse(many_reply(**fields))


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
