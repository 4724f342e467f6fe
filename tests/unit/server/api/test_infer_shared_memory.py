"""Infer requests with tensors in shared memory, answered in process: what is read, what is written, what is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.infer_cases import MAX, VECTORS, Service, answer, published

from embstore.errors import BadRequest, BodyTooLarge, EmbstoreError, Forbidden, NotFound, TooManyIds, Unprocessable
from server.api.codecs import open_inference
from server.api.places import Place
from server.api.shared_memory import Regions
from server.api.shared_objects import FOLDER
from server.http.auth import ApiKeys
from server.tables.snapshot import Snapshot

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
HERE = {b"host": b"localhost:8000"}
KEYS = ApiKeys([], [], host="127.0.0.1")
SIZE = 1 << 16
UNTOUCHED = b"\7"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Three tables of one release."""
    return published(tmp_path_factory.mktemp("store"))


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object."""
    path = FOLDER / f"embstore-test-{secrets.token_hex(6)}"
    path.write_bytes(UNTOUCHED * SIZE)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def regions(path: Path) -> Regions:
    """All of the object as region `a`."""
    regions = Regions(KEYS, 1 << 30)
    regions.register("a", path.name, 0, SIZE)
    return regions


def at(offset: int, num_bytes: int, region: str = "a") -> dict[str, Any]:
    """Parameters of a tensor that is in shared memory."""
    return {"parameters": Place(region, offset, num_bytes).parameters(num_bytes)}


def ids(num_ids: int, **where: Any) -> dict[str, Any]:
    """The input `ids`."""
    return {"name": "ids", "datatype": "INT64", "shape": [num_ids], **where}


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    """An infer request."""
    return json.dumps({"inputs": inputs, **more}).encode()


def put(path: Path, offset: int, data: bytes) -> None:
    """Write as a client does."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def vectors(path: Path, offset: int, rows: int, dtype: type[np.floating[Any]] = np.float32) -> Any:
    """Vectors as a client reads them."""
    return np.frombuffer(path.read_bytes(), dtype, rows * 4, offset).reshape(rows, 4)


@pytest.mark.parametrize("later", [True, False], ids=["later", "now"])
def test_inputs_and_outputs_of_one_table(snapshot: Snapshot, regions: Regions, path: Path, later: bool) -> None:
    """Ids are read, vectors and found are written next to what stays as it was; the reply says where, and no more."""
    put(path, 0, np.array([3, 77, 0]).tobytes())
    outputs = [{"name": "embeddings", **at(1000, 500)}, {"name": "found", **at(2000, 3)}]
    sent = body(ids(3, **at(0, 24)), outputs=outputs)
    for first in (3, 4):  # the second time the head is known, and the ids are others
        put(path, 0, np.array([first]).tobytes())
        reply = answer(snapshot, "item", HERE, sent, regions=regions, service=Service(later))
        assert json.loads(b"".join(map(bytes, reply.body)))["outputs"] == [
            {"name": "embeddings", "datatype": "FP32", "shape": [3, 4], **at(1000, 48)},
            {"name": "found", "datatype": "BOOL", "shape": [3], **at(2000, 3)},
        ]
        assert reply.head == b"content-type: application/json\r\n"
        assert not reply.leases, "the reply does not read the memory of the rows"
        np.testing.assert_array_equal(vectors(path, 1000, 3), [VECTORS[first], VECTORS[0] * 0, VECTORS[0]])
        content = path.read_bytes()
        assert content[2000:2003] == b"\1\0\1"
        assert set(content[24:1000] + content[1048:2000] + content[2003:]) == set(UNTOUCHED)


