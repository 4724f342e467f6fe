"""More work than there is room for: some is answered right, the rest is told so at once, everything is counted."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from support.hostile import Wire, counted, is_right, lookup, publish, request, settles, unharmed
from support.serving import ServerProcess, serving

import embstore
from embstore.schemes import DHE

QUEUE = 3
WAITING_BYTES = 64 << 20
SLOW_IDS = [n * 37 % 1000 for n in range(8000)]
"""A network computes these, which takes tens of milliseconds."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, np.ndarray]]:
    """A server that does one long lookup at a time and lets three wait; and what SLOW_IDS are."""
    folder = tmp_path_factory.mktemp("overload")
    store = embstore.open_store(publish(folder / "store"))
    store.publish("slow", DHE(1000, 16, num_hashes=512, hidden=(512, 512)))
    env = {"EMBSTORE_MAX_CONCURRENCY": "1", "EMBSTORE_MAX_QUEUED_REQUESTS": str(QUEUE), "EMBSTORE_CACHE": "off"}
    env["EMBSTORE_MAX_WAITING_BYTES"] = str(WAITING_BYTES)
    with serving(folder / "store", folder / "log", env=env) as server:
        with Wire(server) as wire:
            answer = wire.send(lookup(SLOW_IDS, "slow")).answer()
        slow_BD = np.frombuffer(answer.body, "<f4").reshape(len(SLOW_IDS), 16)
        table = store.load("slow")
        np.testing.assert_array_equal(slow_BD, table.lookup(np.array(SLOW_IDS)))
        yield server, slow_BD


@pytest.fixture
def server(served: tuple[ServerProcess, np.ndarray]) -> Iterator[ServerProcess]:
    """That server; after each test it answers rightly and has let go of everything."""
    with unharmed(served[0], memory_mib=120):
        yield served[0]


SLOW = lookup(SLOW_IDS, "slow")


def test_what_does_not_fit_is_told_to_come_back(
    server: ServerProcess, served: tuple[ServerProcess, np.ndarray]
) -> None:
    """Of twenty long lookups at once those that fit are right, the others get 429 with Retry-After at once."""
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(20)]
        for wire in wires:
            wire.send(SLOW)
        answers = [wire.answer() for wire in wires]
        after = [wire.send(lookup([5])).answer() for wire in wires]
    admitted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(admitted) >= QUEUE + 1
    assert len(refused) >= 8
    for answer in admitted:
        assert answer.body == served[1].tobytes()
    for answer in refused:
        assert (answer.status, answer.code, int(answer.headers["retry-after"]) >= 1) == (429, "overloaded", True)
        assert not answer.closes
    for answer in after:
        is_right(answer, [5])


class Crowd:
    """Connections that send one long lookup after the other, so that the queue stays full."""

    def __init__(self, server: ServerProcess, connections: int = 10) -> None:
        self.server = server
        self.statuses: Counter[int] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(connections)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        assert settles(lambda: not self.statuses[429], 0)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        with Wire(self.server) as wire:
            while not self._stop.is_set():
                self.statuses[wire.send(SLOW).answer().status] += 1
                time.sleep(0.002)


def test_probes_answer_while_the_queue_is_full(server: ServerProcess) -> None:
    """Nobody restarts a server for being busy: alive, ready and measurable within a second, all the time."""
    with Crowd(server) as crowd, Wire(server) as wire:
        slowest: dict[str, float] = {}
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for path in ("/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready"):
                begin = time.monotonic()
                answer = wire.send(request("GET", path)).answer()
                slowest[path] = max(slowest.get(path, 0.0), time.monotonic() - begin)
                assert answer.status == 200, (path, answer)
        assert wire.send(request("GET", "/metrics")).answer().status == 200
    assert max(slowest.values()) < 1, slowest
    assert crowd.statuses[200] > 0
    assert set(crowd.statuses) == {200, 429}


@pytest.mark.parametrize("milliseconds", [0, 1])
def test_work_nobody_waits_for_is_dropped(server: ServerProcess, milliseconds: int) -> None:
    """Under load a lookup whose deadline passes before its turn gets 504, and is counted as one."""
    before = counted(server)[1]
    with ExitStack() as stack:
        ahead = [stack.enter_context(Wire(server)).send(SLOW) for _ in range(QUEUE - 1)]
        time.sleep(0.01)
        with Wire(server) as wire:
            answer = wire.send(lookup([1], X_Request_Timeout_Ms=milliseconds)).answer()
        assert [wire.answer().status for wire in ahead] == [200] * len(ahead)
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    after = counted(server)[1]
    assert after["deadline"] - before["deadline"] == 1


def test_a_deadline_that_passes_during_the_work_is_one_too(server: ServerProcess) -> None:
    """A long lookup that has five milliseconds gets 504, not vectors that come too late, and is counted once."""
    before = counted(server)
    with Wire(server) as wire:
        answer = wire.send(lookup(SLOW_IDS, "slow", X_Request_Timeout_Ms=5)).answer()
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert settles(lambda: counted(server)[1]["deadline"] <= before[1]["deadline"], 0)
    after = counted(server)
    assert (after[0] - before[0], after[1]["deadline"] - before[1]["deadline"]) == (0, 1)


