"""Several requests on one connection, some of them refused, unread, cut or late: answers in order, nobody stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from support.hostile import NUM, WIDE_VD, Wire, counted, guarded, is_right, lookup, request, settles, unharmed
from support.serving import ServerProcess

MAX_BODY = 150_000
LOOKUP = "/v1/tables/item/lookup"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that takes bodies of 150 kB and closes idle connections after a second."""
    with guarded(tmp_path_factory.mktemp("pipelines"), max_body_bytes=MAX_BODY, keepalive_seconds=1) as running:
        for _ in range(3):  # large replies take their memory now
            with Wire(running) as wire:
                wire.send(lookup([1] * 1000, "wide")).answer()
        yield running


@pytest.fixture(autouse=True)
def _unharmed(server: ServerProcess) -> Iterator[None]:
    with unharmed(server):
        yield


@pytest.mark.parametrize("first", [[3, 4], [1] * 12_000])
def test_a_refused_body_behind_a_lookup_is_answered_second(server: ServerProcess, first: list[int]) -> None:
    """The 413 waits for its turn, whether the lookup before it is answered at once or in a thread."""
    too_large = request("POST", LOOKUP, bytes(MAX_BODY + 8), **{"Content-Type": "application/octet-stream"})
    with Wire(server) as wire:
        sender = wire.send_aside(lookup(first) + too_large)
        is_right(wire.answer(), first)
        refused = wire.answer()
        assert (refused.status, refused.closes) == (413, True)
        sender.join()


def test_a_body_that_ends_while_a_reply_is_unread_is_answered(server: ServerProcess) -> None:
    """The reply before it fills every buffer; when it is read, the next request is looked up."""
    ids = [n % NUM for n in range(15_000)]  # 120 kB of body: several reads
    whole = lookup(ids)
    with Wire(server, receive_buffer=4096) as wire:
        wire.send(lookup([1] * 1000, "wide") + whole[:200])
        time.sleep(0.3)
        sender = wire.send_aside(whole[200:])
        time.sleep(0.3)
        is_right(wire.answer(), [1] * 1000, WIDE_VD)
        is_right(wire.answer(), ids)
        sender.join()


def test_a_large_body_does_not_count_against_the_next_head(server: ServerProcess) -> None:
    """What a connection has sent before says nothing about the size of a head in two pieces."""
    ids = [n % NUM for n in range(15_000)]
    large, small = lookup(ids), lookup([5])
    with Wire(server) as wire:
        head = large.index(b"\r\n\r\n") + 4
        wire.send(large[:head])
        time.sleep(0.1)
        is_right(wire.send(large[head:]).answer(), ids)
        wire.send(small[:20])
        time.sleep(0.1)
        is_right(wire.send(small[20:]).answer(), [5])


def test_a_connection_that_only_sends_blank_lines_is_idle(server: ServerProcess) -> None:
    """They begin no request, so they keep no connection open."""
    with Wire(server) as wire:
        wire.send(b"\r\n")
        assert wire.closed()


def test_every_request_of_a_lost_connection_is_counted_once(server: ServerProcess) -> None:
    """A hundred lookups behind an unread reply: answered, or given up as disconnected."""
    before, refused = counted(server)
    wire = Wire(server, receive_buffer=4096).send(lookup([1] * 1000, "wide") + lookup([1, 2, 3]) * 100)
    time.sleep(0.3)
    wire.reset()

    def missing() -> int:
        answered, rejected = counted(server)
        return 101 - (answered - before) - (rejected["disconnected"] - refused["disconnected"])

    assert settles(missing, 0)
    assert missing() == 0


def test_a_half_closed_client_with_half_a_request_leaves_nothing(server: ServerProcess) -> None:
    """What came whole is answered; room kept for the body that never comes is free again."""
    ids = [1] * 12_000
    whole = lookup(ids)
    for _ in range(5):
        with Wire(server) as wire:
            wire.send(whole, lookup([2]), whole[: len(whole) // 2]).half_close()
            is_right(wire.answer(), ids)
            is_right(wire.answer(), [2])
            assert wire.closed()
