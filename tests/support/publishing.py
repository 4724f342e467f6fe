"""What tests of publishing share: vectors, ids of every kind, and what a refused publication must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.errors import (
    EmbstoreError,
)
from embstore.publish.store import Store
from embstore.store.manifest import Manifest
from embstore.table import Table

ROWS, DIM = 30, 8
VECTORS = np.random.default_rng(7).normal(size=(ROWS, DIM)).astype(np.float32)
WORDS = [f"word {row} \u4e16" for row in range(ROWS)]
NUMBERS = [(-1) ** row * row**9 for row in range(ROWS)]
BUCKETS = {"num_embeddings": ROWS, "embedding_dim": DIM, "num_buckets": 5}


def manifest(table: Table) -> Manifest:
    assert table.manifest is not None
    return table.manifest


def listing(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's name."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def refused(store: Store, kind: type[EmbstoreError], source: Any, **options: Any) -> str:
    """Publishing raises `kind`, in one readable line, and the store stays as it was, byte for byte."""
    before = listing(store.root)
    with pytest.raises(kind) as raised:
        store.publish("item", source, **options)
    assert type(raised.value) is kind
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    assert listing(store.root) == before
    assert store.root.exists() == bool(before)
    return message
