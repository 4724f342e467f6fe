"""What tests of commands share: the command line in this process, a store and a file for it to work on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.command_line import DIM, ROWS, VECTORS, WORDS, Here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command line, in this process."""
    return Here(monkeypatch, capsys)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store: `item` with two versions of integers, `word` with one of strings, the last two in release 1."""
    root = tmp_path_factory.mktemp("cli") / "store"
    from embstore.publish.publication import Publication
    from embstore.publish.store import open_store
    from embstore.schemes import MEmCom

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
