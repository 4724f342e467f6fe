"""Infer requests answered in process: the table's vectors in the form that was asked for, counted, within limits."""

from __future__ import annotations

import numpy as np
import pytest
from support.infer_cases import (
    LENGTH,
    MAX,
    VECTORS,
    Counts,
    Service,
    Tensors,
    answer,
    body_of,
    outputs_of,
    published,
)

from embstore.errors import (
    BadRequest,
    DeadlineExceeded,
    ReleaseNotFound,
    TableNotFound,
    TooManyIds,
    Unprocessable,
)
from server.api.codecs import open_inference
from server.tables.snapshot import Snapshot


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Three tables of one release."""
    return published(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("dtype", ["FP32", "FP16"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("later", [True, False], ids=["later", "now"])
def test_one_table(snapshot: Snapshot, dtype: str, binary: bool, later: bool) -> None:
    """Both outputs, in both forms and types, are the table's vectors; the lookup is counted once."""
    counts = Counts()
    parameters = {"dtype": dtype, "binary_data_output": binary, "priority": 1, "custom": "kept"}
    sent = body_of({"ids": ("INT32", [3, 77, 0])}, {"ids"}, columns=True, id="mine", parameters=parameters)
    reply = answer(snapshot, "item", *sent, service=Service(later), counts=counts)
    head, outputs = outputs_of(reply)
    assert (head["id"], head["model_name"], head["model_version"], list(outputs)) == (
        *("mine", "item", "1"),
        ["embeddings", "found"],
    )
    assert (b"octet-stream" in reply.head) == binary
    assert head["outputs"][0]["datatype"] == dtype
    np.testing.assert_array_equal(outputs["embeddings"], [VECTORS[3], VECTORS[0] * 0, VECTORS[0]])
    assert outputs["found"].tolist() == [True, False, True]
    assert counts.counted == [("item", "open-inference", 3, 1)]


@pytest.mark.parametrize("later", [True, False], ids=["later", "now"])
@pytest.mark.parametrize("model", ["item", "embstore"])
def test_many_numbers_as_json_are_written_in_a_thread(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, model: str, later: bool
) -> None:
    """The event loop is not held up by text; bytes, and few numbers, are no work. The reply is the same."""
    ids = "ids" if model == "item" else "item"
    monkeypatch.setattr(open_inference, "LONG_NUMBERS", 2 * 4)
    for num_ids, binary in ((2, False), (3, True), (3, False)):
        service, counts = Service(later), Counts()
        sent = body_of({ids: ("INT64", [1] * num_ids)}, {ids}, parameters={"binary_data_output": binary})
        _, outputs = outputs_of(answer(snapshot, model, *sent, service=service, counts=counts))
        assert service.in_threads == (num_ids == 3 and not binary)
        np.testing.assert_array_equal(outputs["item" if model == "embstore" else "embeddings"], VECTORS[[1] * num_ids])
        assert counts.counted == [("item", "open-inference", num_ids, 0)]


def test_text_of_the_caller_is_never_taken_for_the_place_of_vectors(snapshot: Snapshot) -> None:
    """Vectors are put into JSON that is written already, at a byte that JSON escapes: an id with it comes whole."""
    sent = body_of({"ids": ("INT64", [3, 0])}, {"ids"}, id="a\0b", parameters={"binary_data_output": False})
    head, outputs = outputs_of(answer(snapshot, "item", *sent))
    assert head["id"] == "a\0b"
    np.testing.assert_array_equal(outputs["embeddings"], VECTORS[[3, 0]])


def test_float32_rows_are_sent_from_the_memory_they_were_looked_up_into(snapshot: Snapshot) -> None:
    """Binary float32 vectors are not copied, and their memory is lent until they are sent; other replies lend none."""
    for dtype, lent in (("FP32", True), ("FP16", False)):
        sent = body_of({"ids": ("INT64", [1])}, set(), parameters={"binary_data_output": True, "dtype": dtype})
        reply = answer(snapshot, "item", *sent)
        assert bool(reply.leases) == lent
        assert not lent or np.shares_memory(np.frombuffer(reply.body[1], np.float32), reply.leases[0])


