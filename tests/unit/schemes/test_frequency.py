"""frequency: rows of their own for hot ids, and how a budget is split."""

# Shapes: N num_embeddings, D embedding_dim, H hot ids, C cold rows.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.scheme_cases import looked_up, same_bits, served
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.hashing import bucket
from embstore.schemes import Frequency, Full, Hash, LearnedHash
from embstore.schemes.frequency import FrequencyConfig, expected_collisions, usual_hot_share

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


@pytest.mark.parametrize(
    ("call", "named"),
    [
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
