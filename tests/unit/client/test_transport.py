"""The client's network: what a call may take of it, and how a call is ended from outside."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import httpcore
import httpx
import pytest
from embstore_client import AsyncEmbeddingClient, ConnectionFailed, EmbeddingClient, Hedge, NotFound, ProtocolError
from embstore_client._core.deadline import AttemptTimeouts, Deadline
from embstore_client._sync.transport import DeadlineStream, _Network
from support.scripted import Either, Recorder, ScriptedServer, item_one, outcome_of, refuse, scripted, stall

LONG_S = 20.0


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


def until(true: Callable[[], Any]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_tls_keeps_the_share_of_connecting() -> None:
    """A server that connects and then stalls in the TLS handshake leaves time to ask another one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deadline = Deadline(4.0)
        timeout = AttemptTimeouts(deadline, connect_share=0.1)["connect"]
        stream = _Network().connect_tcp("127.0.0.1", silent.getsockname()[1], timeout)
        with pytest.raises(httpcore.ConnectTimeout):
            stream.start_tls(ssl.create_default_context(), "localhost", timeout)
        assert deadline.left() > 0


def test_the_addresses_of_a_name_share_the_time_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many dead addresses a name has, they cost no more than connecting may."""
    now, tried = [100.0], []

    def dead(address: tuple[str, int], seconds: float) -> Any:
        tried.append((address[0], seconds))
        now[0] += seconds
        raise TimeoutError

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.0.0.{i}", 80)) for i in range(3)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", dead)
    timeout = AttemptTimeouts(Deadline(6.0, lambda: now[0]), connect_share=0.5)["connect"]
    with pytest.raises(httpcore.ConnectTimeout):
        _Network().connect_tcp("rank.example", 80, timeout)
    assert tried == [("10.0.0.0", 1.0), ("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]


def test_a_server_that_reads_slowly_does_not_outlast_the_timeout() -> None:
    """A request that goes out in drips, each in time, is cut off with the call."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def sip() -> None:
        end = time.monotonic() + LONG_S
        while time.monotonic() < end and theirs.recv(4096):
            time.sleep(0.01)

    reader = threading.Thread(target=sip)
    with theirs:
        reader.start()
        stream = DeadlineStream(ours, None)
        with pytest.raises(httpcore.WriteTimeout):
            stream.write(bytes(1 << 24), AttemptTimeouts(Deadline(0.2))["write"])
        assert reader.is_alive()
        stream.close()
        reader.join(LONG_S)


def test_ending_a_tls_connection_does_not_lay_it_bare() -> None:
    """A connection that another thread ends stays a TLS one: what its own thread still sends is never plain."""
    ours, theirs = socket.socketpair()
    with theirs:
        tls = ssl.create_default_context().wrap_socket(ours, do_handshake_on_connect=False, server_hostname="localhost")
        timeouts = AttemptTimeouts(Deadline(LONG_S))
        stream = DeadlineStream(tls, timeouts["connect"])
        timeouts.cancel()
        assert stream.get_extra_info("ssl_object") is not None
        assert theirs.recv(1) == b""
        with pytest.raises(httpcore.ReadTimeout):
            stream.read(1, timeouts["read"])
        stream.close()


def test_a_name_that_cannot_be_is_not_found(through: Either) -> None:
    """A host name that no resolver takes fails like one that is unknown."""
    (error,) = through("http://a..b:8000", item_one, retries=None)
    assert type(error) is ConnectionFailed


def test_a_part_that_fails_stops_the_others() -> None:
    """The requests of a split call are given up, and their connections closed, once one of them has failed."""
    with (
        scripted(stall, refuse(404, "table_not_found")) as server,
        EmbeddingClient(server.url, max_ids=1, timeout_s=3 * LONG_S) as client,
    ):
        with pytest.raises(NotFound):
            client.lookup("item", [1, 2])
        until(lambda: server.given_up == [0])


CALLS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "one request": ([1], {}),
    "split": ([1, 2], {"max_ids": 1}),
    "hedged": ([1], {"hedge": Hedge()}),
    "split and hedged": ([1, 2], {"max_ids": 1, "hedge": Hedge()}),
}


def _closed_meanwhile(server: ScriptedServer, ids: list[int], options: dict[str, Any]) -> Any:
    """What a call raises when another thread closes its client."""
    client = EmbeddingClient(server.url, timeout_s=LONG_S, **options)
    outcomes: list[Any] = []
    caller = threading.Thread(target=lambda: outcomes.append(outcome_of(lambda: client.lookup("item", ids))))
    caller.start()
    until(lambda: len(server.seen) == len(ids))
    client.close()
    caller.join(LONG_S)
    return outcomes[0]


async def _aclosed_meanwhile(server: ScriptedServer, ids: list[int], options: dict[str, Any]) -> Any:
    """What a call raises when another task closes its client."""
    client = AsyncEmbeddingClient(server.url, timeout_s=LONG_S, **options)
    call = asyncio.create_task(client.lookup("item", ids))
    await asyncio.to_thread(until, lambda: len(server.seen) == len(ids))
    await client.aclose()
    return (await asyncio.gather(call, return_exceptions=True))[0]


@pytest.mark.parametrize("case", CALLS)
def test_closing_ends_the_calls_under_way(through: Either, case: str) -> None:
    """A call whose client is closed meanwhile raises at once, tries nothing more, and leaves no connection behind."""
    ids, options = CALLS[case]
    with scripted(stall, stall) as server:
        if through.kind == "sync":
            error = _closed_meanwhile(server, ids, options)
        else:
            error = asyncio.run(_aclosed_meanwhile(server, ids, options))
        until(lambda: len(server.given_up) == len(ids))
        assert server.connections == len(ids)
    assert type(error) is ConnectionFailed
    assert str(error) == "the client was closed during the call"


BAD_HEADERS = {
    "own": ("Content-Length", "0"),
    "host": ("host", "elsewhere"),
    "empty name": ("", "1"),
    "name with a space": ("x-a ", "1"),
    "name with a colon": ("x:a", "1"),
    "space around": ("x-a", "1 "),
    "new line": ("x-a", "1\r\nx-b: 2"),
    "not ASCII": ("x-a", "\xe5"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_would_break_the_call_is_not_sent(through: Either, case: str) -> None:
    """What an observer cannot add to a request is left out, with the rest of it, and the call goes on."""

    class Tracing(Recorder):
        def headers(self) -> dict[str, str]:
            return dict([("x-trace", "1"), BAD_HEADERS[case]])

    with scripted() as server:
        (rows,) = through(server.url, item_one, observer=Tracing(), timeout_s=LONG_S)
        assert rows.vectors.tolist() == [[1.0] * 4]
        assert "x-trace" not in server.seen[0].headers


def test_a_request_that_cannot_be_sent_is_nobodys_fault(through: Either) -> None:
    """What HTTP itself refuses to send is raised at once, without retries, and no address is blamed."""
    sent, recorder = [], Recorder()

    def refusing(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise httpx.LocalProtocolError("Illegal header value")

    options = {"transport": httpx.MockTransport(refusing), "observer": recorder}
    (error,) = through(["http://one", "http://other"], item_one, **options)
    assert type(error) is ProtocolError
    assert "cannot be sent" in str(error)
    assert len(sent) == 1
    assert recorder.of("attempt_ended", "reason") == ["cancelled"]
