"""Whole runs on small planted data: what is found, published, repeated, refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from msgspec.structs import replace

from embstore.common.progress import PlainLines, Silent, Terminal, make_reporter
from embstore.errors import ConfigError, Conflict, DataError
from embstore.publish.store import open_store
from embstore.train.config import TrainConfig, load_config
from embstore.train.data import read_dataset
from embstore.train.loop import Examples, fit
from embstore.train.model import make_model
from embstore.train.publication import TrainResult
from embstore.train.run import train

CONFIG = """
[data]
path = "events.parquet"
user = "user"
item = "item"
time = "time"
[model]
embedding_dim = 16
[tables.user]
scheme = "memcom"
ratio = 1.5
[tables.item]
scheme = "qr"
ratio = 2
[training]
batch_size = 256
learning_rate = 0.2
l2 = 0.03
max_epochs = 6
[publish]
label = "canary"
num_hot_ids = 5
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """300 users with 12 events each, all of them on the 20 items of one of eight topics."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(300), 12)
    items = rng.integers(8, size=300)[users] + 8 * rng.integers(20, size=len(users))
    keys = [f"sku-{item:03d}" for item in items]
    events = pl.DataFrame({"user": users * 1_000_003 - 5, "item": keys, "time": rng.permutation(len(users))})
    events.write_parquet(tmp_path / "events.parquet")
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def run(path: Path, store: str, *overrides: str, device: str = "cpu") -> TrainResult:
    store_path = path.parent / store
    return train(load_config(path, overrides), open_store(store_path), report=Silent(), device=device)


def test_release_holds_what_was_trained(config_path: Path) -> None:
    """Both tables are one release under the label, keyed by the events' ids; manifests name hot ids and metrics."""
    result = run(config_path, "store")
    store = open_store(config_path.parent / "store")
    assert store.release(result.release).tables == {"user": 1, "item": 1}
    dataset = read_dataset(load_config(config_path).data, 0)
    for name, ids in (("user", dataset.users), ("item", dataset.items)):
        table, manifest = store.load(name, "canary"), store.manifest(name, 1)
        assert manifest.hot_ids == list(ids.ids[:5])
        assert manifest.num_ids == len(ids)
        assert manifest.metrics["ndcg@10"] == result.metrics["ndcg@10"]
        assert manifest.metrics["popularity_ndcg@10"] == result.popularity["ndcg@10"]
        assert table.scheme.name == result.tables[name].scheme
        assert result.tables[name].num_bytes * result.tables[name].ratio == pytest.approx(len(ids) * 16 * 4)
        _, found = table.lookup(list(ids.ids), return_found=True)
        assert found.all()
    assert json.loads(json.dumps(result.to_json()))["fit"]["num_epochs"] == result.fit.num_epochs