@pytest.mark.parametrize(("dtype", "kind"), [("FP32", np.float32), ("FP16", np.float16)])
def test_many_tables(snapshot: Snapshot, regions: Regions, path: Path, dtype: str, kind: Any) -> None:
    """Integers and strings come from a region; one table's vectors go there, the other's into the reply."""
    strings = b"".join(len(raw).to_bytes(4, "little") + raw for raw in ("ä".encode(), b"sku-3"))
    put(path, 0, np.array([5], np.int32).tobytes() + strings)
    inputs = (
        {"name": "item", "datatype": "INT32", "shape": [1, 1], **at(0, 4)},
        {"name": "tag", "datatype": "BYTES", "shape": [2], **at(4, len(strings))},
    )
    outputs = [{"name": "item"}, {"name": "tag", **at(100, 32)}]
    sent = body(*inputs, outputs=outputs, parameters={"dtype": dtype})
    reply = answer(snapshot, "embstore", HERE, sent, regions=regions)
    item, tag = json.loads(b"".join(map(bytes, reply.body)))["outputs"]
    assert item["data"] == VECTORS[5].tolist()
    assert tag["parameters"] == at(100, 8 * kind().nbytes)["parameters"] | {"version": 1, "missing": 0}
    np.testing.assert_array_equal(vectors(path, 100, 2, kind), VECTORS[[2, 3]].astype(kind))


def test_bags(snapshot: Snapshot, regions: Regions, path: Path) -> None:
    """Offsets and weights may be in a region too."""
    put(path, 0, np.array([1, 2, 5]).tobytes() + np.array([0, 2]).tobytes() + np.array([1, 3, 2], "f4").tobytes())
    inputs = (
        ids(3, **at(0, 24)),
        {"name": "offsets", "datatype": "INT64", "shape": [2], **at(24, 16)},
        {"name": "weights", "datatype": "FP32", "shape": [3], **at(40, 12)},
    )
    sent = body(*inputs, outputs=[{"name": "embeddings", **at(64, 32)}], parameters={"pooling": "sum"})
    answer(snapshot, "item", HERE, sent, regions=regions)
    np.testing.assert_array_equal(vectors(path, 64, 2), [VECTORS[1] + 3 * VECTORS[2], 2 * VECTORS[5]])


def test_an_output_may_take_the_place_of_an_input(snapshot: Snapshot, regions: Regions, path: Path) -> None:
    """What is read is copied before anything is written."""
    put(path, 0, np.array([3, 4]).tobytes())
    answer(
        snapshot,
        "item",
        HERE,
        body(ids(2, **at(0, 16)), outputs=[{"name": "embeddings", **at(0, 32)}]),
        regions=regions,
    )
    np.testing.assert_array_equal(vectors(path, 0, 2), VECTORS[[3, 4]])


def test_no_ids_at_all(snapshot: Snapshot, regions: Regions, path: Path) -> None:
    """Nothing is read and nothing written."""
    sent = body(ids(0, **at(SIZE, 0)), outputs=[{"name": "embeddings", **at(SIZE, 0)}])
    reply = answer(snapshot, "item", HERE, sent, regions=regions)
    assert json.loads(b"".join(map(bytes, reply.body)))["outputs"][0]["shape"] == [0, 4]
    assert set(path.read_bytes()) == set(UNTOUCHED)


