"""Joined lookups when something is wrong: too many, wrong keys, a device that fails or hangs, the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.batching import Gate, N, batchers, outcomes, published, run, same

import embstore
from embstore.errors import ConfigError, DeviceFailed, Draining, IdOutOfRange, NotReady, Overloaded
from embstore.table import Table
from server.lookup import batcher as batching
from server.lookup.batcher import DynamicBatcher


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> embstore.Store:
    """Two versions of a table of each scheme."""
    return published(tmp_path_factory.mktemp("batched") / "store")


@pytest.fixture(params=["cpu", "cpu:0"])
def place(request: pytest.FixtureRequest) -> str:
    """Where tables live; "cpu:0" goes the way of a GPU's tensors."""
    return str(request.param)


@pytest.fixture
def made() -> Iterator[Callable[..., DynamicBatcher]]:
    """Makes batchers that are closed afterwards."""
    with batchers() as make:
        yield make


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds launches back, so that a test can say what is waiting."""
    return Gate(monkeypatch)


def test_only_so_many_may_wait(store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate) -> None:
    """One too many is told so at once; one that was cancelled makes room."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(max_pending=2)
        first = batcher.fetch(table, np.array([0]), "zero")
        await gate.launched()
        waiting = [batcher.fetch(table, np.array([n]), "zero") for n in range(2)]
        with pytest.raises(Overloaded, match="2 lookups are waiting for the device already"):
            batcher.fetch(table, np.array([0]), "zero")
        waiting[0].cancel()
        waiting.append(batcher.fetch(table, np.array([7]), "zero"))
        gate.go()
        assert same(await waiting[2], table.fetch(np.array([7])))
        await outcomes(first, *waiting)

    run(main())


def test_only_so_many_ids_may_wait(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their vectors take memory already; one request is always let in."""
    monkeypatch.setattr(batching, "WAITING_IDS", 10)
    table = store.load("full")

    async def main() -> None:
        batcher = made()
        waiting = [batcher.fetch(table, np.array([0]), "zero")]
        await gate.launched()
        waiting.append(batcher.fetch(table, np.arange(50), "zero"))
        with pytest.raises(Overloaded):
            batcher.fetch(table, np.array([0]), "zero")
        gate.go()
        await asyncio.gather(*waiting)

    run(main())


def test_wrong_keys_hurt_nobody_else(
    store: embstore.Store, place: str, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """They are refused before they wait, with the error of `table.fetch`."""
    table = store.load("full", device=place)

    async def main() -> None:
        batcher = made()
        good = batcher.fetch(table, np.array([1]), "zero")
        with pytest.raises(IdOutOfRange, match=f"does not have id {N}"):
            batcher.fetch(table, np.array([N]), "error")
        with pytest.raises(TypeError):
            batcher.fetch(table, np.array(["a"]), "zero")
        with pytest.raises(ConfigError):
            batcher.fetch(table, np.array([1]), "nonsense")
        gate.go()
        assert same(await good, table.fetch(np.array([1])))

    run(main())


def test_a_launch_that_fails_fails_for_those_in_it_alone(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """A bug or too little memory: its requests hear so once, the next launch is as if nothing had been."""
    table = store.load("full")

    async def main() -> None:
        batcher = made()
        gate.error = Overloaded("no memory")
        first = batcher.fetch(table, np.array([0]), "zero")
        await gate.launched()
        rest = [batcher.fetch(table, np.array([n]), "zero") for n in range(2)]
        gate.go()
        failed, *fine = await outcomes(first, *rest)
        assert isinstance(failed, Overloaded)
        assert all(same(fetched, table.fetch(np.array([n]))) for n, fetched in enumerate(fine))
        assert batcher.problem is None

    run(main())


def test_a_sick_device_refuses_from_then_on(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """Everyone in the launch hears it, nothing is tried again, and readiness has a reason."""
    table = store.load("full")

    async def main() -> None:
        batcher = made()
        gate.error = DeviceFailed("device cuda has failed")
        waiting = [batcher.fetch(table, np.array([0]), "zero")]
        await gate.launched()
        gate.go()
        assert [str(error) for error in await outcomes(*waiting)] == ["device cuda has failed"]
        assert batcher.problem == "device cuda has failed"
        with pytest.raises(DeviceFailed, match="device cuda has failed"):
            batcher.fetch(table, np.array([0]), "zero")

    run(main())
    assert len(gate.order) == 1


def test_a_device_that_hangs_is_a_problem_for_as_long_as_it_does(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """New requests are refused instead of piling up; when the launch ends after all, they are served again."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(stuck_s=0.05)
        stuck = batcher.fetch(table, np.array([0]), "zero")
        await gate.launched()
        while batcher.problem is None:
            await asyncio.sleep(0.01)
        assert batcher.problem == "a launch has been running for more than 0.05 s"
        with pytest.raises(NotReady, match="hangs"):
            batcher.fetch(table, np.array([0]), "zero")
        gate.go()
        await stuck
        while batcher.problem is not None:
            await asyncio.sleep(0.01)
        assert same(await batcher.fetch(table, np.array([1]), "zero"), table.fetch(np.array([1])))

    run(main())


def test_closing_ends_the_thread_and_tells_those_who_wait(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """What runs is finished, what waits gets Draining, what comes later too; closing twice is once."""
    table, before = store.load("full"), set(threading.enumerate())

    async def main() -> None:
        batcher = made()
        running = batcher.fetch(table, np.array([0]), "zero")
        await gate.launched()
        waiting = [batcher.fetch(table, np.array([n]), "zero") for n in range(3)]
        closing = threading.Thread(target=batcher.close)
        closing.start()
        assert [type(error) for error in await outcomes(*waiting)] == [Draining] * 3
        with pytest.raises(Draining):
            batcher.fetch(table, np.array([0]), "zero")
        assert not running.done()
        gate.go()
        await asyncio.to_thread(closing.join)
        assert same(await running, table.fetch(np.array([0])))
        batcher.close()

    run(main())
    assert set(threading.enumerate()) <= before
    assert gate.order == [("full", 2, 1)]


def test_an_idle_batcher_keeps_no_version_alive(store: embstore.Store, made: Callable[..., DynamicBatcher]) -> None:
    """A version that was swapped out gives its memory back, although it was the last that was looked up."""
    table = store.load("full")
    gone = weakref.ref(table)

    async def main(table: Table) -> None:
        batcher = made()
        await batcher.fetch(table, np.array([1]), "zero")

    run(main(table))
    del table
    deadline = time.monotonic() + 30
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


def test_requests_of_a_loop_that_is_closed_are_forgotten(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """The thread goes on for others."""
    table, batcher = store.load("full"), made()

    async def leaves() -> None:
        batcher.fetch(table, np.array([1]), "zero")
        await gate.launched()

    async def stays() -> None:
        assert same(await batcher.fetch(table, np.array([2]), "zero"), table.fetch(np.array([2])))

    run(leaves())
    gate.go()
    run(stays())
