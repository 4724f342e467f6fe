"""The client's connections: used again, never more than there may be, given back however a call ends."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from embstore_client import AsyncEmbeddingClient, EmbeddingClient, Retries, Timeout
from embstore_client._core.connections import KEEPALIVE_S, MAX_CONNECTIONS, Endpoint, IdleConnections
from support.scripted import (
    Either,
    Exchange,
    ScriptedServer,
    answer,
    hang_up,
    item_one,
    outcome_of,
    refuse,
    scripted,
    stall,
)

pytestmark = pytest.mark.slow

LONG_S = 20.0
ONCE = Retries(max_attempts=1)


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


def all_left(server: ScriptedServer) -> bool:
    """Whether the clients have closed every connection, some time from now."""
    end = time.monotonic() + LONG_S
    while any(thread.is_alive() for thread in server._threads[1:]) and time.monotonic() < end:
        time.sleep(0.005)
    return time.monotonic() < end


def test_one_connection_serves_calls_in_turn_and_ends_with_the_client(through: Either) -> None:
    """Ten calls, one connection; closing the client closes it."""
    with scripted() as server:
        outcomes = through(server.url, *[item_one] * 10)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes)
        assert server.connections == 1
        assert all_left(server)


def test_a_connection_that_the_server_closed_is_not_used_again(through: Either) -> None:
    """An idle connection that ended meanwhile costs a new one, and no error."""

    def last(exchange: Exchange) -> None:
        answer(exchange)
        hang_up(exchange)

    def later(client: Any) -> Any:
        assert all_left(server)  # it has hung up: a call before that would meet it in the act, and go out again
        return item_one(client)

    with scripted(last, last) as server:
        outcomes = through(server.url, item_one, later, later)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes)
        assert server.connections == 3


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_crowd_of_calls_shares_the_connections(kind: str) -> None:
    """Three times as many calls as connections: all are answered, on no more of them than there may be."""
    num_calls = 3 * MAX_CONNECTIONS
    with scripted() as server:
        if kind == "sync":
            with EmbeddingClient(server.url, timeout_s=LONG_S) as client, ThreadPoolExecutor(num_calls) as pool:
                rows = list(pool.map(lambda _: item_one(client), range(num_calls)))
        else:

            async def run() -> list[Any]:
                async with AsyncEmbeddingClient(server.url, timeout_s=LONG_S) as client:
                    return await asyncio.gather(*[item_one(client) for _ in range(num_calls)])

            rows = asyncio.run(run())
        assert len(rows) == len(server.seen) == num_calls
        assert server.connections <= MAX_CONNECTIONS
        assert all_left(server)


def test_calls_that_end_badly_give_their_place_back() -> None:
    """As many calls as there are places time out at once: the next ones find room, their connections are closed."""

    async def run(server: ScriptedServer) -> list[Any]:
        async with AsyncEmbeddingClient(server.url, retries=ONCE) as client:
            calls = [client.lookup("item", [1], timeout_s=0.5) for _ in range(MAX_CONNECTIONS)]
            failed = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, Timeout) for outcome in failed)
            return await asyncio.gather(*[client.lookup("item", [2], timeout_s=LONG_S) for _ in range(10)])

    def stall_ones(exchange: Exchange) -> None:
        (stall if exchange.body[0] == 1 else answer)(exchange)

    with scripted(*[stall_ones] * 2 * MAX_CONNECTIONS) as server:
        assert len(asyncio.run(run(server))) == 10
        assert all_left(server)
        assert len(server.given_up) == sum(exchange.body[0] == 1 for exchange in server.seen)


def test_calls_that_time_out_one_by_one_give_their_place_back() -> None:
    """The same of the sync client, whose places are few here."""
    with scripted(*[stall] * 3) as server, EmbeddingClient(server.url, retries=ONCE) as client:
        transport: Any = client._executor._transport
        for _ in range(MAX_CONNECTIONS - 1):
            transport._room.acquire()
        for _ in range(3):
            assert isinstance(outcome_of(lambda: client.lookup("item", [1], timeout_s=0.1)), Timeout)
        assert not isinstance(outcome_of(lambda: client.lookup("item", [1], timeout_s=LONG_S)), Exception)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_finds_no_connection_free_says_so(kind: str) -> None:
    """It is the client's own limit, not the server, that such a call has waited for."""
    said = f"all {MAX_CONNECTIONS} connections of this client were in use, for 0.1 s"
    with scripted() as server:
        if kind == "sync":
            with EmbeddingClient(server.url) as client:
                transport: Any = client._executor._transport
                for _ in range(MAX_CONNECTIONS):
                    transport._room.acquire()
                with pytest.raises(Timeout, match=said):
                    client.lookup("item", [1], timeout_s=0.1)
        else:

            async def run() -> None:
                async with AsyncEmbeddingClient(server.url) as client:
                    transport: Any = client._executor._transport
                    for _ in range(MAX_CONNECTIONS):
                        await transport._room.acquire()
                    with pytest.raises(Timeout, match=said):
                        await client.lookup("item", [1], timeout_s=0.1)

            asyncio.run(run())
        assert not server.seen


class Kept:
    """A connection that can be used, or not."""

    def __init__(self, usable: bool = True) -> None:
        self.usable = usable

    def is_available(self) -> bool:
        return self.usable

    def has_expired(self) -> bool:
        return False


def test_what_is_too_many_grows_old() -> None:
    """The connection used last is used next; those at the bottom are closed when they have waited too long."""
    now, spoilt = [0.0], []
    idle: IdleConnections[Kept] = IdleConnections(lambda: now[0])
    here, there = (Endpoint((b"http", host, 80), None) for host in (b"a", b"b"))
    first, second, third = Kept(), Kept(), Kept()
    assert [idle.put(here, one) for one in (first, second)] == [None, None]
    assert idle.take(there, spoilt) is None
    assert idle.take(here, spoilt) is second
    now[0] = KEEPALIVE_S + 1
    assert idle.put(here, second) is first
    third.usable = False
    assert idle.put(here, third) is third
    second.usable = False
    assert idle.take(here, spoilt) is None
    assert spoilt == [second]
    assert idle.clear() == []


def test_a_unix_socket_carries_calls_as_tcp_does(through: Either, tmp_path: Path) -> None:
    """Connections are kept; one that the server closed meanwhile is not used again."""

    def last(exchange: Exchange) -> None:
        answer(exchange)
        hang_up(exchange)

    def later(client: Any) -> Any:
        assert all_left(server)
        return item_one(client)

    with scripted(answer, last, uds=tmp_path / "s") as server:
        outcomes = through(server.url, item_one, item_one, later, item_one)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes)
        assert server.connections == 2
        assert {exchange.headers["host"] for exchange in server.seen} == {"localhost"}


def test_a_silent_unix_socket_ends_in_time(through: Either, tmp_path: Path) -> None:
    """The deadline of a call holds there too, and the connection is closed."""
    with scripted(stall, uds=tmp_path / "s") as server:
        (outcome,) = through(server.url, item_one, timeout_s=0.2)
        assert isinstance(outcome, Timeout)
        assert all_left(server)
        assert server.given_up == [0]


def test_sockets_of_several_servers_are_told_apart(through: Either, tmp_path: Path) -> None:
    """A connection to one is never used for the other: what one refuses is asked of the other."""
    with scripted(*[refuse(503)] * 9, uds=tmp_path / "a") as ill, scripted(uds=tmp_path / "b") as well:
        outcomes = through([ill.url, well.url], *[item_one] * 12)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes)
        assert len(well.seen) == 12
