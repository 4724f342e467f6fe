"""Rows by frequency, rows by a learned map, and what is known of ids before a table is built."""

# Shapes: N num_embeddings, D embedding_dim, M num_buckets, H hot ids, C cold rows, L dimensions learned from.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.fits import weighted_relative_error
from support.scheme_cases import looked_up, same_bits, served, stored_tensors
from torch import Tensor

from embstore import open_store, table
from embstore.common.progress import Silent
from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.fitting.clusters import many_clusters, share_out
from embstore.hashing import bucket
from embstore.kernels.cpu import split as cpu_split
from embstore.quantize import dequantize, for_kernels, pack
from embstore.schemes import Frequency, Full, Hash, LearnedHash
from embstore.schemes.frequency import FrequencyConfig, expected_collisions, usual_hot_share
from embstore.train.config import TableConfig, TrainConfig, load_config
from embstore.train.data import read_dataset
from embstore.train.model import make_table
from embstore.train.prepare import CHEAP_DIM, knowledge
from embstore.train.run import train

N, D, M = 53, 12, 7
HUGE = [0, 4, 5, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**53 + 1, 2**62 - 1]
ZIPF = 1 / torch.arange(1, 1001, dtype=torch.float64)


def vectors_of(module: Any) -> Tensor:
    """The vectors of all ids."""
    vectors: Tensor = module(torch.arange(module.num_embeddings)).detach()
    return vectors


# ---- frequency: where ids lead ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("num_hot", [0, 1, 5])
def test_hot_ids_own_rows_and_the_others_share(num_hot: int, seed: int | None) -> None:
    """Row x for x < H, else H + (x - H) mod C or the hash's bucket of C, exactly, for ids up to 2^62."""
    module = Frequency(2**62, 1, num_hot=num_hot, num_cold=4, seed=seed)
    module.weight.data = torch.arange(float(num_hot + 4))[:, None]
    hashed = [0] * len(HUGE) if seed is None else bucket(np.array(HUGE), 4, seed).tolist()
    shared = [(i - num_hot) % 4 if seed is None else b for i, b in zip(HUGE, hashed, strict=True)]
    expected = [[float(i if i < num_hot else num_hot + row)] for i, row in zip(HUGE, shared, strict=True)]
    ids = torch.tensor(HUGE)
    for vectors in (module(ids), looked_up(module, ids), served(module, ids)):
        assert vectors.tolist() == expected


def test_all_hot_is_the_full_table_and_none_hot_the_hashing_trick() -> None:
    """H = n is `full`, with or without rows to spare; H = 0 is `hash`, by mod and by any seed."""
    full = Full(N, D)
    for num_cold in (0, 3):
        module = Frequency(N, D, num_hot=N, num_cold=num_cold)
        module.load_state_dict({"weight": torch.cat([full.weight.detach(), torch.zeros(num_cold, D)])})
        assert same_bits(vectors_of(module), vectors_of(full))
        assert same_bits(served(module, torch.arange(N)), vectors_of(full))
    for seed in (None, 3):
        plain, module = Hash(N, D, num_buckets=M, seed=seed), Frequency(N, D, num_hot=0, num_cold=M, seed=seed)
        module.load_state_dict(plain.state_dict())
        assert same_bits(vectors_of(module), vectors_of(plain))


# ---- frequency: how a budget is split ---------------------------------------------------------------------------


def test_the_usual_split_spends_on_cold_when_mild_and_on_hot_when_extreme() -> None:
    """CAFE's numbers: 0.3 of the rows are hot at 2x, 0.9 from 2,000x on, growing in between."""
    shares = [usual_hot_share(ratio) for ratio in (1.1, 2, 4, 16, 100, 2000, 10**6)]
    assert shares == sorted(shares)
    assert shares[0] == shares[1] == pytest.approx(0.3)
    assert shares[3] == pytest.approx(0.48, abs=0.005)
    assert shares[-2] == shares[-1] == pytest.approx(0.9)
    config = Frequency.from_budget(1000, 4, 500 * 16).config
    assert (config.num_hot, config.num_cold) == (150, 350)


def test_a_share_may_be_asked_for() -> None:
    """hot_share of the rows, one row left for the cold; a row for every id where the budget has it."""
    for share, num_hot in [(0.0, 0), (0.25, 25), (1.0, 99)]:
        config = Frequency.from_budget(1000, 4, 1600, hot_share=share).config
        assert (config.num_hot, config.num_cold) == (num_hot, 100 - num_hot)
    config = Frequency.from_budget(100, 4, 1600, hot_share=0.0).config
    assert (config.num_hot, config.num_cold) == (100, 0)
    assert Frequency.from_budget(1000, 4, 16).config.num_hot == 0


