"""NVIDIA's own client and its shared memory helpers, unmodified, against a real server of one process and of two."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from support.serving import ServerProcess, serving

import embstore
from server.api.shared_objects import FOLDER

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
memory = pytest.importorskip("tritonclient.utils.shared_memory", reason="tritonclient[http] is not installed")
utils = pytest.importorskip("tritonclient.utils")
Refused: type[Exception] = utils.InferenceServerException

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
NUM, DIM, WORKERS = 300, 8, 2
ITEMS = np.random.default_rng(5).normal(size=(NUM, DIM)).astype(np.float32)
NAMES = [f"sku-{row}" for row in range(NUM)]
ROWS = np.array([3, 0, NUM - 1, 3])


@pytest.fixture(scope="module", params=[1, WORKERS], ids=["one process", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A table of integer ids and one of strings."""
    folder = tmp_path_factory.mktemp("shared")
    publications = {"item": embstore.Publication(ITEMS), "tag": embstore.Publication(ITEMS * 2, ids=NAMES)}
    embstore.open_store(folder / "store").publish_release(publications)
    with serving(folder / "store", folder / "log", workers=request.param) as running:
        if request.param > 1:
            running.wait_until(lambda: _num_listening(running) == request.param, "every worker")
        yield running


def _num_listening(server: ServerProcess) -> int:
    return sum(event["event"] == "worker listening" for event in server.events())


@contextmanager
def connected(server: ServerProcess) -> Iterator[Any]:
    """The client, closed at the end."""
    with triton.InferenceServerClient(urlsplit(server.url).netloc) as client:
        yield client


@contextmanager
def region(client: Any, num_bytes: int) -> Iterator[tuple[str, Any]]:
    """A shared memory object, registered: the region's name and the client's handle."""
    name = f"embstore-test-{secrets.token_hex(6)}"
    handle = memory.create_shared_memory_region(name, f"/{name}", num_bytes)
    try:
        client.register_system_shared_memory(name, f"/{name}", num_bytes)
        yield name, handle
        client.unregister_system_shared_memory(name)
    finally:
        memory.destroy_shared_memory_region(handle)


def shared_input(name: str, datatype: str, shape: list[int], place: tuple[str, int, int]) -> Any:
    """An input that is in a region: its name, size and offset."""
    made = triton.InferInput(name, shape, datatype)
    made.set_shared_memory(*place)
    return made


def shared_output(name: str, place: tuple[str, int, int]) -> Any:
    """An output that goes to a region: its name, size and offset."""
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(*place)
    return made


def read(handle: Any, output: dict[str, Any]) -> Any:
    """An output as Triton's examples read it."""
    offset = output["parameters"]["shared_memory_offset"]
    dtype = utils.triton_to_np_dtype(output["datatype"])
    return memory.get_contents_as_numpy(handle, dtype, output["shape"], offset)


def body_input(rows: Any) -> Any:
    """The input `ids` in the body."""
    return triton.InferInput("ids", [len(rows)], "INT64").set_data_from_numpy(rows)


def test_regions_are_registered_listed_and_unregistered(server: ServerProcess) -> None:
    """Each region is in the list with what was said of it, until it is unregistered; a name is taken once."""
    with connected(server) as client:
        client.unregister_system_shared_memory()
        with region(client, 64) as (name, _):
            listed = {"name": name, "key": f"/{name}", "offset": 0, "byte_size": 64}
            client.register_system_shared_memory("part", f"/{name}", 8, offset=16)
            part = {"name": "part", "key": f"/{name}", "offset": 16, "byte_size": 8}
            assert client.get_system_shared_memory_status(name) == [listed]
            assert client.get_system_shared_memory_status() == [listed, part]
            with pytest.raises(Refused, match="'part' is registered already"):
                client.register_system_shared_memory("part", f"/{name}", 8)
            client.unregister_system_shared_memory("part")
            with pytest.raises(Refused, match="no shared memory region named 'part'"):
                client.get_system_shared_memory_status("part")
            client.unregister_system_shared_memory("part")  # once more: nothing to do
            client.unregister_system_shared_memory()
            assert client.get_system_shared_memory_status() == []


