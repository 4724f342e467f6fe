"""What tests of batched lookups share: tables, launches that wait for the test, results side by side."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embstore
from embstore import schemes
from embstore.table import Fetched, Table
from server.lookup import batcher as batching
from server.lookup.batcher import DynamicBatcher, compose_batch

N, D = 200, 8
MODULES: dict[str, Callable[[], Any]] = {
    "full": lambda: schemes.Full(N, D),
    "qr": lambda: schemes.QR(N, D, num_buckets=20),
    "dhe": lambda: schemes.DHE(N, D, num_hashes=16, hidden=(8,)),
}


def published(folder: Path) -> embstore.Store:
    """A store with two versions of a table of each scheme; their numbers differ."""
    store = embstore.open_store(folder)
    for name, module in MODULES.items():
        for _ in range(2):
            store.publish(name, module().eval())
    return store


class Counts:
    """What a batcher counts: requests and ids of every launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int]] = []

    def count_batch(self, num_requests: int, num_ids: int) -> None:
        self.launches.append((num_requests, num_ids))


class Gate:
    """Launches wait here until the test lets them go; `order` says for which versions there were any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.permits = threading.Semaphore(0), threading.Semaphore(0)
        self.order: list[tuple[str, int, int]] = []
        self.error: Exception | None = None

        def gated(table: Table, parts: Any) -> None:
            self.order.append((table.name, table.version, len(parts)))
            self.reached.release()
            assert self.permits.acquire(timeout=30)
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            compose_batch(table, parts)

        monkeypatch.setattr(batching, "compose_batch", gated)

    def go(self, launches: int = 1_000) -> None:
        """Let so many launches go on."""
        self.permits.release(launches)

    async def launched(self) -> None:
        """Until the next launch has begun."""
        assert await asyncio.to_thread(self.reached.acquire, timeout=30)


def run(main: Coroutine[Any, Any, None]) -> None:
    """A test on an event loop of its own, ended after a minute."""
    asyncio.run(asyncio.wait_for(main, 60))


async def outcomes(*awaitables: Awaitable[Fetched]) -> list[Any]:
    """Results and errors, as they are."""
    return list(await asyncio.gather(*awaitables, return_exceptions=True))


def same(got: Fetched, expected: Fetched) -> bool:
    """The same vectors bit for bit, the same ids found."""
    found = (got.found_B is None) == (expected.found_B is None) and (
        got.found_B is None or np.array_equal(got.found_B, expected.found_B)  # type: ignore[arg-type]
    )
    return found and got.missing == expected.missing and got.vectors_BD.tobytes() == expected.vectors_BD.tobytes()


@contextmanager
def batchers() -> Iterator[Callable[..., DynamicBatcher]]:
    """Makes batchers, and closes them at the end."""
    made: list[DynamicBatcher] = []

    def make(**options: Any) -> DynamicBatcher:
        made.append(DynamicBatcher(**options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()
