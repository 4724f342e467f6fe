"""The whole job of a ranking service on real events: trained, published, served, ranked over HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
import torch
from ranker.artifact import Artifact, load
from ranker.evaluate import over_http
from ranker.fit import FitOptions
from ranker.lists import evaluate, read_lists, retrieve
from ranker.model import rank
from ranker.train import EVALUATION, Options
from ranker.train import train as train_ranker
from support.ranking import RankerProcess, ranking
from support.serving import ServerProcess, serving

from embstore.common.progress import Silent
from embstore.publish.publication import Publication
from embstore.publish.store import Store
from embstore.train.config import TrainConfig, load_config
from embstore.train.data import read_dataset
from embstore.train.publication import TrainResult
from embstore.train.run import train

DATA = Path(os.environ.get("EMBSTORE_DATA") or "/nonexistent")
CONFIG = Path(__file__).parents[2] / "configs" / "ml1m.toml"
NUM_USERS = 1000
OPTIONS = Options(num_tested=120, fit=FitOptions(max_epochs=6))
DEADLINE_MS = 20_000  # what is asked here is what the answer is, not how soon it comes

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="EMBSTORE_DATA names no folder with the public data sets")


@dataclass
class World:
    """Everything that runs, and what was trained."""

    config: TrainConfig
    store: Store
    result: TrainResult
    folder: Path
    artifact: Artifact
    server: ServerProcess
    ranker: RankerProcess


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch without threads of its own: the models here are small, and other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two tables of real events, a ranker trained on their release, both served."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranker")
    events = pl.read_parquet(DATA / "ml1m_seq" / "interactions.parquet")
    events.filter(pl.col("user_id") <= NUM_USERS).write_parquet(folder / "events.parquet")
    options = ["model.embedding_dim=32", "training.max_epochs=3", "training.batch_size=512", "evaluation.cutoff=20"]
    config = load_config(CONFIG, [f"data.path={folder / 'events.parquet'}", *options])
    store = Store(folder / "store")
    with serving(store.root, folder / "server.log", ready=False) as server:
        result = train(config, store, report=Silent(), device="cpu")
        artifact = train_ranker(config, store, folder / "artifact", result.release, OPTIONS, lambda _: None)
        with ranking(folder / "artifact", server.url, folder / "ranker.log", deadline_ms=DEADLINE_MS) as ranker:
            ranker.wait_ready()
            yield World(config, store, result, folder / "artifact", artifact, server, ranker)


def test_ndcg_over_http_is_the_offline_figure(world: World) -> None:
    """Every metric of the held-out users, ranked by the running services, equals the trainer's to the last bit."""
    lists = read_lists(world.folder / EVALUATION)
    assert len(lists) == world.artifact.evaluation["users"] > 100
    assert {len(one.candidates) for one in lists} == {500}
    found = over_http(world.ranker.url, lists, world.result.release, 20)
    assert found == {name: world.artifact.metrics[name] for name in found}
    assert found["ndcg@20"] > 0


def test_answers_are_the_offline_ranking(world: World) -> None:
    """Items, order and scores of an answer are those of the model on the store's own vectors, exactly."""
    artifact = load(world.folder)
    tables = {side.table: world.store.load(side.table, side.version) for side in (artifact.user, artifact.item)}
    for one in read_lists(world.folder / EVALUATION)[:20]:
        user_D, items_CD = (
            torch.from_numpy(tables[name].lookup(keys))
            for name, keys in (("user", [one.user]), ("item", one.candidates))
        )
        order, scores = rank(artifact.scorer, user_D[0], items_CD, 20)
        reply = httpx.post(
            f"{world.ranker.url}/rank", json={"user": one.user, "candidates": one.candidates}, timeout=30
        )
        expected = [{"id": one.candidates[place], "score": score} for place, score in zip(order, scores, strict=True)]
        assert reply.json()["items"] == expected


def test_a_new_release_changes_nothing(world: World) -> None:
    """Releases that come later, more than a server keeps, leave the pinned one's rankings as they are."""
    lists = read_lists(world.folder / EVALUATION)[:20]
    before = over_http(world.ranker.url, lists, world.result.release, 20)
    dataset = read_dataset(world.config.data, world.config.seed)
    publications = {
        name: Publication(torch.randn(len(ids), 32), ids=ids.ids)
        for name, ids in (("user", dataset.users), ("item", dataset.items))
    }
    for _ in range(3):
        newest = world.store.publish_release(publications).id
    asked: Any = {"tables": {"user": {"ids": []}, "item": {"ids": []}}}

    def moved() -> bool:
        return bool(httpx.post(f"{world.server.url}/v1/lookup", json=asked).json()["release"] == newest)

    world.server.wait_until(moved, "the newest release")
    assert over_http(world.ranker.url, lists, world.result.release, 20) == before
    assert world.ranker.get("/readyz").json() == {"status": "ok", "reasons": [], "release": "1"}


def test_the_order_of_retrieval_is_the_trainers_figure(world: World) -> None:
    """Before the ranker reorders them, the candidates of all test users have the metrics that training reported."""
    dataset = read_dataset(world.config.data, world.config.seed)
    users_ND, items_ND = (
        torch.from_numpy(world.store.load(name, world.result.tables[name].version).lookup(ids.ids))
        for name, ids in (("user", dataset.users), ("item", dataset.items))
    )
    lists = retrieve(
        users_ND, items_ND, dataset.test, dataset.known, exclude_seen=True, size=500, at_most=len(dataset.users)
    )
    found = evaluate(lists, lambda one: one.candidates, 20)
    assert found == pytest.approx(world.result.metrics, abs=1e-3)  # a tie may fall otherwise: products are rounded


def test_the_ranker_learned_something(world: World) -> None:
    """The correction is not the zero that it began as."""
    assert world.artifact.scorer.correction.weight.abs().max() > 0
