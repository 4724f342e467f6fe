"""NVIDIA's own client, unmodified, against a real server: what it sends is understood, what it gets it understands."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from support.serving import ServerProcess, serving

import embstore

tritonhttp = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
tritonaio = pytest.importorskip("tritonclient.http.aio", reason="tritonclient[http] is not installed")
Refused: type[Exception] = pytest.importorskip("tritonclient.utils").InferenceServerException

NUM, DIM = 300, 8
ITEMS = np.random.default_rng(5).normal(size=(NUM, DIM)).astype(np.float32)
NAMES = [f"sku-{row}" for row in range(NUM)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two versions of two tables, each pair a release; a table of strings has the second version's vectors."""
    folder = tmp_path_factory.mktemp("triton")
    store = embstore.open_store(folder / "store")
    for factor in (2, 1):
        store.publish_release(
            {
                "item": embstore.Publication(ITEMS * factor),
                "tag": embstore.Publication(ITEMS * factor, ids=NAMES),
            }
        )
    with serving(folder / "store", folder / "log") as running:
        running.wait_until(lambda: len(models(running)) == 6, "the older versions too")
        yield running


@contextmanager
def connected(server: ServerProcess) -> Iterator[Any]:
    """The client, closed at the end."""
    with tritonhttp.InferenceServerClient(urlsplit(server.url).netloc) as client:
        yield client


def models(server: ServerProcess) -> list[dict[str, str]]:
    """The index of the repository."""
    with connected(server) as client:
        index: list[dict[str, str]] = client.get_model_repository_index()
        return index


def tensor(name: str, values: Any, binary: bool = True) -> Any:
    """An input of the client's."""
    array = np.array(values, np.object_) if isinstance(values, list) else values
    kinds = {"int64": "INT64", "int32": "INT32", "uint16": "UINT16", "float32": "FP32", "object": "BYTES"}
    made = tritonhttp.InferInput(name, list(array.shape), kinds[str(array.dtype)])
    made.set_data_from_numpy(array, binary_data=binary)
    return made


ROWS = np.array([3, 0, NUM - 1, 3])
BOTH = pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])


def test_the_server_and_its_models(server: ServerProcess) -> None:
    """Liveness, readiness and metadata say what is served, of a table and of all of them together."""
    with connected(server) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        about = client.get_server_metadata()
        assert (about["name"], about["version"]) == ("embstore", embstore.__version__)
        assert about["extensions"] == [
            *("binary_tensor_data", "model_configuration", "model_repository", "parameters", "system_shared_memory")
        ]
        assert client.is_model_ready("item")
        assert client.is_model_ready("item", "1")
        assert client.is_model_ready("embstore")
        assert not client.is_model_ready("item", "9")
        assert not client.is_model_ready("nobody")
        item = client.get_model_metadata("item", "1")
        assert (item["versions"], item["platform"]) == (["1", "2"], "embstore_full")
        assert item["inputs"] == [
            {"name": "ids", "datatype": "INT64", "shape": [-1]},
            {"name": "offsets", "datatype": "INT64", "shape": [-1]},
            {"name": "weights", "datatype": "FP32", "shape": [-1]},
        ]
        assert item["outputs"] == [
            {"name": "embeddings", "datatype": "FP32", "shape": [-1, DIM]},
            {"name": "found", "datatype": "BOOL", "shape": [-1]},
        ]
        many = client.get_model_metadata("embstore")
        assert many["versions"] == ["1", "2"]
        assert [t["name"] for t in many["inputs"]] == [
            f"{table}{part}" for table in ("item", "tag") for part in ("", ".offsets", ".weights")
        ]
        assert many["inputs"][3]["datatype"] == "BYTES"
        assert [t["name"] for t in many["outputs"]] == ["item", "item.found", "tag", "tag.found"]
        config = client.get_model_config("tag")
        assert config["max_batch_size"] == 0
        assert config["input"][0] == {"name": "ids", "data_type": "TYPE_STRING", "dims": [-1]}
        assert config["input"][1]["optional"] is True
        assert config["output"][0] == {"name": "embeddings", "data_type": "TYPE_FP32", "dims": [-1, DIM]}


