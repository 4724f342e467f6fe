"""The demo: made-up clicks in which training finds what was planted."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from embstore.common.progress import Silent
from embstore.publish.store import open_store
from embstore.train.config import load_config
from embstore.train.demo import make_clicks, write_demo
from embstore.train.run import train

pytestmark = pytest.mark.slow


def test_demo_is_the_same_for_a_seed(tmp_path: Path) -> None:
    """A seed decides every byte; ids are sparse 64-bit integers and strings, popularity has a long tail."""
    paths = [write_demo(tmp_path / name, seed=seed).parent / "clicks.parquet" for name, seed in (("a", 1), ("b", 1))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    clicks = pl.read_parquet(paths[0])
    assert not clicks.equals(make_clicks(2))
    assert clicks["user_id"].min() > 1 << 33  # type: ignore[operator]
    assert clicks["item_id"].str.contains("^sku-[0-9a-f]{5}$").all()
    counts = clicks["item_id"].value_counts(sort=True)["count"]
    assert counts.head(300).sum() > 0.4 * len(clicks)


def test_demo_trains(tmp_path: Path) -> None:
    """The demo's config makes two compressed tables that rank clearly better than popularity."""
    config = load_config(write_demo(tmp_path))
    result = train(config, open_store(tmp_path / "store"), report=Silent(), device="cpu")
    assert {name: table.scheme for name, table in result.tables.items()} == {"user": "memcom", "item": "qr"}
    assert result.metrics["ndcg@10"] > 1.6 * result.popularity["ndcg@10"]
