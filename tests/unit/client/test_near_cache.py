"""The near-cache: never another id's vector, never another version's, never more bytes than allowed."""

from __future__ import annotations

import threading
from typing import Any

import embstore_client
import numpy as np
import pytest
from embstore_client import NearCache, Rows
from embstore_client._core.hot_rows import OVERHEAD_BYTES, SLOT_BYTES, WAYS, HotRows
from embstore_client._core.plan import Plan
from embstore_client._core.planner import Planner
from embstore_client._core.protocol import Reply
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client_cases import Fake, carry, known, vector, vectors

ROOM = 1 << 17


class Cached:
    """A planner with a near-cache, a small server, and a clock of their own."""

    def __init__(self, max_bytes: int = ROOM, max_age_s: float = 1.0, max_ids: int = 1000) -> None:
        self.now, self.fake = 100.0, Fake(version=1)
        self.cache = NearCache(max_bytes, max_age_s)
        self.planner = Planner(near_cache=self.cache, clock=lambda: self.now, max_ids=max_ids)

    def lookup(self, ids: list[int], table: str = "item", **options: Any) -> Rows:
        rows: Rows = carry(self.planner.lookup(table, np.array(ids, np.int64), **options), self.fake.send)
        return rows

    def sizes(self) -> list[int]:
        """Ids of each request since the last look."""
        sizes, self.fake.sizes = self.fake.sizes, []
        return sizes


def test_what_is_known_does_not_travel_again() -> None:
    """A full hit sends nothing, a partial one asks for the misses only, and every row is at its place."""
    cached = Cached()
    first = cached.lookup([1, 2, 3])
    assert cached.sizes() == [3]
    again = cached.lookup([3, 1, 1])
    assert cached.sizes() == []
    assert again.vectors.tolist() == vectors("item", 1, [3, 1, 1]).tolist()
    assert (again.version, again.release, again.missing, again.request_id) == (1, "1", 0, None)
    assert first.release == "1"
    assert not again.vectors.flags.writeable
    mixed = cached.lookup([5, 2, 6, 3])
    assert cached.sizes() == [2]
    assert mixed.vectors.tolist() == vectors("item", 1, [5, 2, 6, 3]).tolist()
    assert mixed.found.tolist() == [True, True, False, True]
    assert (cached.cache.hits, cached.cache.misses, cached.cache.evictions) == (5, 2, 0)


def test_missing_ids_are_asked_for_every_time() -> None:
    """An id that the table does not know is not kept: it may come, and its policy is the server's."""
    cached = Cached()
    for _ in range(2):
        rows = cached.lookup([1, 6])
        assert rows.found.tolist() == [True, False]
    assert cached.sizes() == [2, 1]


def test_a_label_is_believed_for_its_time() -> None:
    """Within max_age_s a label's version needs no asking; after it one id is asked, and the rest is still known."""
    cached = Cached(max_age_s=1.0)
    cached.lookup([1, 2, 3])
    cached.now += 0.99
    cached.lookup([1, 2, 3])
    cached.now += 0.02
    cached.lookup([1, 2, 3])
    cached.now += 0.99
    cached.lookup([1, 2, 3])
    assert cached.sizes() == [3, 1]


def test_a_new_version_replaces_the_old_one() -> None:
    """When a reply names a new version everything is asked for at it, and the old one's rows are gone."""
    cached = Cached()
    cached.lookup([1, 2, 3])
    cached.sizes()
    cached.fake.version = 2
    cached.now += 2
    rows = cached.lookup([1, 2, 3, 4])
    assert rows.version == 2
    assert rows.vectors.tolist() == vectors("item", 2, [1, 2, 3, 4]).tolist()
    assert cached.sizes() == [1, 3]
    assert "/versions/2/" in cached.fake.requests[-1].target
    cached.lookup([1, 2, 3, 4])
    assert cached.sizes() == []
    cached.lookup([1], version=1)
    assert cached.sizes() == [1]


def test_a_version_goes_back_too() -> None:
    """A rollback is a change like any other: a lower number that a reply names counts."""
    cached = Cached()
    cached.fake.version = 9
    cached.lookup([1, 2])
    cached.fake.version = 8
    cached.now += 2
    rows = cached.lookup([1, 2, 3])
    assert (rows.version, rows.vectors.tolist()) == (8, vectors("item", 8, [1, 2, 3]).tolist())