@BOTH
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_ids_of_any_integer_type(server: ServerProcess, binary: bool, dtype: str) -> None:
    """Vectors are bit for bit the table's, whatever the ids are sent as; the caller's id comes back."""
    with connected(server) as client:
        ids = tensor("ids", ROWS.astype(dtype), binary)
        result = client.infer("item", [ids], request_id="mine", priority=1, sequence_id=7, timeout=60_000_000)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "item", "2")
    np.testing.assert_array_equal(result.as_numpy("embeddings"), ITEMS[ROWS])
    assert result.as_numpy("found").tolist() == [True] * 4


@BOTH
@pytest.mark.parametrize("reply_binary", [True, False], ids=["binary_reply", "json_reply"])
def test_columns_and_mixed_outputs(server: ServerProcess, binary: bool, reply_binary: bool) -> None:
    """Ids as a column [n, 1] give the same rows; each output comes in the form that was asked for."""
    with connected(server) as client:
        result = client.infer(
            "item",
            [tensor("ids", ROWS[:, None], binary)],
            outputs=[
                tritonhttp.InferRequestedOutput("found", binary_data=not reply_binary),
                tritonhttp.InferRequestedOutput("embeddings", binary_data=reply_binary),
            ],
        )
    assert ("data" in result.get_output("embeddings")) == (not reply_binary)
    np.testing.assert_array_equal(result.as_numpy("embeddings"), ITEMS[ROWS])
    assert result.as_numpy("found").tolist() == [True] * 4


@BOTH
def test_half_precision(server: ServerProcess, binary: bool) -> None:
    """Parameter dtype gives FP16, in both forms."""
    with connected(server) as client:
        wanted = [tritonhttp.InferRequestedOutput("embeddings", binary_data=binary)]
        result = client.infer("item", [tensor("ids", ROWS)], outputs=wanted, parameters={"dtype": "FP16"})
    assert result.get_output("embeddings")["datatype"] == "FP16"
    assert result.as_numpy("found") is None
    np.testing.assert_array_equal(result.as_numpy("embeddings"), ITEMS[ROWS].astype(np.float16))


@BOTH
def test_string_ids(server: ServerProcess, binary: bool) -> None:
    """BYTES are string keys, bytes or text; one that is not there is told apart and policed."""
    keys: list[Any] = ["sku-3", b"sku-0", "ärgerlich"]
    with connected(server) as client:
        result = client.infer("tag", [tensor("ids", keys, binary)], parameters={"on_missing": "default"})
        digits = client.infer("item", [tensor("ids", ["3", "-1"], binary)])
    np.testing.assert_array_equal(result.as_numpy("embeddings")[:2], ITEMS[[3, 0]])
    assert result.as_numpy("found").tolist() == [True, True, False]
    assert digits.as_numpy("found").tolist() == [True, False]


@BOTH
def test_no_ids_at_all(server: ServerProcess, binary: bool) -> None:
    """An empty tensor gets empty tensors."""
    with connected(server) as client:
        result = client.infer("item", [tensor("ids", ROWS[:0], binary)])
    assert result.as_numpy("embeddings").shape == (0, DIM)
    assert result.as_numpy("found").shape == (0,)


@BOTH
def test_bags(server: ServerProcess, binary: bool) -> None:
    """Offsets, weights and pooling make one vector a bag, as over the other calls."""
    weights = np.array([1, 0.5, 2, 1], np.float32)
    with connected(server) as client:
        result = client.infer(
            "item",
            [
                tensor("ids", ROWS, binary),
                tensor("offsets", np.array([0, 3]), binary),
                tensor("weights", weights, binary),
            ],
            parameters={"pooling": "mean"},
        )
    body = {"ids": ROWS.tolist(), "offsets": [0, 3], "weights": weights.tolist(), "pooling": "mean"}
    same = httpx.post(f"{server.url}/v1/tables/item/lookup", json=body).json()["vectors"]
    np.testing.assert_array_equal(result.as_numpy("embeddings"), np.array(same, np.float32))