@pytest.mark.parametrize("shares", ["inputs", "outputs", "both"])
def test_vectors_are_those_of_an_ordinary_request(server: ServerProcess, shares: str) -> None:
    """Ids in a region, vectors in a region, or both: the same bytes as in a reply."""
    num_bytes = ROWS.size * DIM * 4
    with connected(server) as client, region(client, 4096) as (name, handle):
        plain = client.infer("item", [body_input(ROWS)]).as_numpy("embeddings")
        np.testing.assert_array_equal(plain, ITEMS[ROWS])
        memory.set_shared_memory_region(handle, [ROWS], offset=8)
        inputs = [body_input(ROWS)]
        if shares != "outputs":
            inputs = [shared_input("ids", "INT64", [ROWS.size], (name, ROWS.nbytes, 8))]
        if shares == "inputs":
            np.testing.assert_array_equal(client.infer("item", inputs).as_numpy("embeddings"), plain)
            return
        outputs = [shared_output("embeddings", (name, num_bytes, 1024)), shared_output("found", (name, 4, 2048))]
        for _ in range(8):  # more than there are workers
            memory.set_shared_memory_region(handle, [np.zeros(num_bytes, np.uint8)], offset=1024)
            reply = client.infer("item", inputs, outputs=outputs)
            np.testing.assert_array_equal(read(handle, reply.get_output("embeddings")), plain)
            assert read(handle, reply.get_output("found")).all()


def test_many_tables_and_strings(server: ServerProcess) -> None:
    """The model of all tables reads integers and strings from a region, and writes the vectors of both."""
    strings = utils.serialize_byte_tensor(np.array([b"sku-7", b"nobody"], np.object_))
    num_bytes = len(strings.item())
    with connected(server) as client, region(client, 4096) as (name, handle):
        memory.set_shared_memory_region(handle, [ROWS])
        memory.set_shared_memory_region(handle, [strings], offset=100)
        inputs = [
            shared_input("item", "INT64", [ROWS.size], (name, ROWS.nbytes, 0)),
            shared_input("tag", "BYTES", [2], (name, num_bytes, 100)),
        ]
        outputs = [shared_output("item", (name, 1000, 1000)), shared_output("tag", (name, 1000, 2000))]
        reply = client.infer("embstore", inputs, outputs=outputs)
        np.testing.assert_array_equal(read(handle, reply.get_output("item")), ITEMS[ROWS])
        np.testing.assert_array_equal(read(handle, reply.get_output("tag")), [ITEMS[7] * 2, ITEMS[0] * 0])
        assert reply.get_output("tag")["parameters"]["missing"] == 1


def test_clients_at_the_same_time_have_each_their_own(server: ServerProcess) -> None:
    """Threads with a region each get the vectors of their own ids, request after request."""
    wrong: list[str] = []

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        with connected(server) as client, region(client, 65_536) as (name, handle):
            for _ in range(40):
                rows = random.integers(0, NUM, 1 + random.integers(500))
                memory.set_shared_memory_region(handle, [rows])
                ids = shared_input("ids", "INT64", [rows.size], (name, rows.nbytes, 0))
                output = shared_output("embeddings", (name, 32 * rows.size, 8192))
                vectors = read(handle, client.infer("item", [ids], outputs=[output]).get_output("embeddings"))
                if not np.array_equal(vectors, ITEMS[rows]):
                    wrong.append(f"thread {number}")
        wrong.remove(f"{number} began")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    wrong += [f"{number} began" for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_objects_that_shrink_or_vanish_leave_the_server_alive(server: ServerProcess) -> None:
    """A truncated object is an error for who names it, time and again, and the server answers on."""
    with connected(server) as client, ExitStack() as stack:
        name, _ = stack.enter_context(region(client, 65_536))
        ids = shared_input("ids", "INT64", [512], (name, 4096, 32_768))
        output = shared_output("embeddings", (name, ROWS.size * DIM * 4, 32_768))
        os.truncate(FOLDER / name, 4096)
        for _ in range(4):
            for asked in (
                lambda: client.infer("item", [ids]),
                lambda: client.infer("item", [body_input(ROWS)], outputs=[output]),
            ):
                with pytest.raises(Refused, match="was truncated since it was registered"):
                    asked()
        assert client.is_server_live()
        assert (FOLDER / name).stat().st_size == 4096
        np.testing.assert_array_equal(client.infer("item", [body_input(ROWS)]).as_numpy("embeddings"), ITEMS[ROWS])
