"""The cookbook and the page on Open Inference do what they say, against a server of the store that the cookbook makes.

Commands and programs run as they are, and print what is shown.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documents import ROOT, Block, blocks
from support.serving import ServerProcess, serving

COOKBOOK, OPEN_INFERENCE = ROOT / "docs" / "cookbook.md", ROOT / "docs" / "open-inference.md"
ADDRESS = "localhost:8000"
BLOCKS = blocks(COOKBOOK)
COMMANDS = [block for block in [*BLOCKS, *blocks(OPEN_INFERENCE)] if block.language == "sh"]


def _program(language: str) -> Block:
    (block,) = [block for block in BLOCKS if block.language == language]
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, with the store that the cookbook's Python makes."""
    path = tmp_path_factory.mktemp("cookbook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        exec(compile(_program("python").code, str(COOKBOOK), "exec"), {})
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """A server of that store."""
    with serving(folder / "store", folder / "log") as running:
        yield running


def _here(code: str, server: ServerProcess) -> str:
    """The same, for the server of this test."""
    assert ADDRESS in code, code
    return code.replace(ADDRESS, server.url.removeprefix("http://"))


def _output(command: list[str], folder: Path, timeout: float = 30.0) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=timeout, check=False)
    assert run.returncode == 0, (command, run.stdout, run.stderr)
    return run.stdout


def test_commands_print_what_is_shown(server: ServerProcess, folder: Path) -> None:
    """Every command of the pages, in its order, prints exactly what is shown below it."""
    for name in ("bash", "curl", "od", "python3"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    for block in COMMANDS:
        assert block.shown is not None, f"{block}: no output is shown"
        code = _here(block.code, server) if "curl" in block.code else block.code
        printed = _output(["bash", "-euo", "pipefail", "-c", code], folder)
        assert printed.rstrip("\n") == block.shown.rstrip("\n"), str(block)


def test_every_command_is_found() -> None:
    """No curl command stands in a block that is not run, and none is lost by the parser."""
    text = COOKBOOK.read_text() + OPEN_INFERENCE.read_text()
    assert text.count("\ncurl ") == sum(block.code.count("curl ") for block in COMMANDS) >= 16
    assert {block.language for block in BLOCKS} == {"python", "sh", "ts", "go", "py"}


def test_tritonclient_runs_as_shown(server: ServerProcess) -> None:
    """The Python of the page on Open Inference gets vectors of both tables, from one release, and what is missing."""
    names: dict[str, object] = {}
    for block in blocks(OPEN_INFERENCE):
        if block.language == "python":
            exec(compile(block.code.replace(ADDRESS, server.url.removeprefix("http://")), str(block), "exec"), names)
    result, client = names["result"], names["client"]
    try:
        assert result.as_numpy("item").tolist()[0] == [3, 3.25, 3.5, 3.75]  # type: ignore[attr-defined]
        assert result.as_numpy("user").tolist() == [[42, -42]]  # type: ignore[attr-defined]
        assert result.get_response()["parameters"]["release"] == "2"  # type: ignore[attr-defined]
    finally:
        client.close()  # type: ignore[attr-defined]


def test_typescript_prints_what_is_shown(server: ServerProcess, folder: Path) -> None:
    """The TypeScript program runs as it is, in a Node that strips types."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = [int(part) for part in _output([node, "--version"], folder).strip().lstrip("v").split(".")]
    if version < [22, 6]:
        pytest.skip(f"node {'.'.join(map(str, version))} does not run TypeScript, 22.6 does")
    block = _program("ts")
    (folder / "lookup.mts").write_text(_here(block.code, server))
    assert _output([node, "--experimental-strip-types", "lookup.mts"], folder) == block.shown


def test_go_prints_what_is_shown(server: ServerProcess, folder: Path) -> None:
    """The Go program runs as it is."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed")
    block = _program("go")
    (folder / "main.go").write_text(_here(block.code, server))
    assert _output([go, "run", "main.go"], folder, timeout=200) == block.shown