def test_versions(server: ServerProcess) -> None:
    """A version in the path is the one that answers; for all tables together it is the release."""
    with connected(server) as client:
        one = client.infer("item", [tensor("ids", ROWS)], model_version="1")
        many = client.infer("embstore", [tensor("item", ROWS), tensor("tag", ["sku-3"])], model_version="1")
    assert one.get_response()["model_version"] == many.get_response()["model_version"] == "1"
    np.testing.assert_array_equal(one.as_numpy("embeddings"), ITEMS[ROWS] * 2)
    np.testing.assert_array_equal(many.as_numpy("item"), ITEMS[ROWS] * 2)
    np.testing.assert_array_equal(many.as_numpy("tag"), ITEMS[[3]] * 2)


@BOTH
def test_many_tables_in_one_request(server: ServerProcess, binary: bool) -> None:
    """Model embstore has an input and an output for each table, and all of them are of one release."""
    inputs = [tensor("tag", ["sku-3", "nobody"], binary), tensor("item", ROWS, binary)]
    with connected(server) as client:
        usual = client.infer("embstore", inputs)
        named = client.infer(
            "embstore",
            [*inputs, tensor("item.offsets", np.array([0, 2]), binary)],
            outputs=[tritonhttp.InferRequestedOutput(name, binary) for name in ("tag.found", "item", "item.found")],
            parameters={"item.pooling": "sum"},
        )
    assert usual.get_response()["parameters"] == {"release": "2"}
    assert [output["name"] for output in usual.get_response()["outputs"]] == ["tag", "item"]
    np.testing.assert_array_equal(usual.as_numpy("item"), ITEMS[ROWS])
    np.testing.assert_array_equal(usual.as_numpy("tag"), [ITEMS[3], np.zeros(DIM)])
    assert named.as_numpy("tag.found").tolist() == [True, False]
    np.testing.assert_array_equal(named.as_numpy("item"), [ITEMS[3] + ITEMS[0], ITEMS[NUM - 1] + ITEMS[3]])
    assert named.as_numpy("item.found").tolist() == [True] * 4


def test_a_request_without_json(server: ServerProcess) -> None:
    """A raw binary request is ids alone, and its reply is binary."""
    content, headers = ROWS.astype("<i8").tobytes(), {"Inference-Header-Content-Length": "0"}
    reply = httpx.post(f"{server.url}/v2/models/item/infer", content=content, headers=headers)
    result = tritonhttp.InferenceServerClient.parse_response_body(
        reply.content, header_length=int(reply.headers["Inference-Header-Content-Length"])
    )
    np.testing.assert_array_equal(result.as_numpy("embeddings"), ITEMS[ROWS])


def test_large_and_concurrent_requests(server: ServerProcess) -> None:
    """Tens of thousands of ids, and requests in flight together, each get their own vectors."""
    rows = np.random.default_rng(0).integers(0, NUM, 60_000)
    with tritonhttp.InferenceServerClient(urlsplit(server.url).netloc, concurrency=4) as client:
        np.testing.assert_array_equal(client.infer("item", [tensor("ids", rows)]).as_numpy("embeddings"), ITEMS[rows])
        waiting = [client.async_infer("item", [tensor("ids", rows[at : at + 50])]) for at in range(0, 1000, 50)]
        for at, one in zip(range(0, 1000, 50), waiting, strict=True):
            np.testing.assert_array_equal(one.get_result().as_numpy("embeddings"), ITEMS[rows[at : at + 50]])


def test_the_asyncio_client(server: ServerProcess) -> None:
    """The client's asyncio form gets the same answers."""

    async def calls() -> None:
        async with tritonaio.InferenceServerClient(urlsplit(server.url).netloc) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("item"))["name"] == "item"
            ids = tritonaio.InferInput("ids", [4], "INT64").set_data_from_numpy(ROWS)
            results = await asyncio.gather(*(client.infer("item", [ids]) for _ in range(8)))
            for result in results:
                np.testing.assert_array_equal(result.as_numpy("embeddings"), ITEMS[ROWS])
            with pytest.raises(Refused, match="no table named 'nobody'"):
                await client.infer("nobody", [ids])

    asyncio.run(calls())


