"""The command line: what it prints for people and for programs, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import serving

import embstore
from embstore import cli, errors
from embstore.publish import Publication, Store, open_store
from embstore.schemes import MEmCom

ROWS, DIM = 30, 4
VECTORS = np.random.default_rng(11).normal(size=(ROWS, DIM)).astype(np.float32)
WORDS = ["caf\u00e9", "[/red]", *(f"word {row}" for row in range(2, ROWS))]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("EMBSTORE_")}


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `embstore` as a user does: a process of its own."""
    line = [sys.executable, "-m", "embstore", *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=100)


class Here:
    """Run `embstore` in this process, which has already imported what it needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        for name in os.environ:
            if name.startswith("EMBSTORE_"):
                monkeypatch.delenv(name)

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", ["embstore", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *arguments: object) -> Any:
        """What it prints for programs, when all goes well."""
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def fails(self, code: int, *arguments: object) -> str:
        """The one line on stderr with which it ends with this exit code, nothing on stdout."""
        ended, out, err = self(*arguments)
        return one_line(ended, out, err, code)


def one_line(ended: int, out: str, err: str, code: int) -> str:
    """The message of a failed command."""
    assert (ended, out) == (code, ""), err
    assert err.startswith("embstore: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.removeprefix("embstore: ").removesuffix("\n")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command line, in this process."""
    return Here(monkeypatch, capsys)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store: `item` with two versions of integers, `word` with one of strings, the last two in release 1."""
    root = tmp_path_factory.mktemp("cli") / "store"
    store = open_store(root)
    store.publish("item", VECTORS)
    item, word = MEmCom(ROWS, DIM, num_buckets=5), VECTORS
    store.publish_release({"item": Publication(item, metrics={"auc": 0.75}), "word": Publication(word, ids=WORDS)})
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """A copy of it to do anything with."""
    return Path(shutil.copytree(published, tmp_path / "store"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of vectors."""
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


# ---- as a user runs it -----------------------------------------------------------------------------------------------


def test_from_a_file_to_vectors(tmp_path: Path, file: Path) -> None:
    """Publish a file, look its ids up: two commands, the same numbers."""
    root = tmp_path / "new"
    done = command("publish", "item", file, "--store", root)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "published item version 1, label latest moved to it\n",
        "",
    )
    done = command("lookup", "item", 3, 0, 99, "--json", "--store", root)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer == {
        "table": "item",
        "version": 1,
        "vectors": [*VECTORS[[3, 0]].tolist(), [0.0] * DIM],
        "found": [True, True, False],
    }


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (1, ["publish", "item", "/no/such/file.npy"], "/no/such/file.npy: no such file"),
        (2, ["publish", "item"], "Missing argument 'file'."),
        (3, ["inspect", "item"], "table 'item' version 2: arrays.safetensors does not have the SHA-256"),
        (4, ["inspect", "user"], "no table named 'user' in the store STORE; it has item, word"),
        (5, ["publish", "word", "FILE"], "table 'word': label 'latest' points at version 1, whose ids are strings"),
    ],
)
def test_exit_codes_of_the_process(code: int, arguments: list[str], says: str, root: Path, file: Path) -> None:
    """1 failure, 2 usage, 3 verification failed, 4 not found, 5 conflict: the process ends with it and one line."""
    path = root / "tables/item/versions/2/arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = command(*(file if part == "FILE" else part for part in arguments), EMBSTORE_STORE=str(root))
    assert one_line(done.returncode, done.stdout, done.stderr, code).startswith(says.replace("STORE", str(root)))


def test_usage_on_an_empty_line() -> None:
    """Without arguments the program tells what it can do."""
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("publish", "list", "inspect", "promote", "serve", "lookup", "config"):
        assert name in done.stdout


def test_the_version_of_the_program(here: Here) -> None:
    """It says which it is; a command's own --version still means a version of a table."""
    assert here("--version") == (0, f"embstore {embstore.__version__}\n", "")
    assert "No such option" in here.fails(2, "list", "--version")