def test_outputs_that_are_asked_for_come_as_asked(snapshot: Snapshot) -> None:
    """An output says for itself whether it is binary and what its numbers are; others are left out."""
    embeddings = {"name": "embeddings", "parameters": {"binary_data": True, "dtype": "float16"}}
    headers, body = body_of({"ids": ("INT64", [2])}, set(), outputs=[{"name": "found"}, embeddings])
    head, outputs = outputs_of(answer(snapshot, "item", headers, body))
    assert [(o["name"], o["datatype"], "data" in o) for o in head["outputs"]] == [
        ("found", "BOOL", True),
        ("embeddings", "FP16", False),
    ]
    np.testing.assert_array_equal(outputs["embeddings"], VECTORS[[2]])


def test_a_body_without_json_is_ids(snapshot: Snapshot) -> None:
    """A raw binary request is int64 ids, answered in binary; only a model of one numeric input takes it."""
    body = np.array([4, 5], "<i8").tobytes()
    _, outputs = outputs_of(answer(snapshot, "item", {LENGTH: b"0"}, body))
    np.testing.assert_array_equal(outputs["embeddings"], VECTORS[[4, 5]])
    with pytest.raises(BadRequest, match="8 bytes each"):
        answer(snapshot, "item", {LENGTH: b"0"}, body[1:])
    with pytest.raises(Unprocessable, match=r"string ids; input 'ids'\[0\] is 4; send JSON strings, or BYTES"):
        answer(snapshot, "tag", {LENGTH: b"0"}, body)
    with pytest.raises(BadRequest, match="raw binary request is not supported"):
        answer(snapshot, "embstore", {LENGTH: b"0"}, body)
    with pytest.raises(TooManyIds, match="1,001 elements"):
        answer(snapshot, "item", {LENGTH: b"0"}, bytes(8 * (MAX + 1)))


def test_string_ids_and_digits(snapshot: Snapshot) -> None:
    """BYTES are the keys of a table with string ids, and integers in digits for a table with integer ids."""
    for binary in (set[str](), {"ids"}):
        _, outputs = outputs_of(answer(snapshot, "tag", *body_of({"ids": ("BYTES", ["ä", "", "no"])}, binary)))
        np.testing.assert_array_equal(outputs["embeddings"][:2], VECTORS[[2, 0]])
        assert outputs["found"].tolist() == [True, True, False]
        _, outputs = outputs_of(answer(snapshot, "item", *body_of({"ids": ("BYTES", ["9", "-1"])}, binary)))
        assert outputs["found"].tolist() == [True, False]


@pytest.mark.parametrize("later", [True, False], ids=["later", "now"])
def test_bags(snapshot: Snapshot, later: bool) -> None:
    """Offsets and weights make one vector a bag; found stays one for each id."""
    tensors: Tensors = {
        "ids": ("INT64", [1, 2, 3]),
        "offsets": ("INT64", [0, 2]),
        "weights": ("FP32", [1.0, 0.5, 2.0]),
    }
    sent = body_of(tensors, {"offsets", "weights"}, parameters={"pooling": "sum"})
    _, outputs = outputs_of(answer(snapshot, "item", *sent, service=Service(later)))
    np.testing.assert_array_equal(outputs["embeddings"], [VECTORS[1] + VECTORS[2] / 2, VECTORS[3] * 2])
    assert outputs["found"].tolist() == [True] * 3


