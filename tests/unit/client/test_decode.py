"""What the client makes of an answer: the right rows, or a refusal, and nothing in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from embstore_client import ProtocolError, Rows
from embstore_client._core.protocol import Reply, build_lookup_many, parse_lookup
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.client_cases import GOLDEN_ROWS, as_json, entry, octets

pytestmark = pytest.mark.slow


def read(reply: Reply, n: int = 2, **options: Any) -> Rows:
    return parse_lookup(reply, **{"table": "item", "num_ids": n, "num_rows": n, "dtype": "float32"} | options)


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


def test_bfloat16_rows_are_widened() -> None:
    """A bfloat16 is the upper half of a float32, golden; its bits are kept beside the float32 it stands for."""
    body = bytes.fromhex("803f 00c0 003f 0080")
    rows = read(octets(body, x_embedding_dtype="bfloat16"), dtype="bfloat16")
    assert rows.vectors.dtype == np.float32
    assert rows.vectors.tolist() == [[1.0, -2.0], [0.5, -0.0]]
    assert rows.encoded is not None
    assert rows.encoded.tobytes() == body
    assert not rows.vectors.flags.writeable


def test_int8_rows_are_widened() -> None:
    """A row is its codes, then a float32 scale and a float32 bias, golden: code * scale + bias."""
    body = bytes.fromhex("00ff 0000003f 000000bf0402 00000040 0000803f")
    rows = read(octets(body, x_embedding_dtype="int8"), dtype="int8")
    assert rows.vectors.dtype == np.float32
    assert rows.vectors.tolist() == [[-0.5, 127.0], [9.0, 5.0]]
    assert rows.encoded is not None
    assert (rows.encoded.shape, rows.encoded.dtype) == ((2, 10), np.uint8)
    assert not rows.vectors.flags.writeable


@pytest.mark.parametrize(("dtype", "size"), [("float16", 8), ("bfloat16", 8), ("int8", 20)])
def test_truncated_rows_of_any_dtype_are_refused(dtype: str, size: int) -> None:
    """However much is lost or added, no vectors come out."""
    for wrong in [*range(size), size + 1]:
        with pytest.raises(ProtocolError, match=f"take {size} bytes, got {wrong}"):
            read(octets(bytes(wrong), x_embedding_dtype=dtype), dtype=dtype)


def test_bags_have_a_row_each_and_found_bits_for_each_id() -> None:
    """The shape counts bags, missing and found bits count ids."""
    reply = octets(GOLDEN_ROWS + b"\x16", x_embedding_missing="2")
    rows = read(reply, n=5, num_rows=2)
    assert rows.vectors.shape == (2, 2)
    assert rows.found.tolist() == [False, True, True, False, True]
    with pytest.raises(ProtocolError, match="asked for 3 rows"):
        read(reply, n=5, num_rows=3)


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


def test_json_rows_of_bfloat16_are_read() -> None:
    """JSON holds bfloat16 as numbers; one that is none, or int8, refuses the answer."""
    rows = read(as_json(entry(dtype="bfloat16")), dtype="bfloat16")
    assert rows.vectors.tolist() == [[1.0, -2.0], [0.5, 0.0]]
    assert rows.encoded is not None
    assert rows.encoded.tolist() == [[0x3F80, 0xC000], [0x3F00, 0]]
    with pytest.raises(ProtocolError, match="fit bfloat16"):
        read(as_json(entry(dtype="bfloat16", vectors=[[1.001, 0.0], [0.5, 0.0]])), dtype="bfloat16")
    with pytest.raises(ProtocolError, match="fit int8"):
        read(as_json(entry(dtype="int8")), dtype="int8")


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


# Many tables as JSON


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
        {"tables": {"item": entry(), "user": entry(table="user", release="r-2")}},
    ],
    ids=str,
)
def test_many_tables_are_what_was_asked_for_or_refused(fields: dict[str, Any]) -> None:
    """Another release, or a table absent, extra or swapped, refuses the whole answer."""
    with pytest.raises(ProtocolError):
        build_lookup_many({"item": [1, 2], "user": [3, 4]}, release="r-1").parse(many_reply(**fields))


def test_a_header_of_another_release_is_refused() -> None:
    """Where the answer's header names another release than its body, nothing is returned."""
    request = build_lookup_many({"item": [1, 2], "user": [3, 4]})
    right = many_reply()
    assert request.parse(Reply(200, right.headers | {"x-embedding-release": "r-1"}, right.body)).release == "r-1"
    with pytest.raises(ProtocolError, match="two releases"):
        request.parse(Reply(200, right.headers | {"x-embedding-release": "r-2"}, right.body))