def test_many_numbers_are_copied_in_a_thread(
    snapshot: Snapshot, regions: Regions, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop is not held up by a long copy."""
    monkeypatch.setattr(open_inference, "MANY_NUMBERS", 2 * 4)
    for num_ids in (2, 3):
        service = Service()
        sent = body(ids(num_ids, data=[1] * num_ids), outputs=[{"name": "embeddings", **at(0, 48)}])
        answer(snapshot, "item", HERE, sent, regions=regions, service=service)
        assert service.in_threads == (num_ids == 3)
        np.testing.assert_array_equal(vectors(path, 0, num_ids), VECTORS[[1] * num_ids])


ASKED = ids(2, data=[1, 2])
REFUSED: dict[str, tuple[dict[str, Any], type[EmbstoreError], str]] = {
    "unknown input": (
        {"inputs": [ids(2, **at(0, 16, "b"))]},
        NotFound,
        "input 'ids': no shared memory region named 'b'",
    ),
    "unknown output": (
        {"inputs": [ASKED], "outputs": [{"name": "found", **at(0, 2, "b")}]},
        NotFound,
        "output 'found': no shared memory region named 'b'",
    ),
    "no name": ({"inputs": [ids(2, **at(0, 16, ""))]}, NotFound, "no shared memory region named ''"),
    "too few bytes": ({"inputs": [ids(2, **at(0, 8))]}, BadRequest, "takes 16 bytes, its data has 8"),
    "too many bytes": ({"inputs": [ids(2, **at(0, 24))]}, BadRequest, "takes 16 bytes, its data has 24"),
    "outside": ({"inputs": [ids(2, **at(SIZE - 8, 16))]}, BadRequest, "are outside region 'a'"),
    "outside by overflow": ({"inputs": [ids(2, **at((1 << 63) - 8, 16))]}, BadRequest, "are outside region 'a'"),
    "data besides": ({"inputs": [ids(2, data=[1, 2], **at(0, 16))]}, BadRequest, "data beside its shared memory"),
    "too many ids": ({"inputs": [ids(MAX + 1, **at(0, 8 * MAX + 8))]}, TooManyIds, "1,001 elements"),
    "not strings": (
        {"inputs": [{"name": "ids", "datatype": "BYTES", "shape": [2], **at(0, 16)}]},
        BadRequest,
        "malformed BYTES tensor",
    ),
    "no room": (
        {"inputs": [ASKED], "outputs": [{"name": "found", **at(0, 2)}, {"name": "embeddings", **at(8, 31)}]},
        Unprocessable,
        "output 'embeddings' takes 32 bytes; shared_memory_byte_size is 31",
    ),
    "output outside": (
        {"inputs": [ASKED], "outputs": [{"name": "embeddings", **at(SIZE - 31, 32)}]},
        BadRequest,
        "output 'embeddings': bytes 65,505 to 65,537 are outside",
    ),
    "overlapping": (
        {"inputs": [ASKED], "outputs": [{"name": "found", **at(0, 2)}, {"name": "embeddings", **at(1, 32)}]},
        BadRequest,
        "output 'found' and output 'embeddings' overlap in shared memory",
    ),
    "missing": (
        {
            "inputs": [ids(1, data=[99])],
            "outputs": [{"name": "found", **at(0, 1)}],
            "parameters": {"on_missing": "error"},
        },
        EmbstoreError,
        "does not have id 99",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_and_nothing_is_written(
    snapshot: Snapshot, regions: Regions, path: Path, case: str
) -> None:
    """Every wrong request is refused with the name of what is wrong, before the first byte of an output is written."""
    asked, error, text = REFUSED[case]
    with pytest.raises(error) as raised:
        answer(snapshot, "item", HERE, json.dumps(asked).encode(), regions=regions)
    assert text in str(raised.value)
    assert set(path.read_bytes()) == set(UNTOUCHED)


def test_what_is_read_from_shared_memory_is_limited_like_a_body(
    snapshot: Snapshot, regions: Regions, path: Path
) -> None:
    """Many inputs that name the same bytes do not add up to more than one body may have."""
    num_bytes = 600_000
    path.write_bytes((num_bytes - 4).to_bytes(4, "little") + b"x" * (num_bytes - 4))
    regions.register("big", path.name, 0, num_bytes)
    where = at(0, num_bytes, "big")
    inputs = [{"name": name, "datatype": "BYTES", "shape": [1], **where} for name in ("tag", "item")]
    answer(snapshot, "embstore", HERE, body(inputs[0]), regions=regions)
    with pytest.raises(BodyTooLarge, match="the inputs have more than 1,048,576 bytes"):
        answer(snapshot, "embstore", HERE, body(*inputs), regions=regions)


def test_whose_caller_is_not_on_this_machine_is_refused(snapshot: Snapshot, regions: Regions) -> None:
    """A request that names a region from elsewhere gets no answer; one that names none gets it as ever."""
    for headers in ({b"host": b"evil.example"}, HERE | {b"origin": b"http://evil.example"}, HERE | {b"via": b"1.1 x"}):
        with pytest.raises(Forbidden, match="shared memory is accepted only from loopback"):
            answer(snapshot, "item", headers, body(ids(2, **at(0, 16))), regions=regions)
        with pytest.raises(Forbidden, match="shared memory is accepted only from loopback"):
            answer(snapshot, "item", headers, body(ASKED, outputs=[{"name": "found", **at(0, 2)}]), regions=regions)
        answer(snapshot, "item", headers, body(ASKED), regions=regions)
