"""The command line as a user runs it: exit codes, usage, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import DIM, ENVIRONMENT, VECTORS, Here, command, one_line
from typer.main import get_command

import embstore
from embstore import cli

pytestmark = pytest.mark.slow


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


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command and group, as it is typed."""
    for name, found in group.commands.items():
        yield (*path, name)
        if hasattr(found, "commands"):
            yield from commands(found, (*path, name))


@pytest.mark.parametrize("arguments", list(commands(get_command(cli.app))), ids=" ".join)
def test_every_command_has_help(here: Here, arguments: tuple[str, ...]) -> None:
    """`--help` of a command names the command, ends with 0 and says nothing on stderr."""
    code, out, err = here(*arguments, "--help")
    assert (code, err) == (0, "")
    usage = out.partition("Usage: ")[2].splitlines()[0]
    assert f" {' '.join(arguments)} [OPTIONS]" in usage


def test_listing_needs_no_torch(root: Path) -> None:
    """`list` is quick: it reads manifests and imports nothing that computes."""
    code = """
import sys
from embstore.cli import main
sys.argv = ["embstore", "list", "--store", sys.argv[1]]
try:
    main()
finally:
    assert not {"torch", "numba", "fastapi", "polars"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, root], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "No such command 'bogus'."),
        (["--bogus"], "No such option: --bogus"),
        (["list", "--bogus"], "No such option: --bogus"),
        (["lookup", "item"], "Missing argument 'ids'."),
        (["promote", "item"], "Missing argument 'version'."),
        (["serve", "--port", "abc"], "settings: port: input should be a valid integer, unable to parse"),
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
