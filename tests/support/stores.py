"""What tests of the store share: its contents, its folders, ways to damage it, and how it must refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.errors import (
    VerificationFailed,
)
from embstore.publish.store import Store
from embstore.store.local import FileStore

ROWS, DIM = 40, 8


FIRST = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)


SECOND = np.random.default_rng(2).normal(size=(ROWS, DIM)).astype(np.float32)


KEYS = [f"key {row}" for row in range(ROWS)]


def folder(store: FileStore, version: int = 2) -> Path:
    return store.root / "tables" / "item" / "versions" / str(version)


def listing(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's name."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON file with one change."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_arrays(store: FileStore, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the arrays of version 2 and make the manifest's size and digest fit them again."""
    from embstore.store.tensor_file import map_file, read_arrays, write_arrays

    path = folder(store) / "arrays.safetensors"
    arrays = {name: array.copy() for name, array in read_arrays(map_file(path), "").items()}
    change(arrays)
    with path.open("wb") as file:
        write_arrays(file, arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {"name": path.name, "num_bytes": path.stat().st_size, "sha256": digest}
    edit(folder(store) / "manifest.json", lambda m: m.update(files=[entry]))


def refused(store: Store, *says: str) -> str:
    """Version 2 is refused with one readable line that names it and `says`; version 1 is as it was."""
    with pytest.raises(VerificationFailed) as raised:
        store.load("item", 2)
    message = str(raised.value)
    for part in ("item", "version 2", *says):
        assert part in message
    assert "\n" not in message
    assert len(message) < 400
    np.testing.assert_array_equal(store.load("item", 1).lookup(np.arange(ROWS)), FIRST)
    return message
