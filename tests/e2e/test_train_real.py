"""Real data, where EMBSTORE_DATA says it is: the popularity baselines are the published ones to the last digit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from embstore.common.progress import Silent
from embstore.publish.store import open_store
from embstore.train.config import load_config
from embstore.train.data import read_dataset
from embstore.train.evaluate import Judge
from embstore.train.run import train

CONFIGS = Path(__file__).parents[2] / "configs"

pytestmark = pytest.mark.skipif(
    not Path(os.environ.get("EMBSTORE_DATA") or "/nonexistent").is_dir(),
    reason="EMBSTORE_DATA names no folder with the public data sets",
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gowalla", {"recall@20": 0.0416, "ndcg@20": 0.0317}),
        ("ml1m", {"hr@10": 0.0368, "ndcg@10": 0.0179}),
    ],
)
def test_popularity_is_the_reference(name: str, expected: dict[str, float]) -> None:
    """Popularity by this protocol gives the figures known for these splits."""
    config = load_config(CONFIGS / f"{name}.toml")
    dataset = read_dataset(config.data, config.seed)
    found = Judge(config, dataset, dataset.test, dataset.known, torch.device("cpu")).popularity()
    assert {metric: round(found[metric], 4) for metric in expected} == expected


def test_ml1m_beats_popularity(tmp_path: Path) -> None:
    """Three epochs of the committed config already rank next films twice as well as popularity does."""
    config = load_config(CONFIGS / "ml1m.toml", ["training.max_epochs=3"])
    result = train(config, open_store(tmp_path), report=Silent(), device="cpu")
    assert result.metrics["ndcg@10"] > 2 * result.popularity["ndcg@10"]
    assert result.metrics["hr@10"] > 2 * result.popularity["hr@10"]