def test_an_answer_that_comes_late_does_not_bring_the_old_version_back() -> None:
    """Of two calls under way, the one that began later knows better which version a label names."""
    cached = Cached()
    late = cached.planner.lookup("item", np.array([1]))
    replies = [late.requests[0].parse(cached.fake.send(late.requests[0]))]
    cached.now += 0.1
    cached.fake.version = 2
    cached.lookup([2])
    late.merge(replies)
    assert cached.lookup([2]).version == 2
    assert cached.sizes() == [1, 1]


def test_a_pinned_version_needs_no_asking() -> None:
    """A version never changes: what is known of it holds however old it is."""
    cached = Cached()
    cached.lookup([1, 2], version=4)
    cached.now += 1e9
    assert cached.lookup([2, 1], version=4).vectors.tolist() == vectors("item", 4, [2, 1]).tolist()
    assert cached.sizes() == [2]


def test_rows_of_another_length_end_what_is_known() -> None:
    """A store that is made anew counts from 1 again: where its rows are longer or shorter, all is asked again, once."""
    cached = Cached()

    def lookup(width: int) -> Any:
        plan: Any = cached.planner.lookup("item", np.array([1, 2, 3]), version=1)
        sent = []
        while isinstance(plan, Plan):
            sent += [len(request.body) // 8 for request in plan.requests]
            assert len(sent) < 4
            plan = plan.merge([request.parse(reply_of(request, width)) for request in plan.requests])
        return sent, plan.vectors.tolist()

    cached.planner.lookup("item", np.array([1, 2]), version=1)
    plan = cached.planner.lookup("item", np.array([1, 2]), version=1)
    plan.merge([plan.requests[0].parse(reply_of(plan.requests[0], 2))])
    assert lookup(4) == ([1, 3], [[7.0] * 4] * 3)
    assert lookup(4) == ([], [[7.0] * 4] * 3)


def reply_of(request: Any, width: int) -> Reply:
    """Version 1 has the same row for every id."""
    shape = (len(request.body) // 8, width)
    headers = {"x-embedding-version": "1", "x-embedding-shape": f"{shape[0]},{width}", "x-embedding-missing": "0"}
    body = np.full(shape, 7.0, "<f4").tobytes()
    return Reply(200, headers | {"content-type": "application/octet-stream", "x-embedding-dtype": "float32"}, body)


def test_what_is_not_for_the_cache_passes_by() -> None:
    """String keys and bags always ask the server."""
    cached = Cached()
    for _ in range(2):
        carry(cached.planner.lookup("tag", ["a", "b"]), cached.fake.send)
        cached.lookup([1, 2], offsets=[0], pooling="sum")
    assert cached.sizes() == [2] * 4
    assert (cached.cache.hits, cached.cache.misses) == (0, 0)


STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 400), max_size=40),
        st.sampled_from(["item", "seller"]),
        st.sampled_from(["float32", "float16", "bfloat16"]),
        st.sampled_from([{}, {}, {"label": "stable"}, {"version": 2}, {"on_missing": "hash"}]),
        st.sampled_from([0.0, 0.3, 1.5]),
        st.integers(1, 3),
    ),
    max_size=25,
)


@settings(max_examples=50)
@given(STEPS, st.sampled_from([1500, 6000, 12_000, ROOM]), st.integers(7, 50))
def test_every_answer_is_what_some_believable_version_has(steps: list[Any], max_bytes: int, max_ids: int) -> None:
    """Against a model: whatever is kept, evicted, swapped or aged, a row is its own id's, and all of one version that
    was current within max_age_s; and the bytes stay within theirs."""
    cached = Cached(max_bytes, 1.0, max_ids)
    current = [(cached.now, 1)]
    for ids, table, dtype, options, passed, version in steps:
        cached.now += passed
        if version != cached.fake.version:
            cached.fake.version = version
            current.append((cached.now, version))
        rows = cached.lookup(ids, table, dtype=dtype, **options)
        assert rows.vectors.tolist() == vectors(table, rows.version, ids).tolist()
        assert rows.found.tolist() == [known(i) for i in ids]
        ends = [at for at, _ in current[1:]] + [np.inf]
        believable = {v for (_, v), end in zip(current, ends, strict=True) if end > cached.now - 1.0}
        assert rows.version in ({2} if "version" in options else believable)
        assert cached.cache.num_bytes <= max_bytes


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(-50, 2**62), max_size=30), max_size=20), st.integers(2, 5))
def test_a_table_of_rows_is_a_dict_that_forgets(batches: list[list[int]], num_sets: int) -> None:
    """What is got is what was put under that id, in exactly the bytes that it was given."""
    table = HotRows(OVERHEAD_BYTES + num_sets * WAYS * (4 + SLOT_BYTES), 4)
    for batch in batches:
        ids = np.array(batch, np.int64)
        for _ in range(2):
            places, rows = table.get(ids)
            assert rows.view("<u4")[:, 0].tolist() == (ids[places] % 1_000_003).tolist()
            table.put(ids, (ids % 1_000_003).astype("<u4")[:, None].view(np.uint8))
        assert len(table) <= num_sets * WAYS
    assert table.num_bytes == OVERHEAD_BYTES + num_sets * WAYS * (4 + SLOT_BYTES)


