"""Clients that wait, trickle or never read: they hold little, not for long, and nobody else waits for them."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from support.hostile import (
    NUM,
    WIDE,
    WIDE_VD,
    Background,
    Truncated,
    Wire,
    counted,
    guarded,
    is_right,
    lookup,
    open_files,
    request,
    settles,
    unharmed,
)
from support.serving import ServerProcess

REQUEST_SECONDS, KEEPALIVE = 1, 6
SOAK = int(os.environ.get("EMBSTORE_SOAK", "40000"))
"""Requests of the flood; a million by hand."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with little patience."""
    folder = tmp_path_factory.mktemp("patience")
    with guarded(folder, request_seconds=REQUEST_SECONDS, keepalive_seconds=KEEPALIVE) as running:
        yield running


@contextmanager
def many_files(wanted: int) -> Iterator[None]:
    """This process may open so many descriptors; skipped where the system forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"the system allows {hard:,} open files, the test needs {wanted:,}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def trickle(wires: list[Wire], pieces: list[bytes], pause: float, seconds: float) -> None:
    """Send each connection its bytes one by one, until they are gone, the time is over or the server hangs up."""
    end = time.monotonic() + seconds
    for at in range(max(map(len, pieces))):
        for wire, piece in zip(wires, pieces, strict=True):
            if at < len(piece):
                wire.try_send(piece[at : at + 1])
        if time.monotonic() > end:
            return
        time.sleep(pause)


HEAD = lookup([1, 2, 3]).partition(b"\r\n\r\n")[0]
SLOW = {
    "head": (b"", HEAD),
    "endless head": (HEAD + b"\r\n", b"X-A: 1\r\n" * 1000),
    "body": (HEAD + b"\r\n\r\n", bytes(24)),
    "chunks": (HEAD.replace(b"Content-Length: 24", b"Transfer-Encoding: chunked") + b"\r\n\r\n", b"1\r\n\0\r\n" * 1000),
    "body of another call": (request("PUT", "/v1/tables/item/labels/latest", Content_Length=24), bytes(24)),
    "after an answered request": (lookup([1]) + HEAD[:20], HEAD[20:]),
}


SLOW_TO_BEGIN = ("head", "body of another call")
"""Not begun at all when silent, or answered without its body: idle, then."""


@pytest.mark.parametrize("goes_on", [True, False], ids=["trickling", "silent"])
def test_requests_that_do_not_arrive_are_shed(server: ServerProcess, goes_on: bool) -> None:
    """A request has to arrive whole in `request_seconds`, a byte now and then does not help; others are served."""
    with unharmed(server), Background(server) as others, ExitStack() as stack:
        wires = {case: [stack.enter_context(Wire(server).send(SLOW[case][0])) for _ in range(10)] for case in SLOW}
        if goes_on:
            rest = [SLOW[case][1] for case in SLOW for _ in range(10)]
            trickle([wire for of in wires.values() for wire in of], rest, 0.1, 2.2 * REQUEST_SECONDS)
        begin = time.monotonic()
        for case in sorted(SLOW, key=lambda case: case in SLOW_TO_BEGIN):
            for wire in wires[case]:
                answers = wire.last_words()
                assert all(answer.status < 500 for answer in answers), (case, answers)
            bound = KEEPALIVE if case in SLOW_TO_BEGIN and not goes_on else REQUEST_SECONDS
            assert time.monotonic() - begin < bound + 3, case
    assert others.problems == []
    assert len(others.seconds) > 10


def test_a_request_may_take_its_time_within_the_limit(server: ServerProcess) -> None:
    """Patience counts from a request's first byte, not from the connection's: slow but whole requests are answered."""
    with Wire(server) as wire:
        for n in range(4):
            time.sleep(0.6 * REQUEST_SECONDS)
            sent = lookup([n])
            wire.send(sent[:50])
            time.sleep(0.3 * REQUEST_SECONDS)
            is_right(wire.send(sent[50:]).answer(), [n])


def test_two_thousand_idle_connections_cost_nothing_and_are_closed(server: ServerProcess) -> None:
    """Half have asked something once, half never: lookups go on beside them, and after keep-alive they are gone."""
    count = 2000
    before = server.memory_mib()
    with many_files(count + 500), unharmed(server), Background(server) as others, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(count)]
        for wire in wires[::2]:
            is_right(wire.send(lookup([1])).answer(), [1])
        assert server.memory_mib() - before < 100
        asked = len(others.seconds)
        time.sleep(0.3)
        assert len(others.seconds) > asked
        assert settles(lambda: open_files(server), 200, KEEPALIVE + 10), f"{open_files(server)} still open"
        assert all(wire.closed() for wire in wires)
    assert others.problems == []


def test_a_client_that_never_reads_fills_no_memory(server: ServerProcess) -> None:
    """400 MB of replies asked for and not read: the server stops answering, holds little, and lets go in the end."""
    with unharmed(server, memory_mib=60), Background(server) as others, ExitStack() as stack:
        before = server.memory_mib()
        wires = [stack.enter_context(Wire(server, receive_buffer=4096)) for _ in range(4)]
        for wire in wires:
            wire.socket.settimeout(0.2)
            wire.try_send(lookup([1] * 64, "wide") * 100)
        most = 0.0
        for _ in range(20):
            most = max(most, server.memory_mib() - before)
            time.sleep(0.1)
        assert most < 100
    assert others.problems == []
    assert len(others.seconds) > 10


def test_a_client_that_reads_slowly_gets_everything(server: ServerProcess) -> None:
    """Slow is not dead: while something is read now and then, the reply goes on to its end."""
    with Wire(server, receive_buffer=65_536) as wire:
        wire.send(lookup([3] * 400, "wide"), lookup([5]))
        assert wire.head()[0] == 200
        body, total = b"", 400 * 4 * WIDE
        end = time.monotonic() + 2.5 * REQUEST_SECONDS
        while time.monotonic() < end:
            body += wire.take(100_000)
            time.sleep(0.05)
        body += wire.take(total - len(body))
        assert body == WIDE_VD[[3] * 400].tobytes()
        is_right(wire.answer(), [5])


def test_more_connections_than_allowed_are_turned_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Past `max_connections` a connection is refused or closed at once; those that were there are served on."""
    folder = tmp_path_factory.mktemp("few")
    with guarded(folder, max_connections=20) as few, ExitStack() as stack:
        wires = [stack.enter_context(Wire(few)) for _ in range(20)]
        for wire in wires:
            is_right(wire.send(lookup([1])).answer(), [1])
        for _ in range(30):
            with Wire(few) as extra:
                extra.try_send(lookup([1]))
                assert [answer.status for answer in extra.last_words()] in ([], [503])
        for wire in wires:
            is_right(wire.send(lookup([2])).answer(), [2])
        wires[0].close()
        wires[1].close()
        few.wait_until(lambda: open_files(few) >= 0 and _admits(few), "a place to be free again")
        assert counted(few)[1]["overloaded"] >= 30


def _admits(server: ServerProcess) -> bool:
    with Wire(server) as wire:
        if not wire.try_send(lookup([1])):
            return False
        try:
            return wire.answer().status == 200
        except Truncated:
            return False


def test_a_flood_of_tiny_requests_leaves_nothing_behind(server: ServerProcess) -> None:
    """A hundred thousand requests, most pipelined, some on connections of their own: all right, nothing grows."""
    for _ in range(20):  # what is made once is made now
        pipelined(server, 50)
    with unharmed(server, memory_mib=20):
        wrong: list[str] = []
        threads = [threading.Thread(target=flood, args=(server, SOAK // 2, wrong)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3600)
        assert wrong == []


def flood(server: ServerProcess, count: int, wrong: list[str]) -> None:
    """So many requests, 200 in flight."""
    try:
        for begun in range(0, count, 200):
            pipelined(server, min(200, count - begun))
    except (AssertionError, OSError) as error:
        wrong.append(repr(error))


def pipelined(server: ServerProcess, count: int) -> None:
    """One connection, so many requests at once, each answer right."""
    with Wire(server) as wire:
        wire.send(b"".join(lookup([n % NUM]) for n in range(count)))
        for n in range(count):
            is_right(wire.answer(), [n % NUM])
