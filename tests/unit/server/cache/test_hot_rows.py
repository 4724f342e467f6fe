"""The tier of hot rows: never another row's vector, never more memory, and what is asked for most is what stays."""

# Shapes: B rows in a batch, D embedding_dim.

from __future__ import annotations

import resource
import threading
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.errors import ConfigError
from server.cache.hot_rows import HotRows

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
UNTOUCHED = np.float32(-12345.5)
FIXED, SET = 144, 128
BATCHES = st.lists(st.integers(-2, 60), max_size=50)


def tier_of(num_rows: int, embedding_dim: int = 1) -> HotRows:
    """A tier with room for so many rows, a multiple of 8."""
    tier = HotRows(embedding_dim, FIXED + num_rows // 8 * (SET + 32 * embedding_dim))
    assert tier.num_rows == num_rows
    return tier


def vectors_of(rows: Rows, embedding_dim: int = 1, generation: int = 0) -> Floats:
    """A different vector for every row: any 32 bits, also those of NaN."""
    seeds = (rows.astype(np.uint64) + np.uint64(generation * 1000 + 1)) * np.uint64(0x9E3779B97F4A7C15)
    columns = np.arange(1, embedding_dim + 1, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    return ((seeds[:, None] * columns) >> np.uint64(32)).astype(np.uint32).view(np.float32)


def serve(tier: HotRows, rows: Rows, batch: int = 100) -> NDArray[np.bool_]:
    """Ask for rows as a server does, offering what was missing; which of them were hits. Checks every vector."""
    hit = np.ones(len(rows), np.bool_)
    for start in range(0, len(rows), batch):
        wanted = rows[start : start + batch]
        out = np.empty((len(wanted), tier.embedding_dim), np.float32)
        misses = tier.take(wanted, out)
        hit[start + misses] = False
        truth = vectors_of(wanted, tier.embedding_dim)
        tier.put(wanted[misses], truth[misses])
        out[misses] = truth[misses]
        assert out.tobytes() == truth.tobytes()
    return hit


def serve_lru(num_rows: int, rows: Rows) -> NDArray[np.bool_]:
    """What a least-recently-used cache of so many rows hits."""
    held: OrderedDict[int, None] = OrderedDict()
    hit = np.zeros(len(rows), np.bool_)
    for at, row in enumerate(rows.tolist()):
        if row in held:
            held.move_to_end(row)
            hit[at] = True
            continue
        if len(held) == num_rows:
            held.popitem(last=False)
        held[row] = None
    return hit


def zipf(num_ids: int, size: int, seed: int, exponent: float = 1.05) -> Rows:
    """Rows drawn with probability ~ 1 / rank^exponent, the ranks in an order of the seed's."""
    rng = np.random.default_rng(seed)
    shares = np.cumsum(1 / np.arange(1, num_ids + 1) ** exponent)
    return rng.permutation(num_ids)[np.searchsorted(shares / shares[-1], rng.random(size))]


@pytest.mark.parametrize("embedding_dim", [1, 3, 16, 64, 513])
@given(
    num_sets=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["take", "put", "serve"]), BATCHES, st.integers(0, 1)), max_size=40),
)
def test_a_hit_is_what_was_put_bit_for_bit(
    embedding_dim: int, num_sets: int, steps: list[tuple[str, list[int], int]]
) -> None:
    """Against a dict of what was last put for each row: hits are equal, misses are told, nothing else is written."""
    tier, truth = tier_of(8 * num_sets, embedding_dim), {}
    for action, batch, generation in steps:
        rows = np.array(batch, np.int64)
        out = np.full((len(rows), embedding_dim), UNTOUCHED)
        misses = np.flatnonzero(rows >= 0)
        if action != "put":
            misses = tier.take(rows, out)
            assert (np.diff(misses) > 0).all()
            assert (rows[misses] >= 0).all()
            hits = np.setdiff1d(np.flatnonzero(rows >= 0), misses)
            assert all(out[at].tobytes() == truth[int(rows[at])] for at in hits)
            assert (np.delete(out, hits, axis=0) == UNTOUCHED).all()
        if action != "take":
            offered = vectors_of(rows, embedding_dim, generation)
            tier.put(rows[misses] if action == "serve" else rows, offered[misses] if action == "serve" else offered)
            truth |= {int(rows[at]): offered[at].tobytes() for at in misses}
        held = tier.hottest(1000).tolist()
        assert len(held) == len(set(held)) <= tier.num_rows
        assert set(held) <= set(truth)


