"""Joined lookups: the same vectors as alone, whoever else is in the launch or leaves it."""

# Shapes: B ids of a request, D embedding_dim.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.batching import Counts, D, Gate, N, batchers, outcomes, published, run, same

import embstore
from embstore import device as device_module
from embstore.device import Part
from embstore.errors import Draining
from embstore.table import ON_MISSING, Table
from server.lookup import batcher as batching
from server.lookup.batcher import DynamicBatcher, batching_pays, compose_batch, uses_batching


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> embstore.Store:
    """Two versions of a table of each scheme."""
    return published(tmp_path_factory.mktemp("batched") / "store")


@pytest.fixture(params=["cpu", "cpu:0"])
def place(request: pytest.FixtureRequest) -> str:
    """Where tables live; "cpu:0" goes the way of a GPU's tensors."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that fails in one test is well again in the next."""
    monkeypatch.setattr(device_module, "_DEVICES", {})


@pytest.fixture
def counts() -> Counts:
    """Counts of a batcher."""
    return Counts()


@pytest.fixture
def made() -> Iterator[Callable[..., DynamicBatcher]]:
    """Makes batchers that are closed afterwards."""
    with batchers() as make:
        yield make


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds launches back, so that a test can say what is waiting."""
    return Gate(monkeypatch)


def test_many_at_once_get_what_each_would_get_alone(
    store: embstore.Store, place: str, made: Callable[..., DynamicBatcher], counts: Counts
) -> None:
    """Four versions, every policy, sizes from none to all ids, missing ones among them: bit for bit `table.fetch`."""
    tables = [store.load(name, version, device=place) for name in ("full", "qr") for version in (1, 2)]
    random = np.random.default_rng(3)
    asked = [
        (tables[n % 4], random.integers(-2, N + 2, int(random.integers(0, N))), ("zero", "default", "hash")[n % 3])
        for n in range(300)
    ]

    async def main() -> None:
        batcher = made(lookups=counts, max_ids=700)
        got = await asyncio.gather(*(batcher.fetch(*one) for one in asked))
        for fetched, (table, keys, on_missing) in zip(got, asked, strict=True):
            assert same(fetched, table.fetch(keys, on_missing))

    run(main())
    assert max(requests for requests, _ in counts.launches) > 1
    assert all(num_ids <= 700 for _, num_ids in counts.launches)


def test_networks_are_joined_within_their_tolerance(store: embstore.Store, made: Callable[..., DynamicBatcher]) -> None:
    """A product of matrices may take its sums in another order for another number of ids; the vectors are the same."""
    table = store.load("dhe")
    asked = [np.arange(n, n + n % 17) for n in range(100)]

    async def main() -> None:
        batcher = made()
        for keys, fetched in zip(
            asked, await asyncio.gather(*(batcher.fetch(table, k, "zero") for k in asked)), strict=True
        ):
            alone = table.fetch(keys).vectors_BD
            np.testing.assert_allclose(fetched.vectors_BD, alone, rtol=0, atol=1e-5 * np.abs(alone).max(initial=0))

    run(main())


def test_what_waits_goes_into_one_launch(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate, counts: Counts
) -> None:
    """A request on an idle device goes at once and alone; those that arrive meanwhile go together."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(lookups=counts)
        first = batcher.fetch(table, np.array([1]), "zero")
        await gate.launched()
        rest = [batcher.fetch(table, np.array([n, -1, n]), "zero") for n in range(5)]
        gate.go()
        for n, fetched in enumerate(await asyncio.gather(first, *rest)):
            assert same(fetched, table.fetch(np.array([n - 1, -1, n - 1]) if n else np.array([1])))

    run(main())
    assert gate.order == [("full", 2, 1), ("full", 2, 5)]
    assert counts.launches == [(1, 1), (5, 15)]