def test_hot_ids_survive_a_scan() -> None:
    """Ids that are asked for often stay, however many ids are asked for once in between."""
    cached = Cached(50_000)
    hot = [i for i in range(500) if known(i)][:200]
    for start in range(1000, 40_000, 500):
        cached.lookup(hot)
        cached.lookup(list(range(start, start + 500)))
    before = cached.cache.hits
    cached.lookup(hot)
    assert cached.cache.hits - before >= 190


def test_a_new_hot_set_takes_the_place_of_the_old_one() -> None:
    """What was hot ages: the ids that are asked for now come in, and evictions are counted."""
    cached = Cached(20_000)
    for offset in (0, 10_000):
        ids = [i for i in range(offset, offset + 450) if known(i)]
        for _ in range(100):
            cached.lookup(ids)
    before = cached.cache.hits
    cached.lookup(ids)
    assert cached.cache.hits - before >= 340
    assert cached.cache.evictions >= 300


def test_many_tables_share_the_bytes() -> None:
    """Tables have equal shares of the bytes, and rows too large for a share are not kept."""
    cached = Cached(64_000)
    for number in range(100):
        cached.lookup([1, 2, 3], table=f"table-{number}")
        assert cached.cache.num_bytes <= 64_000
    assert cached.sizes() == [3] * 100
    small = Cached(100)
    for _ in range(2):
        small.lookup([1])
    assert small.sizes() == [1, 1]
    assert small.cache.num_bytes == 0


def test_clear_forgets_everything() -> None:
    """After `clear` the server is asked again."""
    cached = Cached()
    cached.lookup([1])
    cached.cache.clear()
    assert cached.cache.num_bytes == 0
    cached.lookup([1])
    assert cached.sizes() == [1, 1]


def test_threads_share_a_cache() -> None:
    """Threads that ask, swap and evict at once all get their own ids' rows of one version."""
    cached = Cached(30_000, max_age_s=0.0)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for step in range(60):
                ids = rng.integers(0, 2000, 50)
                fake = Fake(version=1 + step // 20)
                rows: Rows = carry(cached.planner.lookup("item", ids), fake.send)
                if rows.vectors.tolist() != [vector("item", rows.version, int(i)) for i in ids]:
                    wrong.append(rows)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert cached.cache.num_bytes <= 30_000


def test_a_cache_belongs_to_one_client() -> None:
    """Two clients may speak to two servers: the second one is refused the first one's cache."""
    cache = NearCache(ROOM)
    with (
        embstore_client.EmbeddingClient(near_cache=cache),
        pytest.raises(ValueError, match="belongs to another client"),
    ):
        embstore_client.EmbeddingClient(near_cache=cache)


@pytest.mark.parametrize("client", [embstore_client.EmbeddingClient, embstore_client.AsyncEmbeddingClient])
@pytest.mark.parametrize("options", [{"verify": "missing.pem"}, {"api_key": "two words"}], ids=str)
def test_a_client_that_cannot_be_made_takes_no_cache(client: Any, options: dict[str, Any]) -> None:
    """After a wrong argument the same cache goes to the client that is made next."""
    cache = NearCache(ROOM)
    with pytest.raises((OSError, ValueError)):
        client("https://a", near_cache=cache, **options)
    client("http://a", near_cache=cache)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0,), ValueError), ((1.5,), TypeError), ((True,), TypeError), ((1, -1.0), ValueError), ((1, "1"), TypeError)],
    ids=str,
)
def test_a_cache_that_cannot_work_is_not_made(arguments: Any, error: type[Exception]) -> None:
    """Sizes and ages that make no sense raise at once."""
    with pytest.raises(error, match="must be"):
        embstore_client.NearCache(*arguments)
