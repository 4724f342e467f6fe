"""What tests of publishing share."""

from __future__ import annotations

from pathlib import Path

import pytest

from embstore.publish.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that does not exist yet."""
    return open_store(tmp_path / "store")