def test_versions_take_turns(store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate) -> None:
    """A version with more than a launch holds goes to the end of the line: nobody starves; a swap changes nothing."""
    old, new = store.load("full", 1), store.load("full", 2)

    async def main() -> None:
        batcher = made(max_ids=4)
        waiting = [(old, batcher.fetch(old, np.array([0]), "zero"), 0)]
        await gate.launched()
        for table, n in ((old, 1), (old, 2), (new, 3), (old, 4), (old, 5), (new, 6), (old, 7)):
            waiting.append((table, batcher.fetch(table, np.array([n, n]), "zero"), n))
        gate.go()
        for table, future, n in waiting:
            assert (await future).vectors_BD[0].tobytes() == table.fetch(np.array([n])).vectors_BD[0].tobytes()

    run(main())
    assert gate.order == [("full", 1, 1), ("full", 1, 2), ("full", 2, 2), ("full", 1, 2), ("full", 1, 1)]


def test_a_request_larger_than_a_launch_goes_alone(store: embstore.Store, made: Callable[..., DynamicBatcher]) -> None:
    """The bound is on batching, not on requests."""
    table = store.load("full")

    async def main() -> None:
        assert same(await made(max_ids=3).fetch(table, np.arange(N), "zero"), table.fetch(np.arange(N)))

    run(main())


def test_vectors_are_written_where_the_caller_wants_them(
    store: embstore.Store, place: str, made: Callable[..., DynamicBatcher]
) -> None:
    """`out` is filled, and is what comes back."""
    table = store.load("qr", device=place)
    out = np.empty((3, D), np.float32)

    async def main() -> None:
        fetched = await made().fetch(table, np.array([1, -1, 2]), "default", out)
        assert fetched.vectors_BD is out
        assert same(fetched, table.fetch(np.array([1, -1, 2]), "default"))

    run(main())


def test_one_who_leaves_does_not_hurt_the_others(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate, counts: Counts
) -> None:
    """Cancelled before the launch: not in it. Cancelled during it: the rest get their vectors."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(lookups=counts)
        first = batcher.fetch(table, np.array([9]), "zero")
        await gate.launched()
        early, stays, late = (batcher.fetch(table, np.array([n]), "zero") for n in range(3))
        early.cancel()
        gate.go(1)
        await first
        await gate.launched()
        late.cancel()
        gate.go(1)
        assert same(await stays, table.fetch(np.array([1])))
        assert all(isinstance(error, asyncio.CancelledError) for error in await outcomes(early, late))

    run(main())
    assert gate.order == [("full", 2, 1), ("full", 2, 2)]


def test_when_all_have_left_there_is_no_launch(
    store: embstore.Store, made: Callable[..., DynamicBatcher], gate: Gate
) -> None:
    """And the thread goes on."""
    table = store.load("full")

    async def main() -> None:
        batcher = made()
        first = batcher.fetch(table, np.array([9]), "zero")
        await gate.launched()
        for n in range(4):
            batcher.fetch(table, np.array([n]), "zero").cancel()
        gate.go()
        await first
        assert same(await batcher.fetch(table, np.array([3]), "zero"), table.fetch(np.array([3])))

    run(main())
    assert [requests for _, _, requests in gate.order] == [1, 1]


@pytest.mark.parametrize("on_missing", [policy for policy in ON_MISSING if policy != "error"])
def test_ids_that_are_all_missing_need_no_launch_but_for_hash(
    store: embstore.Store, made: Callable[..., DynamicBatcher], counts: Counts, on_missing: str
) -> None:
    """What the policy says is all there is to say; no ids need no launch either."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(lookups=counts)
        for keys in (np.array([-1, N, N + 1]), np.empty(0, np.int64)):
            assert same(await batcher.fetch(table, keys, on_missing), table.fetch(keys, on_missing))

    run(main())
    assert counts.launches == ([(1, 3)] if on_missing == "hash" else [])


