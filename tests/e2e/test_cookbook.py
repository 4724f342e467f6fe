"""docs/cookbook.md does what it says: its commands and programs run against a real server and print what is shown."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.serving import ServerProcess, serving

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"
ADDRESS = "localhost:8000"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of the cookbook, and what the block after it shows as its output."""

    language: str
    code: str
    shown: str | None
    line: int


def _blocks() -> list[Block]:
    """Every block but those of output, in order."""
    text = COOKBOOK.read_text()
    fences = list(_FENCE.finditer(text))
    blocks = []
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] != "text":
            shown = after[2] if after is not None and after[1] == "text" else None
            blocks.append(Block(fence[1], fence[2], shown, text.count("\n", 0, fence.start()) + 1))
    return blocks


BLOCKS = _blocks()
COMMANDS = [block for block in BLOCKS if block.language == "sh"]


def _program(language: str) -> Block:
    (block,) = [block for block in BLOCKS if block.language == language]
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cookbook's commands run, with the store that its Python makes."""
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
    """Every command of the cookbook, in its order, prints exactly what is shown below it."""
    for name in ("bash", "curl", "od", "python3"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    for block in COMMANDS:
        assert block.shown is not None, f"cookbook.md line {block.line}: no output is shown"
        code = _here(block.code, server) if "curl" in block.code else block.code
        printed = _output(["bash", "-euo", "pipefail", "-c", code], folder)
        assert printed.rstrip("\n") == block.shown.rstrip("\n"), f"cookbook.md line {block.line}"


def test_every_command_is_found() -> None:
    """No curl command stands in a block that is not run, and none is lost by the parser."""
    text = COOKBOOK.read_text()
    assert text.count("\ncurl ") == sum(block.code.count("curl ") for block in COMMANDS) >= 15
    assert {block.language for block in BLOCKS} == {"python", "sh", "ts", "go", "py"}


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
