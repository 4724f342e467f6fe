"""Hashes are the same everywhere and for ever: numpy, torch, the kernels, and integers on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.hashing import (
    GAMMA,
    MAX_BUCKETS,
    bucket,
    bucket_torch,
    mix64,
    mix64_torch,
    seed_offset,
    to_signed,
)
from embstore.kernels.cpu import gather as cpu_gather

pytestmark = pytest.mark.slow

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
SEEDS = st.integers(0, (1 << 63) - 1)
WORD = 1 << 64

GOLDEN = [
    # key, seed, mix64, bucket of 1,000
    (0, 0, 0xE220A8397B1DCDAF, 883),
    (1, 0, 0x910A2DEC89025CC1, 566),
    (-1, 0, 0xE4D971771B652C20, 893),
    (2**24 + 1, 0, 0xD9119D74A403EC0A, 847),
    (2**31, 0, 0x25493CC63225736C, 145),
    (2**40, 0, 0x1FDD7128F310C389, 124),
    (2**63 - 1, 0, 0x2A67D7552E039EA7, 165),
    (-(2**63), 0, 0x481EC0A212A9F3DB, 281),
    (0, 1, 0x6E789E6AA1B965F4, 431),
    (12345, 42, 0xDE7932930B4323E6, 869),
    (-7, 2**63 - 1, 0x6FE372EE507EB4DC, 437),
]


def paper_mix64(key: int, seed: int) -> int:
    """splitmix64 as its paper writes it, in integers without limits; the 64 bits as an unsigned number."""
    z = (key + (seed + 1) * GAMMA) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def paper_bucket(key: int, num_buckets: int, seed: int) -> int:
    """The high half of the hash, as a fraction of 2**32, of the buckets."""
    return (paper_mix64(key, seed) >> 32) * num_buckets >> 32


@pytest.mark.parametrize(("key", "seed", "hashed", "in_1000"), GOLDEN)
def test_golden_vectors(key: int, seed: int, hashed: int, in_1000: int) -> None:
    """These hashes stand in published files: they never change."""
    assert int(mix64(np.array([key]), seed)[0]) % WORD == hashed
    assert int(mix64_torch(torch.tensor([key]), seed)[0]) % WORD == hashed
    assert bucket(np.array([key]), 1000, seed).tolist() == [in_1000]
    assert bucket_torch(torch.tensor([key]), 1000, seed).tolist() == [in_1000]


def test_the_first_golden_words_are_the_published_ones() -> None:
    """Keys 0, GAMMA, 2 GAMMA.. give the first outputs of the reference splitmix64 generator seeded with 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    keys = np.array([to_signed(k * GAMMA) for k in range(4)])
    assert [int(h) % WORD for h in mix64(keys)] == published


@given(keys=st.lists(INT64, max_size=20), seed=SEEDS)
@example(keys=[0, -1, (1 << 63) - 1, -(1 << 63)], seed=(1 << 63) - 1)
def test_numpy_and_torch_hash_as_on_paper(keys: list[int], seed: int) -> None:
    """Both implementations equal unbounded integer maths for any key and seed."""
    expected = [to_signed(paper_mix64(key, seed)) for key in keys]
    assert mix64(np.array(keys, np.int64), seed).tolist() == expected
    assert mix64_torch(torch.tensor(keys, dtype=torch.int64), seed).tolist() == expected


@given(keys=st.lists(INT64, max_size=20), num_buckets=st.integers(1, MAX_BUCKETS), seed=SEEDS)
@example(keys=[0, -1, (1 << 63) - 1, -(1 << 63)], num_buckets=MAX_BUCKETS, seed=0)
@example(keys=[0, -1, (1 << 63) - 1, -(1 << 63)], num_buckets=1, seed=0)
def test_buckets_are_as_on_paper_and_in_range(keys: list[int], num_buckets: int, seed: int) -> None:
    """Every key has one bucket of `[0, num_buckets)`, the same in numpy and torch."""
    expected = [paper_bucket(key, num_buckets, seed) for key in keys]
    assert all(0 <= b < num_buckets for b in expected)
    assert bucket(np.array(keys, np.int64), num_buckets, seed).tolist() == expected
    assert bucket_torch(torch.tensor(keys, dtype=torch.int64), num_buckets, seed).tolist() == expected