def test_company_is_waited_for_where_that_is_asked_for(
    store: embstore.Store, made: Callable[..., DynamicBatcher], counts: Counts
) -> None:
    """Requests a moment apart share a launch; a full launch goes at once, and so does the end."""
    table = store.load("full")

    async def main() -> None:
        batcher = made(lookups=counts, max_delay_s=30, max_ids=3)
        got = []
        for n in range(3):
            got.append(batcher.fetch(table, np.array([n]), "zero"))
            await asyncio.sleep(0.01)
        await asyncio.gather(*got)
        alone = made(lookups=counts, max_delay_s=0.05)
        await alone.fetch(table, np.array([0]), "zero")
        last = batcher.fetch(table, np.array([0]), "zero")
        batcher.close()
        assert isinstance((await outcomes(last))[0], Draining)

    run(main())
    assert counts.launches == [(3, 3), (1, 1)]


@pytest.fixture(scope="module")
def both(store: embstore.Store) -> list[Table]:
    """A table on each kind of device."""
    return [store.load("qr", device=place) for place in ("cpu", "cpu:0")]


@given(st.lists(st.lists(st.integers(-1, N - 1), max_size=9), min_size=1, max_size=9))
def test_a_joined_call_is_split_back_whatever_the_sizes(both: list[Table], many: list[list[int]]) -> None:
    """Every request gets its own vectors, and keeps those of its missing ids."""
    for table in both:
        parts = [(np.array(some, np.int64), np.full((len(some), D), -0.5, np.float32)) for some in many]
        compose_batch(table, parts)
        for rows_B, vectors_BD in parts:
            alone_BD = np.full((len(rows_B), D), -0.5, np.float32)
            table.compose(rows_B, alone_BD)
            assert vectors_BD.tobytes() == alone_BD.tobytes()


@pytest.mark.parametrize(("launch", "row", "pays"), [(100.0, 0.01, True), (1.0, 1.0, False), (20.0, 0.1, False)])
def test_batching_pays_where_a_launch_costs_more_than_its_rows(
    both: list[Table], launch: float, row: float, pays: bool
) -> None:
    """One launch of 2,000 ids against two of 1,000; less than a tenth saved is not worth it."""

    def seconds(parts: list[Part]) -> float:
        return launch + row * sum(len(rows_B) for rows_B, _ in parts)

    assert batching_pays(both[0], seconds) is pays


def test_rounds_that_something_else_disturbed_do_not_decide(both: list[Table]) -> None:
    """Medians: not even the first round, which compiles, or a few slow ones change the answer."""
    calls = iter(range(10_000))

    def seconds(parts: list[Part]) -> float:
        return 1e6 if next(calls) in (0, 9, 10, 21, 30) else 1.0

    assert batching_pays(both[0], seconds)


def test_what_joining_saves_is_tried_on_the_device_itself(both: list[Table]) -> None:
    """Without clocks of a test: it gives an answer, and leaves the table as it was."""
    assert [batching_pays(table) in (True, False) for table in both] == [True, True]


def test_the_setting_decides_and_auto_measures_on_a_gpu_alone(
    both: list[Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    """on and off are what they say; on a CPU auto is off without a measurement."""
    gpu = both[1]
    monkeypatch.setattr(batching, "batching_pays", lambda table: table is gpu)
    assert [[uses_batching(setting, table) for table in both] for setting in ("on", "off")] == [
        [True, True],
        [False, False],
    ]
    assert [uses_batching("auto", table) for table in both] == [False, True]
    monkeypatch.setattr(batching, "batching_pays", lambda table: table is None)
    assert not uses_batching("auto", gpu)


@pytest.mark.gpu
def test_on_a_gpu_joined_vectors_are_those_of_a_lookup_alone(
    store: embstore.Store, made: Callable[..., DynamicBatcher], counts: Counts
) -> None:
    """Loads of requests at once, of two schemes, with missing ids."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    tables = [store.load(name, device="cuda") for name in ("full", "qr")]
    random = np.random.default_rng(4)
    asked = [(tables[n % 2], random.integers(-2, N + 2, int(random.integers(1, N)))) for n in range(300)]

    async def main() -> None:
        batcher = made(lookups=counts)
        got = await asyncio.gather(*(batcher.fetch(*one, "default") for one in asked))
        assert all(same(one, table.fetch(keys, "default")) for one, (table, keys) in zip(got, asked, strict=True))
        assert batcher.problem is None

    run(main())
    assert max(requests for requests, _ in counts.launches) > 1
