"""Servers that are not there, refuse, lie, die and come back, and generators that are stopped: one line or a count."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from support.driving import SPEC, drive, scenario
from support.ill_server import reply, rows, scripted, server_context
from support.serving import ServerProcess, serving

import embstore
from loadtest.errors import LoadError, ScenarioError
from loadtest.run import worker_pool
from loadtest.scenario.model import IdDistribution, RequestSpec
from loadtest.scenario.target import list_tables

KEY = "a-lookup-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server that wants an API key, with two versions of a table."""
    folder = tmp_path_factory.mktemp("faults")
    store = embstore.open_store(folder / "store")
    for _ in range(2):
        store.publish("item", np.ones((100, 4), np.float32))
    (folder / "keys").write_text(f"# for load tests\n{KEY}\n")
    with serving(folder / "store", folder / "log", api_keys_file=folder / "keys") as running:
        yield running


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key, behind a comment, as an editor saves it that begins with a byte order mark."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(f"\ufeff# mine\n\n{KEY}\n", "utf-8")
    return str(file)


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        return port


def one_line(error: pytest.ExceptionInfo[LoadError]) -> str:
    """The message, which is one."""
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_no_server_is_one_line() -> None:
    """Where, and why not."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(LoadError) as error:
        worker_pool.run(scenario(url))
    assert one_line(error).startswith(f"cannot connect to {url}: ")


def test_what_a_server_may_say_beforehand(server: ServerProcess, key_file: str, tmp_path: Path) -> None:
    """No key, a wrong key, a file without one or without anything, tables that are not there: what to do about each."""
    asked = scenario(server.url)
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "wrong").write_text("another-key\n")
    (tmp_path / "words").write_text("schlüssel\n", "utf-8")
    refused = f"GET {server.url}/v1/tables: 401: the server wants another API key; api_key_file names a file with one"
    for file, said in (
        ("", refused),
        (str(tmp_path / "wrong"), refused),
        (str(tmp_path / "empty"), f"api_key_file: {tmp_path / 'empty'}: no API key found; put one on each line"),
        (
            str(tmp_path / "words"),
            f"api_key_file: {tmp_path / 'words'}: an API key must be printable ASCII characters",
        ),
        (str(tmp_path / "no"), f"api_key_file: {tmp_path / 'no'}: No such file or directory"),
    ):
        with pytest.raises(LoadError) as error:
            worker_pool.run(replace(asked, api_key_file=file))
        assert one_line(error) == said
    with pytest.raises(LoadError) as error:
        worker_pool.run(replace(asked, api_key_file=key_file, requests=(RequestSpec(tables=("item", "users")),)))
    assert one_line(error) == "the server has no table users; it has item"
    assert list_tables(replace(asked, api_key_file=key_file)) == {"item": 100}
    hot = RequestSpec(ids=IdDistribution(kind="hot", hot_ids=100))
    with pytest.raises(ScenarioError, match=r"^requests.0.ids.hot_ids must be below the 100 ids, got 100$"):
        list_tables(replace(asked, api_key_file=key_file, requests=(hot,)))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply(b"<h1>hello</h1>"), "the reply is no list of tables; is this an embstore server?"),
        (reply(b"{}", "404 Not Found"), "404: is this an embstore server?"),
        (reply(b'{"detail": "tables are\\nloaded"}', "503 Unavailable"), "503: tables are loaded"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not speak HTTP as it should: "),
    ],
    ids=["a page", "not found", "not ready", "no http"],
)
def test_servers_of_another_kind_are_one_line(answer: bytes, said: str) -> None:
    """What came instead of the list of tables."""
    with scripted(lambda _: answer) as url, pytest.raises(LoadError) as error:
        worker_pool.run(replace(scenario(url), url=f"{url}/else"))
    assert said in one_line(error)


def test_certificates_are_verified_unless_told_otherwise(tmp_path: Path) -> None:
    """A certificate that signs itself is refused; named as trusted, or with insecure, the load runs over TLS."""
    context, certificate = server_context(tmp_path)
    with scripted(lambda _: rows(), context) as url:
        asked = scenario(url, rate=40.0)
        with pytest.raises(LoadError) as error:
            worker_pool.run(asked)
        assert one_line(error).startswith(f"TLS with {url} failed: ")
        assert one_line(error).endswith("; ca names the file of a certificate to trust, insecure trusts any")
        for trusting in (replace(asked, ca=str(certificate)), replace(asked, insecure=True)):
            _, total = drive(trusting)
            assert (total.offered, total.statuses, total.errors) == (20, {200: 20}, {})
        with pytest.raises(LoadError, match=r"does not speak HTTP|cannot connect"):
            worker_pool.run(replace(asked, url=url.replace("https", "http")))
        with pytest.raises(LoadError, match="ca: no certificates in "):
            worker_pool.run(replace(asked, ca=str(tmp_path / "key.pem")))
    with scripted(lambda _: rows()) as url, pytest.raises(LoadError, match=r"TLS with https://.* failed: "):
        worker_pool.run(scenario(url.replace("http", "https"), insecure=True))


def test_wrong_answers_are_counted_and_the_first_is_shown() -> None:
    """Every third reply names other rows than were asked for: mislabelled, no success, and a mark says how."""
    with scripted(lambda number: rows(said=9) if number % 3 == 0 else rows()) as url:
        result = worker_pool.run(scenario(url, rate=60.0, timeout=30.0))
    assert result.total().errors == {"mislabelled": 10}
    assert result.total().statuses == {200: 20}
    (mark,) = (mark for mark in result.marks if not mark.ok)
    assert (mark.name, mark.detail) == ("mislabelled", "mislabelled: expected 10 rows, got X-Embedding-Shape 9,4")


def test_a_version_that_is_gone_is_counted(server: ServerProcess, key_file: str) -> None:
    """A version that is taken away in the middle of the run: 404 from then on, beside the replies before."""
    store = Path(server.store)
    number = embstore.open_store(store).publish("item", np.ones((100, 4), np.float32), label=None)
    folder = store / "tables" / "item" / "versions" / str(number)
    asked = scenario(server.url, api_key_file=key_file, seconds=2.0, rate=40.0, timeout=30.0)
    asked = replace(asked, requests=(replace(SPEC, version=str(number)),))
    server.wait_until(lambda: _serves(server, number), f"version {number}")
    vanishing = threading.Timer(1.0, shutil.rmtree, [folder])
    result = worker_pool.run(asked, on_begin=lambda _: vanishing.start())
    total = result.total()
    assert total.offered == 80
    assert total.statuses[200] > 0
    assert total.statuses[404] > 0
    assert total.statuses[200] + total.statuses[404] == 80
    assert {(seen.table, seen.version) for seen in result.versions} == {("item", str(number))}


def _serves(server: ServerProcess, number: int) -> bool:
    import httpx

    url = f"{server.url}/v1/tables/item/versions/{number}/lookup"
    return httpx.post(url, json={"ids": [1]}, headers={"X-API-Key": KEY}).status_code == 200