def test_a_closed_pipe_is_no_drama(root: Path) -> None:
    """`embstore list | head` ends without a word when its reader has seen enough."""
    line = [sys.executable, "-m", "embstore", "list", "--store", str(root), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(line, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_listing_needs_no_torch(root: Path) -> None:
    """`list` is quick: it reads manifests and imports nothing that computes."""
    code = (
        "import sys; sys.argv = ['embstore', 'list', '--store', sys.argv[1]]; from embstore.cli import main; main();"
        "assert not {'torch', 'numba', 'fastapi', 'polars'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, root], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- each command ----------------------------------------------------------------------------------------------------


def test_publish_says_what_it_did(here: Here, root: Path, file: Path) -> None:
    """The number, and the label that moved, if one did."""
    publish = ("publish", "item", file, "--store", root)
    dims = {"embedding_dim": DIM, "embedding_dim_before": DIM}
    unmoved = dims | {"embedding_dim_before": None}
    assert here.json(*publish) == {"table": "item", "version": 3, "label": "latest"} | dims
    assert here.json(*publish, "--no-promote") == {"table": "item", "version": 4, "label": None} | unmoved
    assert here.json(*publish, "--label", "canary") == {"table": "item", "version": 5, "label": "canary"} | unmoved
    assert here(*publish, "--no-promote") == (0, "published item version 6\n", "")
    assert {name: at.version for name, at in Store(root).labels("item").items()} == {"latest": 3, "canary": 5}


def test_publish_says_that_vectors_have_another_length(here: Here, root: Path, tmp_path: Path) -> None:
    """It is published, and the line names both lengths: of the version that the label left, and of the new one."""
    np.save(tmp_path / "short.npy", VECTORS[:, :3])
    line = ("publish", "item", tmp_path / "short.npy", "--store", root)
    said = "published item version 3, label latest moved to it, embedding_dim 4 -> 3\n"
    assert here(*line) == (0, said, "")
    assert here(*line) == (0, "published item version 4, label latest moved to it\n", "")
    assert here(*line, "--label", "new") == (0, "published item version 5, label new moved to it\n", "")


def test_ids_of_another_type_are_published_on_request(here: Here, root: Path, file: Path) -> None:
    """A label that serves strings does not move to integers unless asked to; nothing else is in the way."""
    line = ("publish", "word", file, "--store", root)
    said = here.fails(5, *line)
    assert "whose ids are strings, and those of the new one are integers" in said
    assert "--new-id-type" in said
    assert (Store(root).versions("word"), Store(root).resolve("word")) == ([1], 1)
    assert here(*line, "--no-promote") == (0, "published word version 2\n", "")
    assert here(*line, "--new-id-type") == (0, "published word version 3, label latest moved to it\n", "")


def test_a_list_fits_a_narrow_terminal(here: Here, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment stays in one line of 80 columns, beside millions of ids and hundreds of megabytes."""
    manifest = root / "tables/item/versions/2/manifest.json"
    raw = json.loads(manifest.read_bytes()) | {"created": "2026-07-31T10:11:12.345+00:00", "num_ids": 12_345_678}
    raw["files"][0]["num_bytes"] = 987_654_321
    manifest.write_text(json.dumps(raw))
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = here("list", "--store", root)
    assert (code, out.count("2026-07-31 10:11 ")) == (0, 1)
    (line,) = (line for line in out.splitlines() if "2026-07-31" in line)
    for part in ("item", "memcom", "latest", "12,345,678", "987,654,321"):
        assert part in line


def test_list_shows_every_version_and_release(here: Here, root: Path) -> None:
    """For programs every version with its labels and sizes; for people a table; a bad one with its reason in both."""
    (root / "tables/item/versions/1/manifest.json").write_text('{"format_version": "[/red]"}')
    listed = here.json("list", "--store", root)
    bad, item, word = listed["versions"]
    assert set(bad) == {"table", "version", "error"}
    assert "format version '[/red]'" in bad["error"]
    assert (item["table"], item["version"], item["labels"], item["scheme"]) == ("item", 2, ["latest"], "memcom")
    assert (word["table"], word["ids"], word["dim"]) == ("word", ROWS, DIM)
    files = root / "tables/word/versions/1/arrays.safetensors"
    assert word["num_bytes"] == files.stat().st_size
    assert [(r["release"], r["tables"]) for r in listed["releases"]] == [("1", {"item": 2, "word": 1})]
    code, out, err = here("list", "--store", root)
    assert (code, err) == (0, "")
    for part in ("memcom", "latest", "item 2, word 1", "[/red]"):
        assert part in out


def test_an_empty_store_lists_nothing(here: Here, tmp_path: Path) -> None:
    """A store nobody published to is empty, not an error, and is not created by looking; where it was is said."""
    no = tmp_path / "no"
    missing = f"there is no store {no}: no such folder; --store or EMBSTORE_STORE names another"
    assert here("list", "--store", no) == (0, f"{missing}\n", "")
    assert here.json("list", "--store", no) == {"versions": [], "releases": []}
    for arguments in (["inspect", "item"], ["promote", "item", "1"], ["lookup", "item", "1"]):
        assert here.fails(4, *arguments, "--store", no) == missing
    assert not no.exists()
    no.mkdir()
    assert here("list", "--store", no) == (0, f"no tables in the store {no}\n", "")
    assert here.fails(4, "inspect", "item", "--store", no) == f"no table named 'item' in the store {no}; it has none"


def test_inspect_tells_all(here: Here, root: Path) -> None:
    """Scheme, sizes, ratio, digests, metrics of a version, named by number or label; every byte was verified."""
    about = here.json("inspect", "item", "--store", root)
    assert (about["version"], about["scheme"], about["parameters"]["num_buckets"]) == (2, "memcom", 5)
    assert (about["full_bytes"], about["scheme_bytes"]) == (4 * ROWS * DIM, 4 * 5 * DIM + 4 * ROWS)
    assert about["ratio"] == round(about["full_bytes"] / about["scheme_bytes"], 2)
    assert about["metrics"] == {"auc": 0.75}
    assert about["verified"] is True
    assert here.json("inspect", "item", "--store", root, "--version", "1")["scheme"] == "full"
    code, out, err = here("inspect", "item", "--store", root, "--version", "latest")
    assert (code, err) == (0, "")
    for part in ("memcom", "num_buckets=5", "auc=0.75"):
        assert part in out


def test_promote_moves_a_label_to_what_it_verified(here: Here, root: Path) -> None:
    """By number or by another label; a version that does not verify keeps the label where it was."""
    store = Store(root)
    promote = ("promote", "item", "--store", root)
    assert here.json(*promote, "1") == {"table": "item", "label": "latest", "version": 1}
    assert here(*promote, "2", "--label", "stable") == (0, "label stable of item points at version 2\n", "")
    assert here.json(*promote, "stable")["version"] == store.resolve("item") == 2
    os.truncate(root / "tables/item/versions/1/arrays.safetensors", 100)
    assert "version 1: arrays.safetensors has 100 bytes" in here.fails(3, *promote, "1")
    assert here.fails(4, *promote, "9") == "table 'item' has no version 9; it has 1, 2"
    assert here.fails(4, *promote, "gold") == "table 'item' has no label 'gold'; it has latest, stable"
    assert "a label cannot be a number" in here.fails(2, *promote, "2", "--label", "7")
    assert {name: at.version for name, at in store.labels("item").items()} == {"latest": 2, "stable": 2}


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


@pytest.mark.parametrize(
    ("made", "reason"), [(False, "there is no such folder"), (True, "the store has no tables yet")]
)
def test_serving_nothing_is_said_once(tmp_path: Path, made: bool, reason: str) -> None:
    """The log names the path that is waited for; what is published there later is served."""
    root = tmp_path / "store"
    if made:
        root.mkdir()
    with serving(root, tmp_path / "log", ready=False) as server:
        (said,) = (event for event in server.events() if event["event"].startswith("nothing to serve yet"))
        assert (said["level"], said["store"], said["reason"]) == ("warning", str(root), reason)
        open_store(root).publish("item", VECTORS)
        server.wait_ready()
        assert server.stop() == 0
        events = [event["event"] for event in server.events()]
    assert events.count("nothing to serve yet: waiting for tables") == 1
    with serving(root, tmp_path / "again") as server:
        assert not any(event["event"].startswith("nothing to serve") for event in server.events())


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
    """Of the file, else of the environment, else none; never of the command line."""
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
    assert here.fails(2, *lookup) == "EMBSTORE_API_KEY: a key is made of printable ASCII characters"


def test_a_key_that_is_missing_is_told_how_to_give(here: Here, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's refusal, and the two ways to bring one."""
    monkeypatch.setattr(Answer, "status", 401)
    monkeypatch.setattr(Answer, "body", json.dumps({"detail": "this call needs an API key"}).encode())
    said = here.fails(1, "lookup", "item", "3", "--url", url)
    assert said == "this call needs an API key; --api-key-file or EMBSTORE_API_KEY gives one"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file or directory"), ("", "no key"), ("# only\n \n", "no key"), ("caf\u00e9", "printable ASCII")],
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "No such command 'bogus'."),
        (["--bogus"], "No such option: --bogus"),
        (["list", "--bogus"], "No such option: --bogus"),
        (["lookup", "item"], "Missing argument 'ids'."),
        (["promote", "item"], "Missing argument 'version'."),
        (["serve", "--port", "abc"], "settings: port: input should be a valid integer"),
        (["serve", "--port", "99999"], "settings: port: input should be less than or equal to 65535 (got '99999')"),
        (["serve", "--device", "tpu"], "settings: device: input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        (["serve", "--max-ids", "0", "--poll-seconds", "0"], "settings: "),
        (["list", "--store", "s3://bucket/x"], "object storage is not supported yet, give a folder"),
        (["publish", "../x", "FILE"], "table name '../x' is not allowed"),
        (["publish", "item", "FILE", "--label", "a/b"], "label name 'a/b' is not allowed"),
    ],
    ids=" ".join,
)
def test_usage_errors_name_the_flag(here: Here, file: Path, arguments: list[str], says: str) -> None:
    """What was wrong with the command is said in one line that names it, with exit code 2."""
    assert says in here.fails(2, *(file if part == "FILE" else part for part in arguments))


@pytest.mark.parametrize("arguments", [["list"], ["inspect", "item"], ["publish", "item", "FILE"]], ids=" ".join)
def test_a_store_that_cannot_be_is_a_failure(here: Here, file: Path, arguments: list[str]) -> None:
    """A store below a file is refused in one line."""
    said = here.fails(1, *(file if part == "FILE" else part for part in arguments), "--store", file / "store")
    assert said.endswith("failed: Not a directory")


def test_a_bad_file_changes_nothing(here: Here, root: Path, tmp_path: Path) -> None:
    """NaN is a failed verification, rubbish a failure; no version comes of either."""
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan))
    assert "NaN or infinity" in here.fails(3, "publish", "item", tmp_path / "nan.npy", "--store", root)
    for suffix in (".npy", ".parquet", ".safetensors", ".txt"):
        (tmp_path / f"bad{suffix}").write_text("rubbish\non two lines")
        assert f"bad{suffix}: " in here.fails(1, "publish", "item", tmp_path / f"bad{suffix}", "--store", root)
    assert Store(root).versions("item") == [1, 2]


