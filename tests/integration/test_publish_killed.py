"""kill -9 at every step of publishing: no reader ever gets a wrong vector, and the next publisher goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embstore.publish.publication import Publication
from embstore.publish.store import Store
from embstore.schemes import MEmCom

PROGRAM = Path(__file__).parents[1] / "support" / "killed_publisher.py"
NUM_IDS, DIM = 24, 4
KEYS = [f"item-{row}" for row in range(NUM_IDS)]
WHOLE = re.compile(
    r"tables/(user|item)/versions/[1-9]\d*/(manifest\.json|arrays\.safetensors)"
    r"|tables/(user|item)/labels/latest\.json|releases/[1-9]\d*\.json"
)


class Publisher:
    """The program beside this file: it publishes in children of its own, which die at a chosen step."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", str(PROGRAM)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def begin(self, **order: Any) -> None:
        """Give an order."""
        self.stdin.write(json.dumps(order) + "\n")
        self.stdin.flush()

    def line(self) -> str:
        """The next thing it says."""
        line = self.stdout.readline()
        assert line, "the publisher's parent process ended"
        assert not line.startswith("failed"), line
        return line.strip()

    def rest(self) -> list[str]:
        """What it says until its child is gone."""
        return list(iter(self.line, "gone"))

    def run(self, **order: Any) -> tuple[bool, list[str]]:
        """Publish with a child that dies at step `kill_at`: whether it got to the end, and the steps it took."""
        self.begin(**order)
        said = self.rest()
        return "published" in said, [line.removeprefix("step ") for line in said if line.startswith("step ")]

    def close(self) -> None:
        """End the program and its child, whatever they are doing."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.stdin.close()
        self.process.wait()
        self.stdout.close()


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    """One program for all tests here, with everything that publishing needs already imported and compiled."""
    started = Publisher()
    started.run(store=str(tmp_path_factory.mktemp("warm")), job="warm", seed=0)
    yield started
    started.close()


def publications(seed: int) -> dict[str, Publication]:
    """What the program publishes for this seed."""
    user = MEmCom(NUM_IDS, DIM, num_buckets=5, generator=torch.Generator().manual_seed(seed))
    item = np.random.default_rng(seed).normal(size=(NUM_IDS, DIM)).astype(np.float32)
    return {
        "user": Publication(user, hot_ids=[seed % NUM_IDS], metrics={"seed": seed}),
        "item": Publication(item, ids=KEYS, metrics={"seed": seed}),
    }


def publish(store: Store, job: str, seed: int) -> dict[str, int]:
    """Publish here, unharmed; the numbers of the new versions."""
    made = publications(seed)
    if job == "release":
        return store.publish_release(made).tables
    return {"item": store.publish("item", made["item"].source, ids=KEYS, metrics={"seed": seed})}


def seed_of(store: Store, table: str, version: int | str) -> int:
    """The seed that a version says it was made from, once all its vectors are found to be made from that seed."""
    loaded = store.load(table, version, verify=True)
    assert loaded.manifest is not None
    seed: int = loaded.manifest.metrics["seed"]
    source = publications(seed)[table].source
    if table == "user":
        expected, keys = source(torch.arange(NUM_IDS)).detach().numpy(), np.arange(NUM_IDS)
    else:
        expected, keys = source, KEYS
    np.testing.assert_array_equal(loaded.lookup(keys, on_missing="error"), expected)
    return seed


def check(store: Store, allowed: set[int]) -> None:
    """Everything a reader can see is whole, and was meant to be published."""
    seeds = {
        (table, version): seed_of(store, table, version)
        for table in store.tables()
        for version in store.versions(table)
    }
    assert set(seeds.values()) <= allowed
    for table in store.tables():
        assert all((table, label.version) in seeds for label in store.labels(table).values())
    for release in store.releases():
        assert len({seeds[key] for key in release.tables.items()}) == 1


def latest(store: Store) -> dict[str, int]:
    """The seed that label `latest` of each table leads to."""
    return {table: seed_of(store, table, "latest") for table in store.tables() if "latest" in store.labels(table)}


def leftovers(root: Path) -> list[str]:
    """Files and folders that belong to no version, label or release."""
    paths = [p for p in root.rglob("*") if p.is_file() or not any(p.iterdir())]
    return [str(p.relative_to(root)) for p in paths if not WHOLE.fullmatch(str(p.relative_to(root)))]


@pytest.mark.parametrize("in_use", [True, False], ids=["store in use", "no store yet"])
@pytest.mark.parametrize("job", ["publish", "release"])
def test_a_publisher_killed_at_any_step(job: str, in_use: bool, publisher: Publisher, tmp_path: Path) -> None:
    """Readers get the old vectors or the new ones, all of one release, and the next publisher goes on as if alone."""
    old, new, newer = {1} if in_use else set(), {2}, {3}
    if in_use:
        publish(Store(tmp_path / "old"), job, 1)
    steps: list[str] = []
    for kill_at in range(1, 1000):
        root = tmp_path / str(kill_at)
        if in_use:
            shutil.copytree(tmp_path / "old", root)
        store = Store(root)
        done, steps = publisher.run(store=str(root), job=job, seed=2, kill_at=kill_at)
        check(store, old | new)
        assert set(latest(store).values()) in ((old, new) if not done else (new,))
        before = {table: max(store.versions(table), default=0) for table in ("user", "item")}
        if done:
            break
        again = publish(store, job, 3)
        assert all(number > before[table] for table, number in again.items())
        check(store, old | new | newer)
        assert set(latest(store).values()) == newer
        assert leftovers(root) == []
    assert {"mkdir", "open", "flock", "write", "fsync", "close", "rename", "replace", "rmdir"} <= set(steps)
    assert ("link" in steps) == (job == "release")
    assert len(steps) == kill_at - 1


def test_two_publishers_killed_at_any_moment(publisher: Publisher, tmp_path: Path) -> None:
    """Two at once, each killed from outside while it works: what is visible is whole, always, and of one release."""
    store, moments, others = Store(tmp_path), random.Random(5), set(range(1000, 10_000))
    other = Publisher()
    try:
        for round_ in range(1, 4):
            publish(store, "release", round_)
            for seed, process in ((1000 * round_, publisher), (1000 * round_ + 500, other)):
                process.begin(store=str(tmp_path), job="release", seed=seed, kill_at=0, forever=True)
            for process in (publisher, other):
                child = process.line()
                for _ in range(moments.randrange(100, 500)):
                    process.line()
                os.kill(int(child.removeprefix("child ")), signal.SIGKILL)
                process.rest()
                assert len(set(latest(store).values())) == 1
            check(store, {1, 2, 3} | others)
        publish(store, "release", 3)
        assert set(latest(store).values()) == {3}
        assert leftovers(tmp_path) == []
    finally:
        other.close()
