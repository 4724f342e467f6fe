"""learned_hash: rows by a map that is learned, its bytes, its damage, its fit."""

# Shapes: N num_embeddings, D embedding_dim, M num_buckets, L dimensions learned from.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fits import planted, weighted_relative_error
from support.scheme_cases import same_bits, served, stored_tensors
from torch import Tensor

from embstore import open_store, table
from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.quantize import dequantize
from embstore.schemes import Full, Hash, LearnedHash

N, D, M = 53, 12, 7

ZIPF = 1 / torch.arange(1, 1001, dtype=torch.float64)


def vectors_of(module: Any) -> Tensor:
    """The vectors of all ids."""
    vectors: Tensor = module(torch.arange(module.num_embeddings)).detach()
    return vectors


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
    """DataError where there is not one finite vector for each id."""
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