@given(embedding_dim=st.integers(1, 600), num_bytes=st.integers(0, 300_000))
def test_memory_is_at_most_what_was_asked_for(embedding_dim: int, num_bytes: int) -> None:
    """Keys, counters, sketches and vectors together; a set more would be too much; too little is refused."""
    set_bytes = SET + 32 * embedding_dim
    if num_bytes < FIXED + set_bytes:
        with pytest.raises(ConfigError, match=f"it takes at least {FIXED + set_bytes:,} bytes"):
            HotRows(embedding_dim, num_bytes)
        return
    tier = HotRows(embedding_dim, num_bytes)
    assert num_bytes - set_bytes < tier.num_bytes <= num_bytes
    assert tier.num_rows == (num_bytes - FIXED) // set_bytes * 8


def test_use_allocates_nothing_that_stays() -> None:
    """After 100,000 distinct rows the process holds what it held after the first hundred."""
    tier = tier_of(800, 16)
    serve(tier, np.arange(100))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        serve(tier, np.arange(100_000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 300_000  # the flags of `serve` are 100,000 of it
    assert len(tier.hottest(10_000)) == 800


def test_a_lookup_never_waits_for_the_system_to_give_memory() -> None:
    """All of it is there once the tier is made: filling it for the first time causes no page fault in its memory."""
    tier_of(8).put(np.arange(8), vectors_of(np.arange(8)))
    tier, rows = tier_of(80_000, 256), np.arange(8_000)
    vectors, out = vectors_of(rows, 256), np.zeros((1, 256), np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tier.put(rows, vectors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10
    assert len(tier.take(rows[:1], out)) == 0


@pytest.mark.parametrize("exponent", [0.8, 1.05])
def test_skewed_traffic_hits_more_often_than_lru(exponent: float) -> None:
    """Zipf traffic over ten times the capacity: above an LRU cache of as many rows, and near the best possible."""
    rows = zipf(20_000, 200_000, seed=1, exponent=exponent)
    tier = tier_of(2000)
    ours, theirs = serve(tier, rows)[100_000:].mean(), serve_lru(2000, rows)[100_000:].mean()
    _, counts = np.unique(rows[100_000:], return_counts=True)
    best = np.sort(counts)[-2000:].sum() / 100_000
    assert ours > theirs + 0.01
    assert ours > best - 0.06


def test_a_scan_leaves_the_hot_rows_in_place() -> None:
    """Every row of a table of ten times the capacity, read once: what was hot still hits, unlike with LRU."""
    tier, traffic = tier_of(2000), zipf(20_000, 120_000, seed=2)
    before = serve(tier, traffic[:100_000])[80_000:].mean()
    scan = np.arange(1_000_000, 1_020_000)
    assert serve(tier, scan).sum() == 0
    after = serve(tier, traffic[100_000:104_000]).mean()
    lru = serve_lru(2000, np.concatenate([traffic[:100_000], scan, traffic[100_000:104_000]]))[-4000:].mean()
    assert after > before - 0.08
    assert after > lru + 0.05


def test_new_hot_rows_get_in() -> None:
    """When other rows become hot, all at once, the hit rate is back after thirty times the capacity."""
    tier = tier_of(2000)
    settled = serve(tier, zipf(20_000, 100_000, seed=3))[80_000:].mean()
    moved = serve(tier, zipf(20_000, 80_000, seed=4) + 1_000_000)
    assert moved[:2000].mean() < settled - 0.2
    assert moved[60_000:].mean() > settled - 0.02


def test_a_loop_longer_than_the_cache_still_hits() -> None:
    """Twice the capacity, over and over: half of it hits; LRU hits none."""
    loop = np.tile(np.random.default_rng(0).permutation(4000), 20)
    assert serve(tier_of(2000), loop)[-4000:].mean() > 0.4
    assert serve_lru(2000, loop).sum() == 0


def test_the_rows_taken_most_are_listed_first() -> None:
    """Row r was taken r times: `hottest` lists them backwards, as many as asked for; rows never taken come last."""
    tier = tier_of(800)
    rows = np.arange(1, 41)
    tier.put(rows, vectors_of(rows))
    for least in range(1, 41):
        wanted = rows[rows >= least]
        assert len(tier.take(wanted, np.empty((len(wanted), 1), np.float32))) == 0
    assert tier.hottest(1000).tolist() == list(range(40, 0, -1))
    assert tier.hottest(3).tolist() == [40, 39, 38]
    assert tier.hottest(0).tolist() == []
    assert tier_of(8).hottest(5).tolist() == []


def test_one_set_keeps_the_rows_taken_most() -> None:
    """A tier of eight rows: eight hot ones stay, whatever passes by; a ninth that is hotter replaces the coolest."""
    tier, hot = tier_of(8, 3), np.arange(8)
    for _ in range(3):
        serve(tier, hot)
    assert serve(tier, np.arange(100, 120)).sum() == 0
    assert sorted(tier.hottest(8).tolist()) == hot.tolist()
    serve(tier, hot[1:])
    for _ in range(20):
        serve(tier, np.array([77]))
    assert serve(tier, np.array([77])).all()
    assert len(tier.hottest(8)) == 8


def test_counts_end_where_their_bits_do() -> None:
    """A row taken 10,000 times within an epoch is the hottest, and its neighbours' counts are their own."""
    tier = tier_of(8000)
    rows = np.arange(20)
    tier.put(rows, vectors_of(rows))
    often = np.full(10_000, 7)
    assert len(tier.take(often, np.empty((10_000, 1), np.float32))) == 0
    tier.take(np.full(5, 3), np.empty((5, 1), np.float32))
    assert tier.hottest(2).tolist() == [7, 3]


@pytest.mark.parametrize("embedding_dim", [1, 64, 513])
def test_batches_of_any_length(embedding_dim: int) -> None:
    """None, only absent ones, one row many times, and more than one call's worth: each vector in its place."""
    tier = tier_of(40_000, embedding_dim)
    nothing = np.empty((0, embedding_dim), np.float32)
    assert tier.take(np.empty(0, np.int64), nothing).tolist() == []
    tier.put(np.empty(0, np.int64), nothing)
    absent = np.array([-1, -5, np.iinfo(np.int64).min])
    out = np.full((3, embedding_dim), UNTOUCHED)
    tier.put(absent, out)
    assert tier.take(absent, out).tolist() == []
    assert (out == UNTOUCHED).all()
    assert tier.hottest(10).tolist() == []
    same = np.full(300, 5)
    out = np.empty((300, embedding_dim), np.float32)
    assert tier.take(same, out).tolist() == list(range(300))
    tier.put(same, vectors_of(same, embedding_dim))
    assert tier.take(same, out).tolist() == []
    assert out.tobytes() == vectors_of(same, embedding_dim).tobytes()
    many = np.random.default_rng(0).integers(0, 6000, 9001)
    serve(tier, many, batch=9001)
    assert serve(tier, many, batch=9001).mean() > 0.99


def test_any_row_number_is_its_own() -> None:
    """The first row, the last that there can be, and those whose hashes share a set."""
    tier = tier_of(64)
    rows = np.array([0, 1, (1 << 62), (1 << 63) - 1, (1 << 63) - 2, 1 << 32, (1 << 32) + 1])
    serve(tier, rows)
    assert serve(tier, rows).all()
    assert sorted(tier.hottest(10).tolist()) == sorted(rows.tolist())


def test_rows_may_lie_in_a_request_body() -> None:
    """Read-only and at an odd address."""
    tier = tier_of(64, 2)
    rows = np.frombuffer(b"\0" + np.arange(20).tobytes(), np.uint8)[1:].view(np.int64)
    assert not rows.flags.writeable
    assert not rows.flags.aligned
    serve(tier, rows)
    assert serve(tier, rows).all()


def test_wrong_arrays_are_refused() -> None:
    """Vectors of another shape or type never reach the loops, which do not look."""
    tier, rows = tier_of(8, 4), np.arange(3)
    for shape in ((2, 4), (3, 5), (12,)):
        with pytest.raises(ValueError, match=r"expected vectors \[3, 4\], got"):
            tier.take(rows, np.empty(shape, np.float32))
        with pytest.raises(ValueError, match=r"expected vectors \[3, 4\], got"):
            tier.put(rows, np.empty(shape, np.float32))
    for wrong in (np.empty((3, 4)), np.empty((3, 8), np.float32)[:, ::2]):
        with pytest.raises(TypeError):
            tier.take(rows, wrong)


def test_the_same_calls_have_the_same_effect() -> None:
    """No chance and no time in it: two tiers that were asked the same hold the same rows in the same order."""
    rows = zipf(5000, 30_000, seed=5)
    first, second = tier_of(400), tier_of(400)
    assert (serve(first, rows) == serve(second, rows)).all()
    assert first.hottest(400).tolist() == second.hottest(400).tolist()


def test_threads_see_whole_rows() -> None:
    """Four threads that take, put and list at once: every hit is a whole, right vector."""
    tier, problems = tier_of(256, 129), []

    def work(seed: int) -> None:
        try:
            serve(tier, zipf(2000, 20_000, seed=6) + seed % 2, batch=500)
            held = tier.hottest(10_000).tolist()
            assert len(held) == len(set(held)) <= 256
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_the_loops_keep_the_gil() -> None:
    """What makes a call atomic: none of them lets another thread in."""
    from embstore.kernels.cpu import hot as cpu_hot

    for loop in (cpu_hot.take, cpu_hot.put, cpu_hot.rank):
        assert not loop.targetoptions.get("nogil")