def test_a_deadline_that_is_kept_changes_nothing(server: ServerProcess) -> None:
    """Enough time is enough."""
    with Wire(server) as wire:
        is_right(wire.send(lookup([1, 2], X_Request_Timeout_Ms=60_000)).answer(), [1, 2])


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "", "1e3", "0x10", "+5", "1 2", "9" * 30, "9" * 5000, "inf"])
def test_deadlines_that_are_no_milliseconds_are_malformed(server: ServerProcess, value: str) -> None:
    """The header is whole milliseconds; anything else is 400 and names the header."""
    with Wire(server) as wire:
        answer = wire.send(lookup([1], X_Request_Timeout_Ms=value)).answer()
        assert (answer.status, answer.code) == (400, "malformed_request")
        assert "X-Request-Timeout-Ms" in json.loads(answer.body)["detail"]
        is_right(wire.send(lookup([1])).answer(), [1])


KINDS = {
    200: lookup([1, 2]),
    400: lookup([1], X_Request_Timeout_Ms="soon"),
    404: lookup([1], "nothing"),
    413: request("POST", "/v1/tables/item/lookup", Content_Type="application/octet-stream", Content_Length=1 << 30),
    415: request("POST", "/v1/tables/item/lookup", b"x", Content_Type="text/plain"),
    422: lookup([10**9], path="lookup?on_missing=error"),
    504: lookup([1], X_Request_Timeout_Ms=0),
}
REASON = {
    400: "malformed",
    404: "not_found",
    413: "too_large",
    415: "malformed",
    422: "id_out_of_range",
    429: "overloaded",
    504: "deadline",
}


def test_every_request_is_counted_once(server: ServerProcess) -> None:
    """Answered, refused for whatever reason, or left by its client: the counters add up to what was sent."""
    answered, rejected = counted(server)
    statuses: Counter[int] = Counter()
    lock = threading.Lock()
    num_left = 12

    def ask(seed: int) -> None:
        for number in range(60):
            sent = list(KINDS.values())[(number + seed) % len(KINDS)] if number % 10 else SLOW
            with Wire(server) as wire:
                status = wire.send(sent).answer().status
            with lock:
                statuses[status] += 1

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for number in range(num_left):
        with Wire(server) as wire:
            wire.send(SLOW[: -8 * (number + 1)])
            time.sleep(0.01)
    for thread in threads:
        thread.join(60)

    def grown() -> tuple[int, dict[str, int]]:
        answered_now, rejected_now = counted(server)
        return answered_now - answered, {reason: n - rejected[reason] for reason, n in rejected_now.items()}

    assert sum(statuses.values()) == 360
    expected: Counter[str] = Counter()
    for status, number in statuses.items():
        if status != 200:
            expected[REASON[status]] += number
    expected["disconnected"] = num_left
    assert settles(lambda: abs(360 + num_left - grown()[0] - sum(grown()[1].values())), 0, 5), (grown(), statuses)
    assert grown() == (statuses[200], {reason: expected[reason] for reason in rejected})


def test_whoever_leaves_the_queue_is_counted_as_gone(server: ServerProcess) -> None:
    """Clients that hang up while they wait are counted once, as gone or as answered; nothing is stuck."""
    answered, rejected = counted(server)
    for _ in range(5):
        wires = [Wire(server).send(SLOW) for _ in range(QUEUE + 1)]
        time.sleep(0.01)
        for wire in wires:
            wire.reset()

        def ended() -> int:
            answered_now, rejected_now = counted(server)
            return answered_now - answered + sum(rejected_now.values()) - sum(rejected.values())

    assert settles(lambda: 5 * (QUEUE + 1) - ended(), 0), ended()
    assert ended() == 5 * (QUEUE + 1)
    with Wire(server) as wire:
        text = wire.send(request("GET", "/metrics")).answer().body.decode()
    assert "embstore_inflight_requests 0.0" in text
    assert "embstore_queue_depth 0.0" in text


def test_bodies_that_arrive_fill_no_memory(server: ServerProcess) -> None:
    """Bodies of 4 MB, a hundred at a time but for their last byte: some are held, the rest refused, all forgotten."""
    size = (4 << 20) - 8
    head = request("POST", "/v1/tables/item/lookup", Content_Type="application/octet-stream", Content_Length=size)
    before, most = server.memory_mib(), 0.0
    for _ in range(4):
        with ExitStack() as stack:
            for _ in range(100):
                wire = stack.enter_context(Wire(server))
                wire.socket.settimeout(0.5)
                wire.try_send(head + bytes(size - 1))
                most = max(most, server.memory_mib() - before)
            with Wire(server) as probe:
                assert probe.send(request("GET", "/livez")).answer().status == 200
    assert most < 2 * (WAITING_BYTES >> 20), f"{most:.0f} MiB"