@pytest.mark.parametrize("later", [True, False], ids=["later", "now"])
def test_many_tables(snapshot: Snapshot, later: bool) -> None:
    """Model embstore answers an input for each table from one release, each with its own parameters."""
    counts = Counts()
    tensors: Tensors = {
        "item": ("INT64", [1, 2]),
        "item.offsets": ("INT64", [0]),
        "tag": ("BYTES", ["a", "no"]),
    }
    parameters = {"item.pooling": "mean", "tag.on_missing": "default", "tag.dtype": "FP16"}
    sent = body_of(tensors, {"item"}, parameters=parameters)
    for version in (None, 1):
        reply = answer(snapshot, "embstore", *sent, version=version, service=Service(later), counts=counts)
        head, outputs = outputs_of(reply)
        assert (head["model_name"], head["model_version"], head["parameters"]) == ("embstore", "1", {"release": "1"})
        assert head["outputs"][1]["parameters"] == {"version": 1, "missing": 1}
        np.testing.assert_array_equal(outputs["item"], [VECTORS[[1, 2]].mean(axis=0)])
        np.testing.assert_array_equal(outputs["tag"], np.stack([VECTORS[1], VECTORS[:5].mean(axis=0)]).astype("<f2"))
    assert counts.counted[:2] == [("item", "open-inference", 2, 0), ("tag", "open-inference", 2, 1)]
    with pytest.raises(ReleaseNotFound):
        answer(snapshot, "embstore", *sent, version=2)


def test_a_name_that_is_asked_for_is_a_table(snapshot: Snapshot) -> None:
    """`item.found` is the table of that name where it is an input, and else whether the ids of item were found."""
    _, outputs = outputs_of(
        answer(snapshot, "embstore", *body_of({"item": ("INT64", [1])}, set(), outputs=[{"name": "item.found"}]))
    )
    assert outputs["item.found"].tolist() == [True]
    both: Tensors = {"item": ("INT64", [1]), "item.found": ("INT64", [1, 2])}
    _, outputs = outputs_of(answer(snapshot, "embstore", *body_of(both, set(), outputs=[{"name": "item.found"}])))
    np.testing.assert_array_equal(outputs["item.found"], VECTORS[[1, 2]] * 2)


def test_many_tables_refuse_what_they_do_not_have(snapshot: Snapshot) -> None:
    """Unknown tables, stray parts, unknown outputs and too much over all tables are refused."""
    ids = ("INT64", [1])
    for tensors, error, text in (
        ({}, BadRequest, "at least one input"),
        ({"nobody": ids}, TableNotFound, "nobody"),
        ({"item.offsets": ids}, TableNotFound, "item.offsets"),
        ({"item": ids, "item.offsets": ids, "item.offsets.offsets": ids}, BadRequest, "belongs to no table"),
        ({"item": ("INT64", [1] * 600), "item.found": ("INT64", [1] * 600)}, TooManyIds, "1,200 ids"),
    ):
        with pytest.raises(error, match=text):
            answer(snapshot, "embstore", *body_of(tensors, set()))
    with pytest.raises(BadRequest, match=r"has no output 'tag'; it has item, item\.found"):
        answer(snapshot, "embstore", *body_of({"item": ids}, set(), outputs=[{"name": "tag"}]))


def test_a_reply_has_its_limit(snapshot: Snapshot) -> None:
    """More bytes of vectors than one reply may have are refused before they are looked up."""
    counts = Counts()
    with pytest.raises(TooManyIds, match="10 ids in one request; the limit is 6 "):
        answer(snapshot, "item", *body_of({"ids": ("INT64", [1] * 10)}, set()), counts=counts, max_reply_bytes=100)
    assert counts.counted == []


def test_a_timeout_is_a_deadline(snapshot: Snapshot) -> None:
    """A request whose microseconds are over is dropped; one that has time is answered."""
    with pytest.raises(DeadlineExceeded, match="1 microseconds"):
        answer(snapshot, "item", *body_of({"ids": ("INT64", [1])}, set(), parameters={"timeout": 1}))
    answer(snapshot, "item", *body_of({"ids": ("INT64", [1])}, set(), parameters={"timeout": 60_000_000}))


def test_nothing_served_is_no_model() -> None:
    """An empty snapshot knows no model, and says so."""
    with pytest.raises(TableNotFound):
        answer(Snapshot(), "item", *body_of({"ids": ("INT64", [1])}, set()))