def test_refusals_say_what_was_wrong(server: ServerProcess) -> None:
    """The client's exception has the status and the server's words, also for what is not supported at all."""
    ids = tensor("ids", ROWS)
    shared = tritonhttp.InferInput("ids", [4], "INT64")
    shared.set_shared_memory("region", 32)
    with connected(server) as client:
        for call, status, text in (
            (lambda: client.infer("nobody", [ids]), "404", "no table named 'nobody'"),
            (lambda: client.infer("item", [ids], model_version="7"), "404", "no version 7"),
            (lambda: client.infer("item", [ids], model_version="x"), "400", "'x' is not a version number"),
            (lambda: client.infer("item", [tensor("id", ROWS)]), "400", "needs an input 'ids'"),
            (lambda: client.infer("tag", [ids]), "422", "table 'tag' has string ids; input 'ids'[0] is"),
            (lambda: client.infer("item", [shared]), "404", "no shared memory region named 'region'"),
            (lambda: client.infer("item", [ids], request_compression_algorithm="gzip"), "415", "Content-Encoding"),
            (lambda: client.infer("item", [ids], timeout=1), "504", "timeout"),
            (lambda: client.infer("item", [tensor("ids", ROWS + NUM)], parameters=ERROR), "422", f"id {NUM + 3}"),
            (lambda: client.infer("item", [tensor("ids", np.zeros(70_000, np.int64))]), "413", "limit is 65,536"),
            (lambda: client.get_model_metadata("nobody"), "404", "no table named 'nobody'"),
            (lambda: client.get_model_metadata("embstore", "9"), "404", "no release '9'"),
            (lambda: client.get_inference_statistics("item"), "404", "not supported"),
            (lambda: client.get_trace_settings(), "404", "not supported"),
            (lambda: client.get_log_settings(), "404", "not supported"),
            (lambda: client.get_cuda_shared_memory_status(), "404", "not supported"),
            (lambda: client.load_model("nobody"), "404", "no table named 'nobody'"),
            (lambda: client.unload_model("embstore"), "409", "all tables together"),
            (lambda: client.load_model("item", config="{}"), "422", "parameter 'config'"),
        ):
            with pytest.raises(Refused) as raised:
                call()
            assert (raised.value.status(), text in raised.value.message()) == (status, True), raised.value  # type: ignore[attr-defined]


ERROR = {"on_missing": "error"}


def test_unload_and_load(server: ServerProcess) -> None:
    """An unloaded table is served no longer and the others are; loaded again it is what it was."""
    ids, tags = tensor("ids", ROWS), tensor("tag", ["sku-3"])
    with connected(server) as client:
        client.unload_model("item")
        assert not client.is_model_ready("item")
        assert client.is_server_ready()
        with pytest.raises(Refused, match="no table named 'item'"):
            client.infer("item", [ids])
        assert client.infer("embstore", [tags], model_version="2").as_numpy("tag").shape == (1, DIM)
        states = {(e["name"], e["version"]): (e["state"], e["reason"]) for e in client.get_model_repository_index()}
        assert states["item", "2"] == ("UNAVAILABLE", "unloaded")
        assert states["tag", "1"] == states["tag", "2"] == states["embstore", "2"] == ("READY", "")
        ready = httpx.post(f"{server.url}/v2/repository/index", json={"ready": True}).json()
        assert {entry["name"] for entry in ready} == {"tag", "embstore"}
        client.load_model("item")
        np.testing.assert_array_equal(client.infer("item", [ids]).as_numpy("embeddings"), ITEMS[ROWS])
        client.load_model("item")  # once more: nothing to do
        assert client.is_model_ready("item")


def test_infer_requests_are_counted_under_their_protocol(server: ServerProcess) -> None:
    """Metrics tell how many lookups came by this protocol, for each table of a request."""

    def counted() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        name = "embstore_lookup_duration_seconds_count"
        mine = [line.rsplit(" ", 1) for line in lines if line.startswith(name) and 'protocol="open-inference"' in line]
        return {table: float(n) for at, n in mine for table in ("item", "tag") if f'table="{table}"' in at}

    before = counted()
    with connected(server) as client:
        client.infer("item", [tensor("ids", ROWS)])
        client.infer("embstore", [tensor("item", ROWS), tensor("tag", ["sku-3"])])
    after = counted()
    assert {table: after[table] - before[table] for table in after} == {"item": 2, "tag": 1}
