"""`embstore lookup`: from a store, from a server, and what is said when neither answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from support.command_line import DIM, VECTORS, WORDS, Here

pytestmark = pytest.mark.slow


def test_lookup_reads_a_store(here: Here, root: Path) -> None:
    """Integers or strings as the table has them, any version, any policy for missing ids; brackets are just text."""
    word = here.json("lookup", "word", *WORDS[:2], "nothing", "--store", root)
    assert word["found"] == [True, True, False]
    np.testing.assert_array_equal(np.float32(word["vectors"]), [*VECTORS[:2], np.zeros(DIM)])
    old = here.json("lookup", "item", "7", "--store", root, "--version", "1")
    np.testing.assert_array_equal(np.float32(old["vectors"]), VECTORS[[7]])
    code, out, err = here("lookup", "word", *WORDS[:2], "nothing", "--store", root)
    assert (code, err) == (0, "")
    for part in (*WORDS[:2], "yes", "no", f"{VECTORS[0, 0]:.4f}"):
        assert part in out
    missing = ("lookup", "item", "1", "99", "--store", root, "--on-missing")
    assert here.fails(1, *missing, "error") == "table 'item' does not have id 99: not in [0, 30)"
    assert here.fails(2, *missing, "odd") == "on_missing must be one of zero, default, error, hash, got 'odd'"


@pytest.mark.parametrize("text", ["x", "1.5", "", "9" * 19, "9" * 5000, "0x10", "1_000"])
def test_an_id_that_is_no_integer_is_a_usage_error(here: Here, root: Path, text: str) -> None:
    """What cannot be an id of the table is told as it was typed."""
    said = here.fails(2, "lookup", "item", "1", text, "--store", root)
    assert said == f"table 'item' has 64-bit integer ids, got {text!r}"


class Answer(BaseHTTPRequestHandler):
    """A server that answers every POST with what its class says."""

    status, body = 200, b""
    key: str | None = None

    def do_POST(self) -> None:
        """The answer; which key came with the question is kept."""
        Answer.key = self.headers["x-api-key"]
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where `Answer` answers."""
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_lookup_asks_a_server(here: Here, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a store the answer comes over HTTP; the server's refusals keep their words."""
    answer = {"table": "item", "version": 7, "vectors": [[1.0, 2.0]], "found": [True]}
    monkeypatch.setattr(Answer, "body", json.dumps(answer).encode())
    assert here.json("lookup", "item", "3", "--url", url) == answer
    monkeypatch.setattr(Answer, "body", json.dumps({"detail": "no table named 'item' is being served"}).encode())
    for status, code in ((404, 4), (422, 1), (503, 1)):
        monkeypatch.setattr(Answer, "status", status)
        assert here.fails(code, "lookup", "item", "3", "--url", url) == "no table named 'item' is being served"


def test_lookup_brings_a_key(here: Here, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`lookup` sends the API key of the file, else of the environment, else none; never one of the command line."""
    answer = {"table": "item", "version": 7, "vectors": [[1.0, 2.0]], "found": [True]}
    monkeypatch.setattr(Answer, "body", json.dumps(answer).encode())
    (tmp_path / "keys").write_text("\ufeff# ours\n\n  of the file \nanother\n")
    lookup = ("lookup", "item", "3", "--url", url)
    here.json(*lookup)
    assert Answer.key is None
    here.json(*lookup, "--api-key-file", tmp_path / "keys")
    assert Answer.key == "of the file"
    monkeypatch.setenv("EMBSTORE_API_KEY", "of the environment")
    here.json(*lookup)
    assert Answer.key == "of the environment"
    here.json(*lookup, "--api-key-file", tmp_path / "keys")
    assert Answer.key == "of the file"
    monkeypatch.setenv("EMBSTORE_API_KEY", "a\nb")
    assert here.fails(2, *lookup) == "EMBSTORE_API_KEY: an API key must be printable ASCII characters"


def test_a_key_that_is_missing_is_told_how_to_give(here: Here, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal for want of a key is the server's, with the two ways to give one."""
    monkeypatch.setattr(Answer, "status", 401)
    monkeypatch.setattr(Answer, "body", json.dumps({"detail": "this call needs an API key"}).encode())
    said = here.fails(1, "lookup", "item", "3", "--url", url)
    assert said == "this call needs an API key; --api-key-file or EMBSTORE_API_KEY gives one"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("", "no API key"),
        ("# only\n \n", "no API key"),
        ("caf\u00e9", "printable ASCII"),
    ],
)
def test_a_file_without_a_key_is_a_usage_error(here: Here, tmp_path: Path, text: str | None, says: str) -> None:
    """The line names the file; nothing is asked. A store needs no key at all."""
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text, "utf-8")
    said = here.fails(2, "lookup", "item", "3", "--api-key-file", path)
    assert said.startswith(f"--api-key-file {path}: ")
    assert says in said
    assert "is for a server" in here.fails(2, "lookup", "item", "3", "--api-key-file", path, "--store", tmp_path)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"7", b"<html>", b'{"vectors": []}', b"\xff"])
@pytest.mark.parametrize("status", [200, 404, 502])
def test_another_server_is_recognised(
    here: Here, url: str, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
) -> None:
    """Whatever answers there, the command says that it is not what it looked for."""
    monkeypatch.setattr(Answer, "status", status)
    monkeypatch.setattr(Answer, "body", body)
    said = here.fails(1, "lookup", "item", "3", "--url", url)
    assert said == f"{url} answers {status}, but not as an embstore server does"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "http://127.0.0.1:99999"])
def test_a_server_that_is_not_there(here: Here, url: str) -> None:
    """No answer is one line that says where none came from."""
    said = here.fails(1, "lookup", "item", "3", "--url", url)
    assert said.startswith(f"no answer from {url}: ")
    assert said.endswith("is the server running?")
