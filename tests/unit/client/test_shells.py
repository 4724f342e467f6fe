"""The two clients over httpx: one set of cases, run through both."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import embstore_client
import httpx
import numpy as np
import pytest
from embstore_client import AsyncEmbeddingClient, EmbeddingClient, ProtocolError, Timeout
from support.client_shells import WIDTH, Both, contract, vector


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


def outcome(value: Any) -> Any:
    """A result as plain values, to compare."""
    if isinstance(value, embstore_client.Rows):
        facts = (value.version, value.missing, value.dtype, value.release, value.request_id)
        return value.vectors.tolist(), str(value.vectors.dtype), value.found.tolist(), facts
    if isinstance(value, embstore_client.ManyRows):
        return value.release, {table: outcome(rows) for table, rows in value.items()}
    return value


CASES: dict[str, Callable[[Any], Any]] = {
    "ids": lambda client: client.lookup("item", [3, 14, 15]),
    "empty": lambda client: client.lookup("item", []),
    "missing": lambda client: client.lookup("item", np.arange(90, 110)),
    "keys": lambda client: client.lookup("item", ["se", "norway"]),
    "float16": lambda client: client.lookup("item", [3], dtype="float16"),
    "version": lambda client: client.lookup("item", [3], version=3),
    "label": lambda client: client.lookup("item", [3], label="stable"),
    "error": lambda client: client.lookup("item", [300], on_missing="error"),
    "key error": lambda client: client.lookup("item", ["norway"], on_missing="error"),
    "no table": lambda client: client.lookup("other", [3]),
    "bad ids": lambda client: client.lookup("item", [1.5]),
    "bad version": lambda client: client.lookup("item", [3], version=4),
    "bad timeout": lambda client: client.lookup("item", [3], timeout_s=0),
    "many": lambda client: client.lookup_many({"item": [3], "user": [4, 400]}),
    "many of a release": lambda client: client.lookup_many({"item": [3]}, release="r-1"),
    "many of none": lambda client: client.lookup_many({}),
    "tables": lambda client: client.tables(),
    "ready": lambda client: client.ready(),
}


@pytest.mark.parametrize("case", CASES)
def test_both_clients_agree(case: str) -> None:
    """The same call through either client sends the same bytes, and returns or raises the same."""

    def attempt(kind: str) -> Any:
        sent = []

        def handler(request: httpx.Request) -> httpx.Response:
            sent.append((request.method, request.url, request.headers.raw, request.content))
            return contract(request)

        try:
            return outcome(Both(kind, lambda: 100.0)(handler, CASES[case])), sent
        except Exception as error:
            return type(error), str(error), {k: str(v) for k, v in vars(error).items()}, sent

    assert attempt("sync") == attempt("async")


def test_rows_come_in_the_order_of_the_ids(through: Both) -> None:
    """Each id has its own vector at its own place, and the unknown one is zero and said so."""
    rows = through(contract, lambda client: client.lookup("item", [14, 3, 300, 14]))
    assert rows.vectors.tolist() == [vector(14), vector(3), [0.0] * WIDTH, vector(14)]
    assert rows.found.tolist() == [True, True, False, True]
    assert (rows.version, rows.missing, rows.request_id) == (7, 1, "q-1")


def test_keys_come_as_rows_too(through: Both) -> None:
    """String keys give the same binary rows."""
    rows = through(contract, lambda client: client.lookup("item", ["se", "norway"]))
    assert rows.vectors.tolist() == [vector("se"), [0.0] * WIDTH]
    assert rows.found.tolist() == [True, False]


def test_an_empty_call_has_the_tables_width(through: Both) -> None:
    """No ids give vectors of shape (0, d), whether or not they say that they are integers."""

    lengths = []

    def handler(request: httpx.Request) -> httpx.Response:
        lengths.append(request.headers["content-length"])
        return contract(request)

    for ids in (np.arange(0), []):
        assert through(handler, lambda client, ids=ids: client.lookup("item", ids)).vectors.shape == (0, WIDTH)
    assert lengths[0] == "0"


def test_vectors_are_the_received_bytes(through: Both) -> None:
    """No layer of either client copies an answer that arrived in one piece."""
    body = np.arange(2 * WIDTH, dtype="<f4").tobytes()

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=body, headers=contract(request).headers)

    vectors = through(handler, lambda client: client.lookup("item", [1, 2])).vectors
    assert np.shares_memory(vectors, np.frombuffer(body, np.uint8))


def test_the_client_introduces_itself(through: Both) -> None:
    """Every call names client, key, time allowed and address, and asks for an uncompressed answer."""
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return contract(request)

    options = {"base_url": "https://rank.example:8443/", "api_key": "s3cret", "timeout_s": 0.25}
    through.clock = lambda: 100.0
    through(handler, lambda client: client.lookup("item", [1]), **options)
    through(handler, lambda client: client.lookup("item", [1], timeout_s=0.0101), **options)
    headers = seen[0].headers
    assert headers["user-agent"] == f"embstore-client/{embstore_client.__version__}"
    assert headers["authorization"] == "Bearer s3cret"
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == "rank.example:8443"
    assert [request.headers["x-request-timeout-ms"] for request in seen] == ["250", "11"]
    assert str(seen[0].url) == "https://rank.example:8443/v1/tables/item/lookup"


def test_no_key_sends_no_authorization(through: Both) -> None:
    """Without `api_key`, nothing is claimed."""

    def handler(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        return contract(request)

    assert through(handler, lambda client: client.ready())


def test_a_path_prefix_is_kept(through: Both) -> None:
    """A service behind a prefix is reached under it, and names in the path stay quoted."""
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return httpx.Response(404)

    with pytest.raises(embstore_client.NotFound):
        through(handler, lambda client: client.lookup("a/b ö", [1]), base_url="http://host/embeddings/")
    assert seen == [b"/embeddings/v1/tables/a%2Fb%20%C3%B6/lookup"]


def test_the_clients_own_on_missing_is_the_default(through: Both) -> None:
    """`on_missing` given to the client holds for every call that does not choose its own."""
    with pytest.raises(embstore_client.IdOutOfRange):
        through(contract, lambda client: client.lookup("item", [300]), on_missing="error")
    rows = through(contract, lambda client: client.lookup("item", [300], on_missing="zero"), on_missing="error")
    assert rows.missing == 1


def test_a_redirect_is_not_followed(through: Both) -> None:
    """Ids and keys go to `base_url` and nowhere else."""
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(307, headers={"location": "http://elsewhere/"})

    with pytest.raises(ProtocolError, match="pointing at http://elsewhere/"):
        through(handler, lambda client: client.lookup("item", [1]), api_key="s3cret")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("fault", "cls"),
    [
        (httpx.ConnectError("refused"), embstore_client.ConnectionFailed),
        (httpx.ReadError("reset"), embstore_client.ConnectionFailed),
        (httpx.RemoteProtocolError("disconnected"), embstore_client.ConnectionFailed),
        (httpx.ProxyError("no"), embstore_client.ConnectionFailed),
        (httpx.ConnectTimeout("late"), embstore_client.Timeout),
        (httpx.ReadTimeout("late"), embstore_client.Timeout),
        (httpx.WriteTimeout("late"), embstore_client.Timeout),
        (httpx.PoolTimeout("late"), embstore_client.Timeout),
        (httpx.DecodingError("gzip"), embstore_client.ProtocolError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_faults_of_the_network_have_our_names(through: Both, fault: Exception, cls: type[Exception]) -> None:
    """Whatever httpx raises arrives as ours, says where, and keeps its cause."""

    def handler(request: httpx.Request) -> httpx.Response:
        del request
        raise fault

    with pytest.raises(cls, match=r"http://127\.0\.0\.1:8000") as raised:
        through(handler, lambda client: client.lookup("item", [1]))
    assert raised.value.__cause__ is fault
    assert type(raised.value) is cls


def over_the_network(kind: str, url: str, call: Callable[[Any], Any]) -> Any:
    """One call through real sockets."""
    if kind == "sync":
        with EmbeddingClient(url) as client:
            return call(client)

    async def run() -> Any:
        async with AsyncEmbeddingClient(url) as client:
            return await call(client)

    return asyncio.run(run())


def test_nobody_there_is_not_ready_and_fails_a_lookup(through: Both) -> None:
    """A real refused connection is ConnectionFailed for a lookup and False for `ready`."""
    with socket.socket() as taken:  # bound but not listening: the port refuses, and nobody else can have it
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert over_the_network(through.kind, url, lambda client: client.ready()) is False
        with pytest.raises(embstore_client.ConnectionFailed, match=url):
            over_the_network(through.kind, url, lambda client: client.lookup("item", [1]))


def test_a_silent_server_times_out(through: Both) -> None:
    """A real server that takes the call and never answers costs no more than the timeout."""
    with socket.socket() as silent:  # listening, so the kernel connects; nobody reads
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Timeout, match=r"within 0\.05 s"):
            over_the_network(through.kind, url, lambda client: client.lookup("item", [1], timeout_s=0.05))


def test_not_ready_is_false(through: Both) -> None:
    """A 503 from /readyz, or none in time, is False; a page from something else raises."""

    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late", request=request)

    assert through(lambda _: httpx.Response(503, json={"reasons": []}), lambda client: client.ready()) is False
    assert through(late, lambda client: client.ready()) is False
    with pytest.raises(embstore_client.NotFound):
        through(lambda _: httpx.Response(404, html="<h1>hello</h1>"), lambda client: client.ready())


class Trickle(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes a byte at a time, each taking one second of the given clock."""

    def __init__(self, clock: list[float], size: int) -> None:
        self.clock = clock
        self.left = size
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        while self.left:
            self.left -= 1
            self.clock[0] += 1.0
            yield b"\0"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def test_a_trickling_answer_does_not_outlast_the_timeout(through: Both) -> None:
    """The timeout is for the whole call: a server that always sends one more byte is cut off."""
    clock = [100.0]
    stream = Trickle(clock, 1000)

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=stream, headers=contract(request).headers)

    def call(client: Any) -> Any:
        client._core.clock = lambda: clock[0]
        return client.lookup("item", [1], timeout_s=5)

    with pytest.raises(Timeout, match="within 5 s") as raised:
        through(handler, call)
    assert raised.value.timeout_s == 5.0
    assert stream.left == 1000 - 6
    assert stream.closed