def test_config_shows_settings_by_precedence(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment before file before default, and no password in what is shown."""
    (tmp_path / "server.toml").write_text('port = 1111\nmax_ids = 77\nredis = "redis://me:secret@cache:6379/0"\n')
    monkeypatch.setenv("EMBSTORE_CONFIG", str(tmp_path / "server.toml"))
    monkeypatch.setenv("EMBSTORE_PORT", "2222")
    settings = here.json("config")
    assert (settings["port"], settings["max_ids"], settings["host"]) == (2222, 77, "127.0.0.1")
    code, out, err = here("config")
    assert (code, err) == (0, "")
    assert "2222" in out
    for shown in (out, json.dumps(settings)):
        assert "secret" not in shown
        assert "cache:6379" in shown


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EMBSTORE_PORTT", "PORT"),
        ("EMBSTORE_PROT", "PORT"),
        ("embstore_max_id", "MAX_IDS"),
        ("EMBSTORE_STOER", "STORE"),
        ("EMBSTORE_API_KEY_FILE", "API_KEYS_FILE"),
    ],
)
def test_a_misspelt_variable_is_a_usage_error(
    here: Here, monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    """A setting that would have been ignored is named, with the one that was meant, before anything is served."""
    monkeypatch.setenv(variable, "1")
    says = f"settings: there is no setting {variable}; did you mean EMBSTORE_{meant}?"
    assert here.fails(2, "config") == says
    assert here.fails(2, "serve", "--port", "0") == says


def test_other_variables_are_left_alone(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs read, and what an orchestrator sets for a service of our name, is no setting misspelt."""
    names = ("DATA", "API_KEY", "TEST_EXEC", "TEST_PORT", "VERSION", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP")
    for name in names:
        monkeypatch.setenv(f"EMBSTORE_{name}", "1")
    monkeypatch.setenv("embstore_port", "2222")
    monkeypatch.setenv("PROT", "1")
    assert here.json("config")["port"] == 2222


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "prot = 1", "\udcff"])
def test_a_bad_settings_file_is_a_usage_error(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A file that is no TOML, or names what is no setting, is told in one line."""
    (tmp_path / "server.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("EMBSTORE_CONFIG", str(tmp_path / "server.toml"))
    assert here.fails(2, "config").startswith("settings")


def test_serve_shows_every_setting(here: Here) -> None:
    """`embstore serve --help` has an option for each setting, with its help and default."""
    from server.settings import Settings

    code, out, _ = here("serve", "--help")
    assert code == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in out


def test_a_flag_that_is_no_setting_is_a_usage_error(here: Here) -> None:
    """A misspelt flag is refused in one line, with the flags that are like it."""
    assert here.fails(2, "serve", "--prot", "1") == "No such option: --prot (Possible options: --host, --port)"


def test_every_error_has_its_exit_code() -> None:
    """The documented codes, by class: conflicts too."""
    expected = {errors.ConfigError: 2, errors.VerificationFailed: 3, errors.NotFound: 4, errors.Conflict: 5}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.EmbstoreError):
            code = next((code for base, code in expected.items() if issubclass(kind, base)), 1)
            assert cli.exit_code(kind.__new__(kind)) == code
