"""What is known of ids before a table is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from support.fits import planted

from embstore import open_store
from embstore.common.progress import Silent
from embstore.errors import ConfigError
from embstore.train.config import TableConfig, TrainConfig, load_config
from embstore.train.data import read_dataset
from embstore.train.model import make_table
from embstore.train.prepare import CHEAP_DIM, knowledge
from embstore.train.run import train

ZIPF = 1 / torch.arange(1, 1001, dtype=torch.float64)


CONFIG = """
[data]
path = "events.parquet"
user = "user"
item = "item"
time = "time"
[model]
embedding_dim = 16
[tables.user]
scheme = "{user}"
{user_size}
[tables.item]
scheme = "{item}"
ratio = 4
[training]
batch_size = 256
learning_rate = 0.2
l2 = 0.03
max_epochs = 3
"""


def config_of(folder: Path, user: str, item: str, user_size: str = "ratio = 1") -> TrainConfig:
    """300 users with 12 events each, all of them on the 20 items of one of eight topics."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(300), 12)
    topic_of_user = rng.integers(8, size=300)
    items = topic_of_user[users] + 8 * rng.integers(20, size=len(users))
    events = pl.DataFrame({"user": users, "item": items, "time": rng.permutation(len(users))})
    events.write_parquet(folder / "events.parquet")
    path = folder / "config.toml"
    path.write_text(CONFIG.format(user=user, item=item, user_size=user_size))
    return load_config(path)


class Lines(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        """Kept."""
        self.lines.append(message)

    def epoch_done(self, *facts: Any) -> None:
        """Kept."""
        self.lines.append(f"epoch {facts}")


def test_schemes_learn_what_they_ask_for(tmp_path: Path) -> None:
    """Counts, histories and vectors of the training events, for the tables that use them and no others."""
    config = config_of(tmp_path, "lma", "learned_hash")
    dataset, report = read_dataset(config.data, 0), Lines()
    known = knowledge(config, dataset, torch.device("cpu"), report)
    assert {name: set(found) for name, found in known.items()} == {
        "user": {"histories"},
        "item": {"frequencies", "vectors"},
    }
    pairs = torch.from_numpy(np.stack([dataset.train.users_E, dataset.train.items_E], axis=1))
    assert torch.equal(known["user"]["histories"], pairs)
    counts = torch.bincount(pairs[:, 1], minlength=len(dataset.items)).double()
    assert torch.equal(known["item"]["frequencies"], counts)
    vectors = known["item"]["vectors"]
    assert (vectors.shape, vectors.dtype) == ((len(dataset.items), CHEAP_DIM), torch.float32)
    assert vectors.isfinite().all()
    assert len(report.lines) == 1
    assert "8 columns" in report.lines[0]


def test_nothing_is_trained_for_schemes_that_ask_for_nothing(tmp_path: Path) -> None:
    """Plain tables: no knowledge, no lines, no time."""
    config, report = config_of(tmp_path, "full", "hash"), Lines()
    assert knowledge(config, read_dataset(config.data, 0), torch.device("cpu"), report) == {"user": {}, "item": {}}
    assert report.lines == []


def test_a_run_learns_its_map_from_training_events(tmp_path: Path) -> None:
    """The published map puts items of a topic together, far more often than chance, and the same seed repeats it."""
    config = config_of(tmp_path, "full", "learned_hash")
    dataset = read_dataset(config.data, 0)
    store = open_store(tmp_path / "store")
    for _ in range(2):
        train(config, store, report=Silent(), device="cpu")
    first, again = (store.load("item", version).tensors["map"] for version in (1, 2))
    np.testing.assert_array_equal(first, again)
    topics = np.asarray(dataset.items.ids) % 8
    together = (first[:, None] == first[None, :]) & ~np.eye(len(first), dtype=bool)
    assert together.any()
    assert (topics[:, None] == topics[None, :])[together].mean() > 0.5  # by chance: 1 / 8


def test_a_map_is_learned_for_sizes_given_outright(tmp_path: Path) -> None:
    """With num_buckets instead of a ratio the scheme is told the same."""
    config = config_of(tmp_path, "learned_hash", "full", "num_buckets = 20\nnum_hot = 3")
    known = {"frequencies": ZIPF[:40], "vectors": planted(40, 17, 4)[0]}
    told: Any = make_table("user", config.tables.user, 40, config.model, 0, known)
    assert told.map[:3].tolist() == [0, 1, 2]
    assert (told.map[3:] >= 3).all()
    untold: Any = make_table("user", config.tables.user, 40, config.model, 0)
    assert untold.map.tolist() == [i % 20 for i in range(40)]


def test_options_that_divide_up_a_budget_need_one(tmp_path: Path) -> None:
    """hot_share with a ratio is taken; with sizes given outright it is refused, and a misspelt one is named."""
    model = config_of(tmp_path, "full", "full").model
    options: dict[str, Any] = {"num_hot": 3, "num_cold": 4}
    module: Any = make_table("item", TableConfig(scheme="frequency", ratio=4, options={"hot_share": 0.5}), 80, model, 0)
    assert (module.config.num_hot, module.config.num_cold) == (10, 10)
    with pytest.raises(ConfigError, match=r"tables\.item: hot_share divides up a budget: give ratio or budget with it"):
        make_table("item", TableConfig(scheme="frequency", options=options | {"hot_share": 0.5}), 80, model, 0)
    with pytest.raises(ConfigError, match="unknown key hot_shares; did you mean hot_share"):
        make_table("item", TableConfig(scheme="frequency", ratio=4, options={"hot_shares": 0.5}), 80, model, 0)
    with pytest.raises(ConfigError, match="unknown key frequencies"):
        make_table("item", TableConfig(scheme="frequency", ratio=4, options={"frequencies": [1]}), 80, model, 0)