def test_each_phase_may_take_what_is_left(through: Both) -> None:
    """Connecting, writing and reading share one budget: what one has used, the next does not get."""
    clock = [100.0]
    left = []

    def handler(request: httpx.Request) -> httpx.Response:
        timeout = request.extensions["timeout"]
        left.append(timeout.get("connect"))
        clock[0] += 0.75
        left.append(timeout.get("read"))
        clock[0] += 10
        left.append(timeout["read"])
        assert timeout.get("other") is None
        assert set(timeout) == {"connect", "read", "write", "pool"}
        clock[0] -= 10
        return contract(request)

    def call(client: Any) -> Any:
        client._core.clock = lambda: clock[0]
        return client.lookup("item", [1])

    through(handler, call)
    assert left == [1.0, 0.25, 0.001]


@pytest.mark.parametrize("client_class", [EmbeddingClient, AsyncEmbeddingClient])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, ValueError, "must start with http://"),
        ({"base_url": "ftp://host"}, ValueError, "must start with http://"),
        ({"base_url": "unix://run/embstore.sock"}, ValueError, "a socket by its absolute path, unix:///"),
        ({"base_url": "unix:///"}, ValueError, "a socket by its absolute path, unix:///"),
        ({"base_url": "unix:///run/" + "x" * 104}, ValueError, "a socket's path has at most 107 bytes"),
        ({"base_url": "http://"}, ValueError, "name a host"),
        ({"base_url": "http://host:port"}, ValueError, "not a URL"),
        ({"base_url": "http://host/?a=b"}, ValueError, r"without \? or #"),
        ({"base_url": "http://host/#a"}, ValueError, r"without \? or #"),
        ({"timeout_s": 0}, ValueError, "above 0"),
        ({"timeout_s": -1.0}, ValueError, "above 0"),
        ({"timeout_s": float("nan")}, ValueError, "above 0"),
        ({"timeout_s": float("inf")}, ValueError, "at most 86400 s"),
        ({"timeout_s": None}, TypeError, "a number above 0"),
        ({"timeout_s": "1"}, TypeError, "a number above 0"),
        ({"timeout_s": True}, TypeError, "a number above 0"),
        ({"on_missing": "skip"}, ValueError, "zero, default, error, hash"),
        ({"api_key": ""}, ValueError, "printable ASCII"),
    ],
    ids=str,
)
def test_a_client_that_cannot_work_is_not_made(
    client_class: type, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Wrong settings raise at once, and the message says what would be right."""
    with pytest.raises(error, match=message):
        client_class(**options)


@pytest.mark.parametrize("options", [{"api_key": "s3cret\n"}, {"base_url": "http://u:s3cret@host"}], ids=["key", "url"])
def test_secrets_are_not_repeated(options: dict[str, str]) -> None:
    """No message and no repr holds a secret."""
    with pytest.raises(ValueError, match="api_key") as raised:
        EmbeddingClient(**options)
    assert "s3cret" not in str(raised.value)
    with EmbeddingClient(api_key="s3cret") as client:
        assert repr(client) == "EmbeddingClient('http://127.0.0.1:8000', timeout_s=1)"
    assert repr(AsyncEmbeddingClient(api_key="s3cret")) == "AsyncEmbeddingClient('http://127.0.0.1:8000', timeout_s=1)"


def test_both_clients_take_the_same_arguments() -> None:
    """Every public method exists in both clients with the same arguments; only closing has the async name."""

    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name.removeprefix("a") if name == "aclose" else name: list(inspect.signature(method).parameters)
            for name, method in vars(cls).items()
            if inspect.isfunction(method) and (not name.startswith("_") or name == "__init__")
        }

    assert methods(EmbeddingClient) == methods(AsyncEmbeddingClient)


def test_the_public_list_is_the_namespace() -> None:
    """`__all__` is sorted, complete, and every name in it exists."""
    public = {
        name
        for name, value in vars(embstore_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(embstore_client.__all__) == public | {"__version__"}
    assert list(embstore_client.__all__) == sorted(embstore_client.__all__)


def test_importing_the_client_brings_no_server_and_no_torch() -> None:
    """A fresh interpreter that imports the client has neither torch nor any other package of this project."""
    script = (
        "import sys, embstore_client; heavy = {'torch', 'server', 'embstore', 'loadtest', 'fastapi', 'numba'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
