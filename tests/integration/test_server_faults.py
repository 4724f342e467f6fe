"""When the world around a server breaks, or it is told to go: nothing accepted is lost, nothing wrong is sent."""

from __future__ import annotations

import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import orjson
import pytest
from support.hostile import (
    NUM,
    TABLE_VD,
    WIDE_VD,
    Answer,
    Truncated,
    Wire,
    guarded,
    is_right,
    lookup,
    request,
    unharmed,
)
from support.serving import ServerProcess, serving

import embstore


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of its own for each test: most of these end it."""
    with guarded(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for the tests that leave it as it was; patient, for they read a lot one after the other."""
    with guarded(tmp_path_factory.mktemp("faults"), request_seconds=120) as running:
        yield running


class Pipeliner:
    """Keeps twenty requests in flight on one connection, some large, until the server says goodbye."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server, self.seed = server, seed
        self.answered = 0
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(30)

    def _run(self) -> None:
        waiting: list[list[int]] = []
        number = self.seed
        try:
            with Wire(self.server) as wire:
                while True:
                    while len(waiting) < 20:
                        ids = [(number + n) % NUM for n in range(12_000 if number % 50 == 0 else 1 + number % 5)]
                        waiting.append(ids)
                        wire.try_send(lookup(ids))
                        number += 1
                    answer = wire.answer()
                    is_right(answer, waiting.pop(0))
                    self.answered += 1
                    if answer.closes:
                        assert wire.closed_after_reply(), "a reply after the last one"
                        return
        except (AssertionError, OSError) as error:
            self.problem = f"after {self.answered}: {error!r}"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_reply_of_a_pipeline(server: ServerProcess, sig: signal.Signals) -> None:
    """On every connection the replies stay right and in order up to one that says close; then it ends, exit code 0."""
    clients = [Pipeliner(server, seed) for seed in range(4)]
    server.wait_until(lambda: all(client.answered > 50 or client.problem for client in clients), "some load")
    server.process.send_signal(sig)
    assert server.process.wait(20) == 0
    for client in clients:
        client.join()
    assert [client.problem for client in clients] == [None] * 4


def test_a_signal_lets_huge_replies_be_read_to_the_end(server: ServerProcess) -> None:
    """Replies of 16 MB that are being read slowly when the signal comes arrive whole."""
    found: list[Answer | str] = []

    def read_slowly() -> None:
        with Wire(server, receive_buffer=65_536) as wire:
            wire.send(lookup([9] * 1000, "wide"))
            time.sleep(1.0)  # the signal comes here
            try:
                found.append(wire.answer())
            except (Truncated, OSError) as error:
                found.append(repr(error))

    readers = [threading.Thread(target=read_slowly) for _ in range(3)]
    for reader in readers:
        reader.start()
    time.sleep(0.4)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    for reader in readers:
        reader.join(30)
    assert len(found) == 3
    for answer in found:
        assert isinstance(answer, Answer), answer
        is_right(answer, [9] * 1000, WIDE_VD)


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    """Who signals twice wants it gone: a request that never completes holds nothing up."""
    with guarded(tmp_path, drain_seconds=30, shutdown_seconds=30) as server, Wire(server) as wire:
        wire.send(lookup([1, 2])[:-3])
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: any(event["event"] == "draining" for event in server.events()), "the drain")
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)


def test_a_store_that_is_deleted_under_load_is_served_on(tmp_path: Path) -> None:
    """With every file of the store gone what is loaded is served, bit for bit, and the server stays ready."""
    with guarded(tmp_path) as server, unharmed_but_for_the_store(server), Wire(server) as wire:
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        shutil.rmtree(tmp_path / "store")
        server.wait_until(lambda: any("store cannot be read" in e["event"] for e in server.events()), "the log")
        everything = list(range(NUM))
        for _ in range(20):
            is_right(wire.send(lookup(everything)).answer(), everything)
        is_right(wire.send(lookup(list(range(16)) * 60, "wide")).answer(), list(range(16)) * 60, WIDE_VD)
        assert wire.send(request("GET", "/readyz")).answer().status == 200
        assert len(orjson.loads(wire.send(request("GET", "/v1/tables")).answer().body)["tables"]) == 2
        (tmp_path / "copy").rename(tmp_path / "store")
        embstore.open_store(tmp_path / "store").publish("item", TABLE_VD + 1)
        server.wait_until(
            lambda: wire.send(lookup([1])).answer().headers["x-embedding-version"] == "2", "the next version"
        )
        is_right(wire.send(lookup([1])).answer(), [1], TABLE_VD + 1)


def unharmed_but_for_the_store(server: ServerProcess) -> ExitStack:
    """The log may speak of the store, and of nothing else."""
    stack = ExitStack()

    def check() -> None:
        errors = [event["event"] for event in server.events() if event.get("level") == "error"]
        assert set(errors) <= {"store cannot be read; serving what is loaded", "damaged file in the store"}
        assert "Traceback" not in server.log_path.read_text()

    stack.callback(check)
    return stack


def test_no_descriptor_left_is_survived(lasting: ServerProcess) -> None:
    """Out of files, connections that are there are served on; with files again, new ones are as well."""
    with Wire(lasting) as old:
        is_right(old.send(lookup([1])).answer(), [1])
        soft, hard = resource.prlimit(lasting.pid, resource.RLIMIT_NOFILE)
        taken = len(list(Path(f"/proc/{lasting.pid}/fd").iterdir()))
        resource.prlimit(lasting.pid, resource.RLIMIT_NOFILE, (taken + 5, hard))
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(Wire(lasting)).send(lookup([2]))
            time.sleep(0.5)
            for n in range(50):
                is_right(old.send(lookup([n])).answer(), [n])
        resource.prlimit(lasting.pid, resource.RLIMIT_NOFILE, (soft, hard))
        with Wire(lasting) as new:
            is_right(new.send(lookup([3])).answer(), [3])
        is_right(old.send(lookup([4])).answer(), [4])
    assert (
        len(lasting.log_path.read_text()) < 1 << 20
    )  # one accept that fails says so once, not a thousand times a second


def test_a_process_that_was_stopped_goes_on(lasting: ServerProcess) -> None:
    """Requests sent to a process that stands still are answered when it runs again."""
    with unharmed(lasting), Wire(lasting) as idle, Wire(lasting) as busy:
        is_right(idle.send(lookup([1])).answer(), [1])
        lasting.process.send_signal(signal.SIGSTOP)
        busy.send(lookup([5]), lookup([6]))
        idle.send(lookup([7])[:40])
        time.sleep(1.5)
        lasting.process.send_signal(signal.SIGCONT)
        is_right(busy.answer(), [5])
        is_right(busy.answer(), [6])
        is_right(idle.send(lookup([7])[40:]).answer(), [7])


def test_huge_replies_are_exact_and_their_memory_is_returned(lasting: ServerProcess) -> None:
    """Four replies of 64 MB at once, the most there is, are right to the last byte; one id more is refused."""
    ids = [n * 7 % 16 for n in range(4096)]
    with unharmed(lasting, memory_mib=200), ExitStack() as stack:
        wires = [stack.enter_context(Wire(lasting)) for _ in range(4)]
        for wire in wires:
            wire.send(lookup(ids, "wide"))
        for wire in wires:
            answer = wire.answer()
            assert (answer.status, len(answer.body)) == (200, 64 << 20)
            np.testing.assert_array_equal(np.frombuffer(answer.body, "<f4").reshape(4096, -1), WIDE_VD[ids])
        refused = wires[0].send(lookup([*ids, 1], "wide")).answer()
        assert (refused.code, orjson.loads(refused.body)["limit"]) == ("too_many_ids", 4096)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_huge_replies_of_other_types_are_exact(lasting: ServerProcess, dtype: str) -> None:
    """Rows of small whole numbers survive every type but int8's scale, which keeps a constant row as its bias."""
    ids = [3, 15, 0] * 300
    with Wire(lasting) as wire:
        answer = wire.send(lookup(ids, "wide", path=f"lookup?dtype={dtype}")).answer()
    assert (answer.status, answer.headers["x-embedding-dtype"]) == (200, dtype)
    if dtype == "float16":
        rows = np.frombuffer(answer.body, "<f2").astype(np.float32)
    elif dtype == "bfloat16":
        rows = (np.frombuffer(answer.body, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        codes_BX = np.frombuffer(answer.body, np.uint8).reshape(len(ids), -1)
        scale_bias_B2 = codes_BX[:, -8:].copy().view("<f4")
        rows = codes_BX[:, :-8] * scale_bias_B2[:, :1] + scale_bias_B2[:, 1:]
    np.testing.assert_array_equal(rows.reshape(len(ids), -1), WIDE_VD[ids])


def test_a_huge_json_reply_is_exact(lasting: ServerProcess) -> None:
    """Half a million numbers as JSON read back as the same floats."""
    ids = [1, 2, 15] * 40
    with Wire(lasting) as wire:
        body = orjson.dumps({"ids": ids})
        answer = wire.send(request("POST", "/v1/tables/wide/lookup", body, Content_Type="application/json")).answer()
    np.testing.assert_array_equal(np.array(orjson.loads(answer.body)["vectors"], np.float32), WIDE_VD[ids])


def test_a_server_cannot_take_a_port_that_is_taken(lasting: ServerProcess, tmp_path: Path) -> None:
    """The second server says so in one line and ends with 1; the first is unharmed."""
    port = lasting.url.rpartition(":")[2]
    with unharmed(lasting):
        with (
            pytest.raises(AssertionError, match="cannot listen"),
            serving(tmp_path / "store", tmp_path / "b", port=port),
        ):
            pass
        assert "Traceback" not in (tmp_path / "b").read_text()
