"""Publishing: several publishers at once."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.publishing import ROWS, VECTORS

from embstore.publish.publication import Publication
from embstore.publish.store import Store

pytestmark = pytest.mark.slow

RACE = """
import json, os, sys
import numpy as np
from embstore.publish.publication import Publication
from embstore.publish.store import Store

store, warm, publishers, times = Store(sys.argv[1]), Store(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def vectors(publisher, time):
    return np.full((30, 8), 100 * publisher + time, np.float32)

def publish(store, publisher):
    made = []
    for time in range(times):
        one = store.publish("item", vectors(publisher, time))
        both = store.publish_release({t: Publication(vectors(publisher, time)) for t in ("user", "pair")})
        made.append([publisher, time, one, both.id, both.tables])
    return made

publish(warm, 0)
pipes = []
go = os.pipe()
for publisher in range(publishers):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(go[1])
        os.read(go[0], 1)
        os.write(writer, json.dumps(publish(store, publisher)).encode())
        os._exit(0)
    os.close(writer)
    pipes.append(reader)
os.close(go[1])
print(json.dumps([made for reader in pipes for made in json.load(os.fdopen(reader))]))
"""


def test_publishers_at_once_all_succeed(store: Store, tmp_path: Path) -> None:
    """Four processes, five times each: every version gets its own number, no release is torn, latest is the last."""
    publishers, times = 4, 5
    command = [sys.executable, "-W", "error", "-c", RACE, str(store.root), str(tmp_path / "warm")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    said = subprocess.run(
        [*command, str(publishers), str(times)], env=env, stdout=subprocess.PIPE, check=True, timeout=120
    ).stdout
    made = json.loads(said)
    everything = list(range(1, publishers * times + 1))
    assert sorted(one for _, _, one, _, _ in made) == store.versions("item") == everything
    assert sorted(int(release) for _, _, _, release, _ in made) == everything
    for publisher, time, one, release, tables in made:
        assert store.release(release).tables == tables
        for table, version in (("item", one), *tables.items()):
            loaded = store.load(table, version, verify=True)
            assert (loaded.lookup(np.arange(ROWS)) == 100 * publisher + time).all()
    assert store.versions("user") == store.versions("pair") == everything
    assert [release.tables for release in store.releases()] == [{"user": n, "pair": n} for n in everything]
    assert {store.resolve(table) for table in ("item", "user", "pair")} == {everything[-1]}
    assert {store.labels(table)["latest"].release for table in ("user", "pair")} == {str(everything[-1])}
    assert not [path for path in store.root.rglob("*") if path.name.startswith(".")]


def test_a_publisher_waits_for_its_turn(store: Store) -> None:
    """Numbers are given and labels moved in one turn, which a second publisher cannot get in between."""
    attempts = []
    plain: Callable[..., None] = store.set_label

    def set_label(*args: Any, **options: Any) -> None:
        lock = os.open(store.root, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        attempts.append(args)
        plain(*args, **options)

    store.set_label = set_label  # type: ignore[method-assign]
    store.publish("item", VECTORS)
    store.publish_release({"item": Publication(VECTORS), "user": Publication(VECTORS)})
    assert attempts == [("item", "latest", 1), ("item", "latest", 2), ("user", "latest", 1)]
