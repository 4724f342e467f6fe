"""The command line in tests: in a process of its own or in this one, and the store its commands work on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from embstore import cli

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