@given(
    frequencies=st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any),
    num_hot=st.integers(0, 5),
    num_cold=st.integers(1, 6),
    seed=st.none() | st.integers(0, 5),
)
def test_expected_collisions_count_pairs(frequencies: list[int], num_hot: int, num_cold: int, seed: int | None) -> None:
    """For a lookup, a second event drawn from those of the same row: how often it is another id's, summed by hand."""
    num_hot = min(num_hot, len(frequencies))
    config = FrequencyConfig(
        num_embeddings=len(frequencies), embedding_dim=1, num_hot=num_hot, num_cold=num_cold, seed=seed
    )
    cold = bucket(np.arange(len(frequencies)), num_cold, seed) if seed is not None else None
    rows: dict[int, list[int]] = {}
    for id_, frequency in enumerate(frequencies):
        shared = (id_ - num_hot) % num_cold if cold is None else int(cold[id_])
        rows.setdefault(id_ if id_ < num_hot else num_hot + shared, []).append(frequency)
    apart = sum(f * (sum(row) - f) / sum(row) for row in rows.values() for f in row if f) / sum(frequencies)
    found = expected_collisions(config, torch.tensor(frequencies, dtype=torch.float64))
    assert found == pytest.approx(apart, abs=1e-12)


@pytest.mark.parametrize("seed", [None, 1])
def test_frequencies_choose_the_split_with_the_fewest_collisions(seed: int | None) -> None:
    """Of the shares tried none collides less; for falling frequencies a tenth of the rows stays for the cold."""
    module = Frequency.from_budget(1000, 4, 16 * 100, frequencies=ZIPF, seed=seed)
    assert (module.config.num_hot, module.config.num_cold) == (90, 10)
    rising = Frequency.from_budget(1000, 4, 16 * 100, frequencies=ZIPF.flip(0), seed=seed).config
    fewest = expected_collisions(rising, ZIPF.flip(0))
    for num_hot in (0, 25, 50, 75, 90):
        other = FrequencyConfig(
            num_embeddings=1000, embedding_dim=4, num_hot=num_hot, num_cold=100 - num_hot, seed=seed
        )
        assert fewest <= expected_collisions(other, ZIPF.flip(0)) + 1e-9


@pytest.mark.parametrize(
    ("frequencies", "named"),
    [
        (np.ones(9), r"frequencies have shape \[9\], there are 10 ids"),
        (np.array([1.0] * 9 + [np.nan]), "got nan for id 9"),
        (np.array([-1.0] + [1.0] * 9), "got -1.0 for id 0"),
        (np.array([np.inf] * 10), "got inf for id 0"),
        (np.zeros(10), "all 10 frequencies are 0"),
    ],
)
def test_frequencies_that_are_none_are_refused(frequencies: NDArray[np.float64], named: str) -> None:
    """DataError says what is wrong with them, and for which id."""
    with pytest.raises(DataError, match=named):
        Frequency.from_budget(10, 4, 64, frequencies=frequencies)
    with pytest.raises(DataError, match=named):
        LearnedHash(10, 4, num_buckets=3, vectors=torch.rand(10, 2), frequencies=frequencies)


def test_a_fit_keeps_hot_vectors_and_averages_the_others() -> None:
    """Hot rows are exact; shared rows are weighted means, so no other rows would be closer."""
    vectors_ND = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    weights_N = ZIPF[:200]
    module = Frequency.fit(vectors_ND, 16 * 20, weights_N=weights_N)
    num_hot, num_cold = module.config.num_hot, module.config.num_cold
    assert (num_hot, num_cold) == (18, 2)
    assert same_bits(vectors_of(module)[:num_hot], vectors_ND[:num_hot])
    for row in range(num_cold):
        ids = torch.arange(num_hot + row, 200, num_cold)
        mean = (vectors_ND[ids] * weights_N[ids, None]).sum(dim=0) / weights_N[ids].sum()
        torch.testing.assert_close(module.weight[num_hot + row].detach(), mean.float())
    assert same_bits(vectors_of(Frequency.fit(vectors_ND, 16 * 200)), vectors_ND)


