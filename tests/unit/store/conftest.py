"""What tests of the store share: one with two versions of one table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.stores import FIRST, SECOND

from embstore.publish.store import Store, open_store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with versions 1 and 2 of table `item`, label `latest` at 2."""
    root = tmp_path_factory.mktemp("published") / "store"
    for vectors in (FIRST, SECOND):
        open_store(root).publish("item", vectors)
    return root


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Store:
    """A copy of it to do anything with."""
    return open_store(shutil.copytree(published, tmp_path / "store"))