@given(ids=st.lists(st.integers(0, (1 << 63) - 1), max_size=20), num_buckets=st.integers(1, 5000), seed=SEEDS)
def test_the_kernel_reads_the_bucket_of_numpy(ids: list[int], num_buckets: int, seed: int) -> None:
    """The compiled loop hashes an id to the row that numpy says: row i of the table holds the number i."""
    weight_M1 = np.arange(num_buckets, dtype=np.float32)[:, None]
    out_B1 = np.empty((len(ids), 1), np.float32)
    cpu_gather.gather_hash(weight_M1, np.array(ids, np.int64), seed, out_B1)
    assert out_B1[:, 0].tolist() == bucket(np.array(ids, np.int64), num_buckets, seed).tolist()


@given(value=st.integers(-(1 << 70), 1 << 70))
def test_to_signed_keeps_the_bits(value: int) -> None:
    """An int64 with the same low 64 bits."""
    signed = to_signed(value)
    assert -(1 << 63) <= signed < 1 << 63
    assert (signed - value) % WORD == 0


@given(seed=SEEDS)
def test_seed_offset_is_what_key_zero_becomes(seed: int) -> None:
    """Adding the offset to a key and hashing with no offset is hashing with the seed."""
    assert seed_offset(seed) % WORD == (seed + 1) * GAMMA % WORD


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 5)])
def test_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    """Hashes have the shape of the keys, a single number's too, and the keys stay as they were."""
    keys = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    before = keys.copy()
    hashed, buckets = mix64(keys, 3), bucket(keys, 10, 3)
    assert hashed.shape == buckets.shape == shape
    assert hashed.dtype == buckets.dtype == np.int64
    assert hashed.reshape(-1).tolist() == [to_signed(paper_mix64(int(k), 3)) for k in keys.reshape(-1)]
    np.testing.assert_array_equal(keys, before)


def test_strided_keys_hash_in_their_order() -> None:
    """A transposed view hashes element by element, not in the order of memory."""
    keys = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(mix64(keys.T), mix64(keys).T)
    np.testing.assert_array_equal(mix64(keys[:, ::2]), mix64(keys)[:, ::2])


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_different_keys_never_share_a_hash(seed: int) -> None:
    """mix64 is a bijection: a million keys, near and far, a million hashes."""
    keys = np.concatenate([np.arange(-500_000, 500_000), (1 << 62) + np.arange(1000), np.int64(1) << np.arange(20, 62)])
    assert len(np.unique(mix64(keys, seed))) == len(keys)


NUM_KEYS = 60_000
SPREAD: dict[str, NDArray[np.int64]] = {
    "sequential": np.arange(NUM_KEYS),
    "negative": -np.arange(NUM_KEYS),
    "past_2_to_31": (1 << 31) + np.arange(NUM_KEYS),
    "stride_64": np.arange(NUM_KEYS) * 64,
    "stride_1000": np.arange(NUM_KEYS) * 1000,
    "stride_2_to_32": np.arange(NUM_KEYS) << 32,
    "stride_2_to_44": np.arange(NUM_KEYS) << 44,
    "two_powers": ((np.int64(1) << np.arange(60))[:, None] + (np.int64(1) << np.arange(60))[None, :]).reshape(-1),
}


@pytest.mark.parametrize("num_buckets", [64, 100, 509])
@pytest.mark.parametrize("pattern", SPREAD)
def test_keys_spread_evenly(pattern: str, num_buckets: int) -> None:
    """Regular ids fill buckets like random ones: chi-square within four standard deviations of its mean.

    The statistic of k buckets has mean k - 1 and variance 2 (k - 1). Ids and seeds are fixed, so this cannot flicker.
    """
    keys = np.unique(SPREAD[pattern])
    for seed in range(5):
        counts = np.bincount(bucket(keys, num_buckets, seed), minlength=num_buckets)
        expected = len(keys) / num_buckets
        chi_square = float(((counts - expected) ** 2).sum() / expected)
        assert abs(chi_square - (num_buckets - 1)) < 4 * (2 * (num_buckets - 1)) ** 0.5


def test_seeds_are_independent() -> None:
    """Keys that share a bucket under one seed share one under the next no more often than chance has it."""
    keys = np.arange(20_000)
    together = keys[bucket(keys, 100, 0) == 7]
    counts = np.bincount(bucket(together, 10, 1), minlength=10)
    assert counts.sum() == len(together) > 150
    assert counts.max() < 2 * len(together) / 10