# ---- the split table's loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_hot", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_a_split_table_reads_both_parts(dtype: str, num_hot: int) -> None:
    """Hot ids from the float32 table, the others from the packed one, by position or by mod; negative ids from none."""
    generator = np.random.default_rng(0)
    hot = generator.random((num_hot, 6), np.float32)
    packed = pack(generator.random((10, 6), np.float32), dtype)
    cold = dequantize(torch.from_numpy(packed.copy())).numpy()
    ids = np.concatenate([np.arange(num_hot + 10), [-1, -(2**63)], np.arange(num_hot + 10)[::-1]])
    for num_cold, shared in ((0, ids - num_hot), (4, (ids - num_hot) % 4)):
        out = np.full((len(ids), 6), 0.125, np.float32)
        cpu_split.gather_split(for_kernels(packed), hot, num_cold, ids, out)
        for i, id_ in enumerate(ids):
            expected = np.full(6, 0.125) if id_ < 0 else hot[id_] if id_ < num_hot else cold[shared[i]]
            np.testing.assert_array_equal(out[i], expected.astype(np.float32))


# ---- learned_hash: the map --------------------------------------------------------------------------------------


def test_without_vectors_it_is_the_hashing_trick() -> None:
    """A module that was told nothing reads row x mod m, from a budget too."""
    plain = Hash(N, D, num_buckets=M)
    module = LearnedHash(N, D, num_buckets=M, num_hot=2)
    module.load_state_dict({"weight": plain.weight.detach(), "map": module.map})
    assert same_bits(vectors_of(module), vectors_of(plain))
    budgeted = LearnedHash.from_budget(N, D, 4 * N + 4 * D * M)
    assert budgeted.map.tolist() == [i % M for i in range(N)]


def test_a_map_to_itself_is_the_full_table() -> None:
    """A row for every id: learning gives id x row x, and there may be rows to spare."""
    full = Full(N, D)
    for num_buckets in (N, N + 2):
        module = LearnedHash(N, D, num_buckets=num_buckets, num_hot=N, vectors=torch.rand(N, 3), frequencies=ZIPF[:N])
        module.load_state_dict({"weight": torch.cat([full.weight.detach(), torch.ones(num_buckets - N, D)])}, False)
        assert same_bits(vectors_of(module), vectors_of(full))
        assert same_bits(served(module, torch.arange(N)), vectors_of(full))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_any_map_is_followed(dtype: str) -> None:
    """Each id's vector is the row that the map says, first and last rows included, in every storage."""
    module = LearnedHash(40, 8, num_buckets=9)
    row_of = torch.randint(9, (40,), generator=torch.Generator().manual_seed(0)).int()
    row_of[[0, 39]] = torch.tensor([8, 0], dtype=torch.int32)
    module.map.copy_(row_of)
    rows = dequantize(stored_tensors(module, dtype)["weight"]).float()
    for ids in (torch.arange(40), torch.arange(40).repeat(3).flip(0), torch.tensor([], dtype=torch.int64)):
        assert same_bits(served(module, ids, dtype), rows[row_of[ids].long()])


