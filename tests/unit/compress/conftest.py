"""Files of vectors and counts, and the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support.compressing import COUNTS, KEYS, VECTORS

from embstore import cli


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A file of vectors whose ids are row numbers."""
    np.save(tmp_path / "vectors.npy", VECTORS)
    return tmp_path / "vectors.npy"


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """A file of counts in row order."""
    np.save(tmp_path / "counts.npy", COUNTS)
    return tmp_path / "counts.npy"


@pytest.fixture
def keyed(tmp_path: Path) -> Path:
    """A file of vectors under string keys."""
    pl.DataFrame({"id": KEYS, "v": VECTORS.tolist()}).write_parquet(tmp_path / "keyed.parquet")
    return tmp_path / "keyed.parquet"


@pytest.fixture
def cli_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `embstore compress` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["embstore", "compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return run
