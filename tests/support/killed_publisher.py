"""A publisher that dies at a chosen step, for test_publish_killed: started as a program, steered over stdin.

Each line of stdin is a JSON object: `store`, `job` (publish or release), `seed` of the vectors, `kill_at` (0: never),
`forever`. For each, a child is forked that publishes and, just before its step number `kill_at` (in the middle of it,
if it is a write), sends itself SIGKILL. With `forever` the child publishes one seed after another until it is killed
from outside. Stdout tells what happens, a line each: `child PID`, `step WHAT` per step, `published`, `gone`.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from embstore.publish.publication import Publication
from embstore.publish.store import Store
from embstore.schemes import MEmCom

STEPS = ("mkdir", "open", "close", "fsync", "rename", "replace", "link", "unlink", "rmdir", "listdir", "scandir")
NUM_IDS, DIM = 24, 4


def publications(seed: int) -> dict[str, Publication]:
    """Two tables whose every number follows from the seed: a compressed one, and one with string keys."""
    import torch

    user = MEmCom(NUM_IDS, DIM, num_buckets=5, generator=torch.Generator().manual_seed(seed))
    item = np.random.default_rng(seed).normal(size=(NUM_IDS, DIM)).astype(np.float32)
    keys = [f"item-{row}" for row in range(NUM_IDS)]
    return {
        "user": Publication(user, hot_ids=[seed % NUM_IDS], metrics={"seed": seed}),
        "item": Publication(item, ids=keys, metrics={"seed": seed}),
    }


def publish(store: Store, job: str, seed: int) -> None:
    """One table, or both as a release."""
    if job == "release":
        store.publish_release(publications(seed))
    else:
        item = publications(seed)["item"]
        store.publish("item", item.source, ids=item.ids, metrics=item.metrics)


class Steps:
    """Counts what a process does to its files, and kills it at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.count, self.write = kill_at, 0, os.write

    def reached(self, what: str) -> bool:
        """Take the next step; whether it is the last."""
        self.count += 1
        self.write(1, f"step {what}\n".encode())
        return self.count == self.kill_at

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a step: the process dies just before it."""

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.reached(name):
                die()
            return function(*args, **kwargs)

        return step

    def install(self) -> None:
        """From here on, every call that touches the disk is a step."""
        for name in STEPS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        fcntl.flock = self.wrap("flock", fcntl.flock)  # type: ignore[assignment]
        plain = io.open

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = self.wrap("open", plain)(path, mode, *args, **kwargs)
            return file if "r" in mode else Torn(file, self)

        io.open = builtins.open = opened


class Torn:
    """A file whose writes can be cut in half by a kill."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self.file, self.steps = file, steps

    def write(self, data: bytes | memoryview) -> int:
        """All of the data, or half of it and death."""
        if self.steps.reached("write"):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *exc: object) -> None:
        self.steps.wrap("close", self.file.close)()


def die() -> None:
    """As after kill -9: no cleaning up, no flushing, nothing."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(order: dict[str, Any]) -> None:
    """The child: publish as ordered."""
    store = Store(order["store"])
    Steps(order["kill_at"]).install()
    for seed in itertools.count(order["seed"]):
        publish(store, order["job"], seed)
        os.write(1, b"published\n")
        if not order.get("forever"):
            return


def main() -> None:
    """Fork a child for each order."""
    publications(0)
    for line in sys.stdin:
        order = json.loads(line)
        if order["job"] == "warm":  # compile and import what publishing needs, so that children only publish
            publish(Store(order["store"]), "release", order["seed"])
            os.write(1, b"gone\n")
            continue
        child = os.fork()
        if child == 0:
            try:
                run(order)
            except BaseException as error:
                os.write(1, f"failed {error!r}\n".encode())
            finally:
                os._exit(0)
        os.write(1, f"child {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main()
