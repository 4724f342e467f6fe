"""Compiled loops at the edges: batches around the pipeline's depth, unaligned ids, special numbers, huge tables.

That every scheme's loop computes its scheme's formula is the business of tests/contract/test_scheme_lookup.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.hashing import bucket
from embstore.kernels.cpu import gather as cpu_gather
from embstore.kernels.cpu import ids as cpu_ids
from embstore.kernels.cpu.finite import all_finite

Floats = NDArray[np.float32]
SENTINEL = np.float32(-12345.5)
SEED = 2**62 + 5


def same_bits(a: Floats, b: Floats) -> bool:
    """Equal shape and equal bits: NaN equals itself, -0.0 is not 0.0."""
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 15, 16, 17, 64])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 64])
def test_rows_come_in_the_order_of_ids(width: int, batch: int) -> None:
    """Around the pipeline's depth and the cache line's width, every row is the table's, bit for bit."""
    weight = np.random.default_rng(width).standard_normal((60, width), np.float32)
    ids = np.random.default_rng(batch).integers(-1, 60, batch)
    out = np.full((batch, width), SENTINEL)
    cpu_gather.gather(weight, ids, out)
    assert same_bits(out, np.where(ids[:, None] >= 0, weight[ids], SENTINEL))


def test_read_only_and_unaligned_ids_are_taken() -> None:
    """Tables mapped from files and ids in a request body are read-only; the body may start anywhere."""
    weight = np.random.default_rng(0).standard_normal((60, 6), np.float32)
    weight.flags.writeable = False
    ids = np.arange(60)
    unaligned = np.frombuffer(b"\x00" + ids.tobytes(), np.int64, 60, 1)
    out = np.empty((60, 6), np.float32)
    cpu_gather.gather(weight, unaligned, out)
    assert same_bits(out, weight)


def test_special_values_pass_through() -> None:
    """Zeros of either sign, the smallest and largest numbers, infinities and NaN keep their bits."""
    values = np.array([0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, -1.5], np.float32)
    weight = np.random.default_rng(0).choice(values, (60, 8))
    out = np.empty((60, 8), np.float32)
    cpu_gather.gather(weight, np.arange(60), out)
    assert same_bits(out, weight)


def test_products_are_rounded_before_the_sum() -> None:
    """No fused multiply-add: (1 + 2^-12)^2 rounds to 1 + 2^-11, so the sum is exactly 0 and not 2^-24."""
    x = np.float32(1 + 2**-12)
    shared, scale_bias = np.full((1, 32), x), np.array([[x, -(1 + 2**-11)]], np.float32)
    out = np.empty((9, 32), np.float32)
    cpu_gather.gather_scaled_biased(shared, scale_bias, np.zeros(9, np.int64), out)
    assert (out == 0.0).all()


BIG = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**40 - 1, 2**53 + 1, 2**62, 2**63 - 1]


@pytest.mark.parametrize("num_rows", [1, 7, 4096, 65_537])
def test_folded_ids_are_exact_over_all_of_int64(num_rows: int) -> None:
    """An id past 2^24, 2^31 or 2^53 reads the row that integer maths says: row i holds the number i."""
    weight = np.arange(num_rows, dtype=np.float32)[:, None]
    out = np.empty((len(BIG), 1), np.float32)
    cpu_gather.gather_mod(weight, np.array(BIG), out)
    assert out[:, 0].tolist() == [i % num_rows for i in BIG]
    cpu_gather.gather_hash(weight, np.array(BIG), SEED, out)
    assert out[:, 0].tolist() == bucket(np.array(BIG), num_rows, SEED).tolist()


@pytest.mark.parametrize("columns", [1, 2])
def test_rows_past_2_to_31_are_reached(columns: int, tmp_path: Path) -> None:
    """A table of more rows than 32 bits count: the row asked for is read, at the far end too."""
    num_rows = 2**31 + 5
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * num_rows * columns)  # a file of holes: it takes no room
    big: Floats = np.memmap(path, np.float32, "r+", shape=(num_rows, columns))
    ids = np.array([0, 2**24 + 1, 2**31 - 1, 2**31, num_rows - 1])
    for number, row in enumerate(ids):
        big[row] = np.arange(1, columns + 1) + 10 * number
    values: Any = (np.arange(1, columns + 1) + 10 * np.arange(len(ids))[:, None]).astype(np.float32)
    out = np.empty((len(ids), columns), np.float32)
    cpu_gather.gather(big, ids, out)
    assert same_bits(out, values)
    shared, one = np.arange(1, 4, dtype=np.float32)[:, None], np.empty((len(ids), 1), np.float32)
    if columns == 1:
        cpu_gather.gather_scaled(shared, big, ids, one)
        assert same_bits(one, shared[ids % 3] * values)
    else:
        cpu_gather.gather_scaled_biased(shared, big, ids, one)
        assert same_bits(one, shared[ids % 3] * values[:, :1] + values[:, 1:])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_all_finite_is_numpys_word_on_any_bits(bits: list[int]) -> None:
    """Every float32 there is, by its bits: finite or not as numpy has it."""
    array = np.array(bits, np.uint32)
    assert bool(all_finite(array)) == bool(np.isfinite(array.view(np.float32)).all())


@given(
    ids=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 12), max_size=30),
    num_ids=st.integers(1, 10) | st.integers(1, (1 << 63) - 1),
)
def test_count_outside_counts_what_is_not_in_range(ids: list[int], num_ids: int) -> None:
    """The range check that precedes every lookup is right over all of int64."""
    assert cpu_ids.count_outside(np.array(ids, np.int64), num_ids) == sum(not 0 <= i < num_ids for i in ids)