def planted(num_ids: int, num_clusters: int, width: int, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Vectors around distant centres, and the cluster of each."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(num_clusters, width, generator=generator) * 5
    cluster_N = torch.arange(num_ids) % num_clusters
    return centres[cluster_N] + noise * torch.randn(num_ids, width, generator=generator), cluster_N


def same_partition(labels_N: Tensor, cluster_N: Tensor) -> bool:
    """Whether two labellings put the same ids together."""
    pairs = set(zip(labels_N.tolist(), cluster_N.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("frequencies", [None, ZIPF[:300], ZIPF[:300].numpy(), torch.ones(300)])
def test_members_of_a_cluster_share_a_row(frequencies: Any) -> None:
    """Planted clusters are found: ids share a row exactly if they are alike, and the hot ids share with nobody."""
    vectors_NL, cluster_N = planted(300, 12, 8)
    module = LearnedHash(300, D, num_buckets=20, num_hot=8, vectors=vectors_NL, frequencies=frequencies)
    row_N = module.map.long()
    assert row_N[:8].tolist() == list(range(8))
    assert (row_N[8:] >= 8).all()
    assert same_partition(row_N[8:], cluster_N[8:])
    assert same_bits(served(module, torch.arange(300)), module.weight.detach()[row_N])


def test_hot_is_who_occurs_most_not_who_comes_first() -> None:
    """Private rows follow the frequencies given, ties by id."""
    frequencies = torch.ones(50)
    frequencies[[40, 17, 30]] = torch.tensor([9.0, 5.0, 5.0])
    module = LearnedHash(50, D, num_buckets=10, num_hot=4)
    module.learn_map(planted(50, 5, 4)[0], frequencies)
    rows = module.map.tolist()
    assert [rows[i] for i in (40, 17, 30, 0)] == [0, 1, 2, 3]
    assert sorted(rows)[:5] == [0, 1, 2, 3, 4]


def test_ids_that_never_occur_are_clustered_too() -> None:
    """Where only hot ids have counts, the others are alike in weight; a generator's seed decides the map."""
    vectors_NL, cluster_N = planted(60, 6, 4)
    frequencies = torch.where(torch.arange(60) < 2, 1.0, 0.0)
    maps = []
    for seed in (0, 0):
        module = LearnedHash(60, D, num_buckets=8, num_hot=2)
        module.learn_map(vectors_NL, frequencies, generator=torch.Generator().manual_seed(seed))
        maps.append(module.map)
    assert same_partition(maps[0][2:], cluster_N[2:])
    assert torch.equal(*maps)


@pytest.mark.parametrize(
    "vectors", [torch.rand(9, 3), torch.rand(10), torch.full((10, 2), torch.nan), np.ones((10, 0))]
)
def test_vectors_that_cannot_teach_are_refused(vectors: Any) -> None:
    """One finite vector for each id, or DataError."""
    with pytest.raises(DataError, match="vectors"):
        LearnedHash(10, D, num_buckets=4).learn_map(vectors)


# ---- learned_hash: bytes, damage, fit ---------------------------------------------------------------------------


def test_the_map_counts_and_sets_the_ceiling() -> None:
    """4 m D + 4 n bytes; a ratio past D is refused with the ceiling; hot rows are a share of the rows."""
    module = LearnedHash.from_budget(1000, 16, 4 * 1000 + 64 * 10 + 63)
    assert (module.config.num_buckets, module.config.num_hot) == (10, 4)
    assert module.num_bytes() == 4 * 1000 + 64 * 10
    assert module.num_bytes("int8") == 4 * 1000 + 24 * 10
    with pytest.raises(ConfigError, match=r"the least is 4,064, because its map takes 4 bytes an id; .* below 16"):
        LearnedHash.from_budget(1000, 16, 4063)
    config = LearnedHash.from_budget(1000, 16, 4064, hot_share=1.0).config
    assert (config.num_buckets, config.num_hot) == (1, 0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: LearnedHash(10, 4, num_buckets=0), "num_buckets must be at least 1"),
        (lambda: LearnedHash(10, 4, num_buckets=2**31), "num_buckets must be .* at most 2147483647"),
        (lambda: LearnedHash(10, 4, num_buckets=3, num_hot=3), "num_hot must be at least 0 and at most 2, got 3"),
        (lambda: LearnedHash(10, 4, num_buckets=12, num_hot=11), "num_hot must be at least 0 and at most 10, got 11"),
        (lambda: LearnedHash.from_budget(10, 4, 100, hot_share=1.5), "hot_share must be"),
        (lambda: LearnedHash.from_budget(10, 4, 100, num_hot=1), "either a budget or num_hot"),
        (lambda: Frequency(10, 4, num_hot=11, num_cold=1), "num_hot must be at least 0 and at most 10, got 11"),
        (lambda: Frequency(10, 4, num_hot=-1, num_cold=1), "num_hot must be at least 0"),
        (lambda: Frequency(10, 4, num_hot=9, num_cold=0), "num_cold must be at least 1"),
        (lambda: Frequency(10, 4, num_hot=9, num_cold=1, seed=-1), "seed must be at least 0"),
        (lambda: Frequency.from_budget(10, 4, 15), "the least is 16"),
        (lambda: Frequency.from_budget(10, 4, 99, hot_share=-0.1), "hot_share must be at least 0 and at most 1"),
        (lambda: Frequency.from_budget(10, 4, 99, num_hot=3), "either a budget or num_hot, not both"),
        (lambda: Frequency.from_budget(10, 4, 99, num_cold=3), "either a budget or num_cold, not both"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, named: str) -> None:
    """ConfigError names the parameter and what it may be, or the least budget."""
    with pytest.raises(ConfigError, match=named):
        call()


@pytest.mark.parametrize("row", [-1, M, 2**31 - 1, -(2**31)])
def test_a_map_that_leads_out_of_the_table_is_refused(row: int, tmp_path: Path) -> None:
    """A damaged or forged map is found when a table is loaded, before a lookup follows it."""
    module = LearnedHash(N, D, num_buckets=M)
    store = open_store(tmp_path)
    stored = store.read_version("item", store.publish("item", module))
    damaged = stored.arrays["map"].copy()
    damaged[N - 1] = row
    with pytest.raises(VerificationFailed, match=f"'item' version 1: the map leads to row {row}, the table has 7 rows"):
        table.make_table(stored.manifest, stored.arrays | {"map": damaged})
    assert store.load("item").lookup([N - 1]).tolist() == module(torch.tensor([N - 1])).tolist()


def test_a_fit_finds_the_clusters_of_the_vectors() -> None:
    """Vectors in as many clusters as there are rows are met almost exactly; without weights no id is hot."""
    vectors_ND, cluster_N = planted(400, 10, D, noise=0.01)
    module = LearnedHash.fit(vectors_ND, 4 * 400 + 4 * D * 10, generator=torch.Generator().manual_seed(0))
    assert (module.config.num_buckets, module.config.num_hot) == (10, 0)
    assert same_partition(module.map, cluster_N)
    assert weighted_relative_error(vectors_ND, vectors_of(module)) < 0.01


def test_a_fit_with_weights_keeps_the_heavy_ids_apart() -> None:
    """The heaviest ids, wherever they stand, get rows of their own; every other row is a weighted mean."""
    vectors_ND = torch.randn(300, D, generator=torch.Generator().manual_seed(0))
    weights_N = torch.ones(300)
    weights_N[[7, 250, 100]] = 1000.0
    module = LearnedHash.fit(vectors_ND, 4 * 300 + 4 * D * 10, weights_N=weights_N)
    assert module.config.num_hot == 4
    torch.testing.assert_close(vectors_of(module)[[7, 250, 100]], vectors_ND[[7, 250, 100]])
    row_N = module.map.long()
    for row in range(10):
        here = row_N == row
        mean = (vectors_ND[here] * weights_N[here, None]).sum(dim=0) / weights_N[here].sum()
        torch.testing.assert_close(module.weight[row].detach(), mean)


def test_two_levels_find_the_clusters_of_one() -> None:
    """Where one level would take too long, clusters are found in groups, with and without a last pass over all."""
    vectors_ND, cluster_N = planted(3000, 30, 8)
    told: list[tuple[str, int, int]] = []
    for affordable in (1e6, 0.0):
        generator = torch.Generator().manual_seed(0)
        centroids, labels = many_clusters(
            vectors_ND, 120, generator=generator, affordable=affordable, progress=lambda *words: told.append(words)
        )
        assert told.pop() == ("k-means in groups", 10, 10)
        assert centroids.shape == (120, 8)
        assert int(labels.max()) < 120
        assert weighted_relative_error(vectors_ND, centroids[labels]) < 0.05
        inside = {int(label): set(cluster_N[labels == label].tolist()) for label in labels.unique()}
        assert sum(len(clusters) == 1 for clusters in inside.values()) >= 0.9 * len(inside)


@given(
    want=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    most=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    total=st.integers(1, 60),
)
def test_shares_add_up(want: list[float], most: list[int], total: int) -> None:
    """At least one where there is room, at most as many as there is room for, and the sum asked for."""
    most_G = torch.tensor(most[: len(want)])
    least, room = int((most_G > 0).sum()), int(most_G.sum())
    if room == 0:
        return
    total = max(least, min(total, room))
    share_G = share_out(torch.tensor(want, dtype=torch.float64), most_G, total)
    assert int(share_G.sum()) == total
    assert ((share_G >= (most_G > 0).long()) & (share_G <= most_G)).all()


# ---- what is known before a table is built ----------------------------------------------------------------------

CONFIG = """
[data]
path = "events.parquet"
user = "user"
item = "item"
time = "time"
[model]
embedding_dim = 16
[tables.user]
scheme = "{user}"
{user_size}
[tables.item]
scheme = "{item}"
ratio = 4
[training]
batch_size = 256
learning_rate = 0.2
l2 = 0.03
max_epochs = 3
"""


def config_of(folder: Path, user: str, item: str, user_size: str = "ratio = 1") -> TrainConfig:
    """300 users with 12 events each, all of them on the 20 items of one of eight topics."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(300), 12)
    topic_of_user = rng.integers(8, size=300)
    items = topic_of_user[users] + 8 * rng.integers(20, size=len(users))
    events = pl.DataFrame({"user": users, "item": items, "time": rng.permutation(len(users))})
    events.write_parquet(folder / "events.parquet")
    path = folder / "config.toml"
    path.write_text(CONFIG.format(user=user, item=item, user_size=user_size))
    return load_config(path)


class Lines(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        """Kept."""
        self.lines.append(message)

    def epoch_done(self, *facts: Any) -> None:
        """Kept."""
        self.lines.append(f"epoch {facts}")


def test_schemes_learn_what_they_ask_for(tmp_path: Path) -> None:
    """Counts, histories and vectors of the training events, for the tables that use them and no others."""
    config = config_of(tmp_path, "lma", "learned_hash")
    dataset, report = read_dataset(config.data, 0), Lines()
    known = knowledge(config, dataset, torch.device("cpu"), report)
    assert {name: set(found) for name, found in known.items()} == {
        "user": {"histories"},
        "item": {"frequencies", "vectors"},
    }
    pairs = torch.from_numpy(np.stack([dataset.train.users_E, dataset.train.items_E], axis=1))
    assert torch.equal(known["user"]["histories"], pairs)
    counts = torch.bincount(pairs[:, 1], minlength=len(dataset.items)).double()
    assert torch.equal(known["item"]["frequencies"], counts)
    vectors = known["item"]["vectors"]
    assert (vectors.shape, vectors.dtype) == ((len(dataset.items), CHEAP_DIM), torch.float32)
    assert vectors.isfinite().all()
    assert len(report.lines) == 1
    assert "8 columns" in report.lines[0]


def test_nothing_is_trained_for_schemes_that_ask_for_nothing(tmp_path: Path) -> None:
    """Plain tables: no knowledge, no lines, no time."""
    config, report = config_of(tmp_path, "full", "hash"), Lines()
    assert knowledge(config, read_dataset(config.data, 0), torch.device("cpu"), report) == {"user": {}, "item": {}}
    assert report.lines == []


def test_a_run_learns_its_map_from_training_events(tmp_path: Path) -> None:
    """The published map puts items of a topic together, far more often than chance, and the same seed repeats it."""
    config = config_of(tmp_path, "full", "learned_hash")
    dataset = read_dataset(config.data, 0)
    store = open_store(tmp_path / "store")
    for _ in range(2):
        train(config, store, report=Silent(), device="cpu")
    first, again = (store.load("item", version).tensors["map"] for version in (1, 2))
    np.testing.assert_array_equal(first, again)
    topics = np.asarray(dataset.items.keys) % 8
    together = (first[:, None] == first[None, :]) & ~np.eye(len(first), dtype=bool)
    assert together.any()
    assert (topics[:, None] == topics[None, :])[together].mean() > 0.5  # by chance: 1 / 8


def test_a_map_is_learned_for_sizes_given_outright(tmp_path: Path) -> None:
    """With num_buckets instead of a ratio the scheme is told the same."""
    config = config_of(tmp_path, "learned_hash", "full", "num_buckets = 20\nnum_hot = 3")
    known = {"frequencies": ZIPF[:40], "vectors": planted(40, 17, 4)[0]}
    told: Any = make_table("user", config.tables.user, 40, config.model, 0, known)
    assert told.map[:3].tolist() == [0, 1, 2]
    assert (told.map[3:] >= 3).all()
    untold: Any = make_table("user", config.tables.user, 40, config.model, 0)
    assert untold.map.tolist() == [i % 20 for i in range(40)]


def test_options_that_divide_up_a_budget_need_one(tmp_path: Path) -> None:
    """hot_share with a ratio is taken; with sizes given outright it is refused, and a misspelt one is named."""
    model = config_of(tmp_path, "full", "full").model
    options: dict[str, Any] = {"num_hot": 3, "num_cold": 4}
    module: Any = make_table("item", TableConfig(scheme="frequency", ratio=4, options={"hot_share": 0.5}), 80, model, 0)
    assert (module.config.num_hot, module.config.num_cold) == (10, 10)
    with pytest.raises(ConfigError, match=r"tables\.item: hot_share divides up a budget: give ratio or budget with it"):
        make_table("item", TableConfig(scheme="frequency", options=options | {"hot_share": 0.5}), 80, model, 0)
    with pytest.raises(ConfigError, match="unknown key hot_shares; did you mean hot_share"):
        make_table("item", TableConfig(scheme="frequency", ratio=4, options={"hot_shares": 0.5}), 80, model, 0)
    with pytest.raises(ConfigError, match="unknown key frequencies"):
        make_table("item", TableConfig(scheme="frequency", ratio=4, options={"frequencies": [1]}), 80, model, 0)