def test_ids_of_another_type_are_refused_before_the_work(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose callers send integers gets no version of strings, unless the config says that they know."""
    store = open_store(config_path.parent / "store")
    store.publish("item", np.zeros((3, 4), np.float32), label="canary")
    with monkeypatch.context() as patched:
        patched.setattr("embstore.train.run.fit", lambda *_: pytest.fail("trained for nothing"))
        with pytest.raises(Conflict, match="table 'item': label 'canary' points at version 1, whose ids are integers"):
            run(config_path, "store")
    run(config_path, "store", "publish.new_id_type=true", "training.max_epochs=1")
    assert store.load("item", "canary").ids.kind == "string"


def test_published_vectors_are_the_modules(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup in the published table gives, to rounding, what the trained module composes."""
    models = []
    monkeypatch.setattr("embstore.train.run.make_model", lambda *args: models.append(make_model(*args)) or models[-1])
    run(config_path, "store")
    dataset = read_dataset(load_config(config_path).data, 0)
    for name, ids in (("user", dataset.users), ("item", dataset.items)):
        served = open_store(config_path.parent / "store").load(name, "canary").lookup(ids.ids)
        with torch.no_grad():
            composed = models[0].tables()[name](torch.arange(len(ids)))
        np.testing.assert_allclose(served, composed.numpy(), rtol=1e-6, atol=1e-7)


def test_planted_topics_are_found(config_path: Path) -> None:
    """A few epochs on data with a structure beat popularity several times over."""
    full = [f"tables.{name}.{key}" for name in ("user", "item") for key in ("scheme=full", "ratio=1")]
    result = run(config_path, "store", *full)
    assert result.metrics["ndcg@10"] > 3 * result.popularity["ndcg@10"]
    assert result.fit.examples_per_s > 0


def test_same_seed_same_tables(config_path: Path) -> None:
    """On one machine a seed decides every weight; another seed gives other weights."""
    folder = config_path.parent
    for store, seed in (("one", 3), ("again", 3), ("other", 4)):
        run(config_path, store, f"seed={seed}", "training.max_epochs=2")
    for name in ("user", "item"):
        one, again, other = (
            (folder / store / "tables" / name / "versions" / "1" / "arrays.safetensors").read_bytes()
            for store in ("one", "again", "other")
        )
        assert one == again
        assert one != other


def fitted(config: TrainConfig, metrics: list[float], report: Silent) -> tuple[int, int, float]:
    """Epochs run, best epoch and final weight sum of a fit whose validations give these metrics."""
    dataset = read_dataset(config.data, 0)
    model = make_model(config, len(dataset.users), len(dataset.items))
    examples = Examples(dataset, config.training, 0, torch.device("cpu"))
    result = fit(model, examples, config.training, iter(metrics).__next__, report)
    return result.num_epochs, result.best_epoch, float(sum(p.detach().double().sum() for p in model.parameters()))


def test_early_stopping_keeps_the_best(config_path: Path) -> None:
    """Training ends `patience` evaluations after the best one, and the weights are that epoch's."""
    config = load_config(config_path, ["training.patience=2", "training.max_epochs=9"])
    num_epochs, best_epoch, weights = fitted(config, [0.1, 0.3, 0.2, 0.3, 0.9], Silent())
    assert (num_epochs, best_epoch) == (4, 2)
    two = replace(config, training=replace(config.training, max_epochs=2))
    assert fitted(two, [0.1, 0.3], Silent())[2] == weights


def test_a_loss_that_is_not_a_number_publishes_nothing(config_path: Path) -> None:
    """A run that diverges stops with the epoch in its message, before anything reaches the store."""
    with pytest.raises(DataError, match=r"not a finite number after step \d+ of epoch 1"):
        run(config_path, "store", "training.learning_rate=1e30")
    assert not (config_path.parent / "store").exists()


def test_devices(config_path: Path, device: str) -> None:
    """A run says which device it used, CUDA where asked for and present."""
    assert run(config_path, "store", "training.max_epochs=1", device=device).device == device


def test_unknown_device(config_path: Path) -> None:
    """A device that is not there is a ConfigError."""
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        run(config_path, "store", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            run(config_path, "store", device="cuda")


def test_plain_lines_elsewhere_than_on_a_terminal(config_path: Path) -> None:
    """Without a terminal a run writes one plain line per fact: data, tables, each epoch, test, release."""
    stream = io.StringIO()
    config = load_config(config_path, ["training.max_epochs=2"])
    with make_reporter(stream=stream) as report:
        assert isinstance(report, PlainLines)
        train(config, open_store(config_path.parent / "store"), report=report, device="cpu")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert "\x1b" not in stream.getvalue()
    assert "popularity" in lines[-2]
    assert "published release 1" in lines[-1]


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_progress_on_a_terminal(config_path: Path) -> None:
    """On a terminal a run shows the epochs; asked to be silent it shows nothing anywhere."""
    stream = FakeTerminal()
    config = load_config(config_path, ["training.max_epochs=2"])
    with make_reporter(stream=stream) as report:
        assert isinstance(report, Terminal)
        train(config, open_store(config_path.parent / "store"), report=report, device="cpu")
    assert "epoch   2" in stream.getvalue()
    assert type(make_reporter(silent=True, stream=stream)) is Silent


def test_rows_are_published_as_the_config_says(config_path: Path) -> None:
    """dtype is a key of a table: rows are stored so, bytes and ratio say it; an impossible one is refused at once."""
    result = run(config_path, "store", "tables.item.dtype=int8", "training.max_epochs=1")
    manifest = open_store(config_path.parent / "store").manifest("item", 1)
    assert (result.tables["item"].dtype, result.tables["user"].dtype, manifest.dtype) == ("int8", "float32", "int8")
    table = result.tables["item"]
    assert table.ratio == pytest.approx(manifest.metrics["compression_ratio"])
    assert table.ratio == pytest.approx(table.num_embeddings * 16 * 4 / table.num_bytes)
    assert table.ratio > 2 * 2.5  # 16 floats take 64 bytes, or 24 as int8
    robe = ("tables.item.scheme=robe", "tables.item.dtype=int8")
    with pytest.raises(ConfigError, match=r"tables.item: no tensor here gets smaller as int8"):
        run(config_path, "store", *robe)
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, .*got 'int9'"):
        run(config_path, "store", "tables.item.dtype=int9")
