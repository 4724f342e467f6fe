"""Mixed dimensions: blocks of equal popularity, widths by a power law, a projection for each narrow block."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, K blocks.

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import weighted_relative_error
from support.scheme_cases import same, same_bits, served

from embstore.errors import ConfigError, DataError, IdOutOfRange
from embstore.schemes import MixedDim
from embstore.schemes.parts.widths import Blocks, best_widths, equal_blocks, power_law


def stored(sizes: tuple[int, ...], widths: tuple[int, ...], dim: int) -> int:
    """Numbers that rows and projections take."""
    return sum(n * d + (d * dim if d < dim else 0) for n, d in zip(sizes, widths, strict=True))


# ---- vectors ----------------------------------------------------------------------------------------------------


def test_one_block_of_full_width_is_a_full_table() -> None:
    """In one block of full width nothing is projected: the vectors are the rows, bit for bit."""
    module = MixedDim(40, 16, block_sizes=(40,), block_widths=(16,))
    assert set(module.state_dict()) == {"rows_0"}
    ids = torch.randint(40, (99,))
    assert same_bits(module(ids), module.rows_0[ids])
    assert same_bits(served(module, ids), module.rows_0[ids])


def test_blocks_of_full_width_are_a_full_table() -> None:
    """Rows cut into blocks of full width give the vectors of the whole table."""
    module = MixedDim(40, 8, block_sizes=(1, 30, 9), block_widths=(8, 8, 8))
    weight_ND = torch.cat([module.rows_0, module.rows_1, module.rows_2])
    ids = torch.randint(40, (5, 7))
    assert same_bits(module(ids), weight_ND[ids])
    assert same_bits(served(module, ids.flatten()), weight_ND[ids].reshape(-1, 8))


@settings(max_examples=25)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_a_vector_is_its_row_times_the_blocks_projection(blocks: list[tuple[int, int]], seed: int) -> None:
    """For any blocks: block b of x, row x - t_b, product with P_b where there is one; for ids in any order."""
    sizes, widths = zip(*blocks, strict=True)
    generator = torch.Generator().manual_seed(seed)
    module = MixedDim(sum(sizes), 9, block_sizes=sizes, block_widths=widths, generator=generator)
    expected = torch.cat(
        [
            getattr(module, f"rows_{b}") @ (getattr(module, f"projection_{b}") if width < 9 else torch.eye(9))
            for b, width in enumerate(widths)
        ]
    ).detach()
    ids = torch.randint(sum(sizes), (30,), generator=generator)
    assert same(module(ids), expected[ids], 2e-6)
    assert same(served(module, ids), expected[ids], 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_served_vector_does_not_depend_on_its_batch(dtype: str) -> None:
    """A vector has the same bits alone, repeated or among many."""
    module = MixedDim(60, 24, block_sizes=(5, 15, 40), block_widths=(24, 16, 6))
    alone = torch.cat([served(module, torch.tensor([x]), dtype) for x in range(60)])
    ids = torch.randint(60, (400,))
    assert same_bits(served(module, ids, dtype), alone[ids])


def test_every_block_starts_at_the_same_scale() -> None:
    """The standard deviation is the one asked for in every block, whatever its width."""
    module = MixedDim(4000, 32, block_sizes=(1000,) * 4, block_widths=(32, 16, 5, 1), init_std=0.25)
    for vectors in module(torch.arange(4000)).detach().split(1000):
        assert abs(float(vectors.std()) / 0.25 - 1) < 0.1
    assert [p.shape[0] for p in module.networks()] == [16, 5, 1]


def test_an_id_past_the_last_block_is_refused() -> None:
    """An id past the last block has no row: IdOutOfRange."""
    with pytest.raises(IdOutOfRange):
        MixedDim(10, 4, block_sizes=(3, 7), block_widths=(4, 2))(torch.tensor([10]))


@pytest.mark.parametrize(
    ("sizes", "widths", "named"),
    [
        ((3, 6), (4, 2), "block_sizes must sum to num_embeddings 10, got 9"),
        ((3, 7), (4,), "one each a block, got 2 and 1"),
        ((3, 7), (5, 2), "block_widths must be at most embedding_dim, which is 4, got 5"),
        ((3, 7), (4, 0), r"block_widths must be whole numbers of at least 1, one a block, got \(4, 0\)"),
        ((3, 7.0), (4, 2), "block_sizes must be whole numbers"),
        ((), (), "block_sizes must be whole numbers"),
        (10, (4,), "block_sizes must be whole numbers of at least 1, one a block, got 10"),
    ],
)
def test_blocks_that_are_none_are_refused(sizes: Any, widths: Any, named: str) -> None:
    """ConfigError says which field is wrong and what it may be."""
    with pytest.raises(ConfigError, match=named):
        MixedDim(10, 4, block_sizes=sizes, block_widths=widths)


# ---- blocks -----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any),
    num_blocks=st.integers(1, 12),
)
def test_blocks_split_the_popularity(counts: list[int], num_blocks: int) -> None:
    """Every id is in one block; no block is more than one id's count above its share of what the others left."""
    counts = sorted(counts, reverse=True)
    blocks = equal_blocks(len(counts), num_blocks, torch.tensor(counts))
    assert sum(blocks.sizes) == len(counts)
    assert len(blocks.sizes) == min(num_blocks, len(counts))
    assert all(size >= 1 for size in blocks.sizes)
    first = 0
    for k, size in enumerate(blocks.sizes):
        block, after = counts[first : first + size], sum(counts[first:])
        assert blocks.rates[k] * max(counts) == pytest.approx(sum(block) / size)
        if size > 1 and k < len(blocks.sizes) - 1:
            assert sum(block[:-1]) < after / (len(blocks.sizes) - k) + 1e-9
        first += size


def test_without_frequencies_the_kth_id_occurs_one_kth_as_often() -> None:
    """Blocks follow Zipf's law for any number of ids, without a list of them."""
    counted = equal_blocks(5000, 8, 1 / torch.arange(1, 5001).double())
    assert equal_blocks(5000, 8).sizes == counted.sizes
    huge = equal_blocks(2**62, 8)
    assert sum(huge.sizes) == 2**62
    assert huge.sizes == tuple(sorted(huge.sizes))


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        (torch.ones(9), r"frequencies have shape \[9\], there are 10 ids"),
        (torch.ones(10, 1), "frequencies have shape"),
        (-torch.ones(10), "at least 0, got -1.0 for id 0"),
        (torch.ones(10) / 0, "finite and at least 0, got inf"),
        (torch.full((10,), float("nan")), "finite and at least 0, got nan"),
        (torch.zeros(10), "all 10 frequencies are 0"),
    ],
)
def test_frequencies_that_are_none_are_refused(counts: torch.Tensor, named: str) -> None:
    """DataError says what is wrong with the frequencies, and for which id."""
    with pytest.raises(DataError, match=named):
        MixedDim.from_budget(10, 4, 10**4, frequencies=counts)


# ---- widths -----------------------------------------------------------------------------------------------------


def law(blocks: Blocks, dim: int, height: float, alpha: float) -> tuple[int, ...]:
    """The paper's widths, rounded, at least 1; full rows where a projection would take as much."""
    top = max(blocks.rates)
    widths = [min(dim, max(1, int(height * (p / top) ** alpha + 0.5))) for p in blocks.rates]
    return tuple(dim if d * (n + dim) >= n * dim else d for n, d in zip(blocks.sizes, widths, strict=True))


@pytest.mark.parametrize("exponent", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("ratio", [1.2, 2, 4, 8, 16, 24])
def test_widths_are_the_power_law_that_fits(exponent: float, ratio: float) -> None:
    """Brute force over alpha finds no milder law within the bytes; what is added beyond the law is what was left."""
    n, dim = 20_000, 32
    blocks = equal_blocks(n, 8, torch.arange(1, n + 1).double() ** -exponent)
    budget = int(n * dim / ratio)
    widths = power_law(blocks, dim, budget, projected=True)
    assert widths is not None
    assert stored(blocks.sizes, widths, dim) <= budget
    assert all(a >= b for a, b in pairwise(widths))
    laws = [law(blocks, dim, dim, alpha) for alpha in np.linspace(0, 1, 2001)]
    fitting = [found for found in laws if stored(blocks.sizes, found, dim) <= budget]
    if fitting:
        assert all(a >= b for a, b in zip(widths, fitting[0], strict=True))
        assert widths[0] == dim
    for k, (size, width) in enumerate(zip(blocks.sizes, widths, strict=True)):
        if width < (widths[k - 1] if k else dim):
            wider = tuple(d + (j == k) for j, d in enumerate(widths))
            assert stored(blocks.sizes, wider, dim) > budget or (width + 1) * (size + dim) >= size * dim


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 100), min_size=1, max_size=40).filter(any),
    dim=st.integers(1, 12),
    num_blocks=st.integers(1, 6),
    multiple=st.integers(1, 4),
    share=st.floats(0, 1.2),
)
def test_a_budget_is_kept_for_any_frequencies(
    counts: list[int], dim: int, num_blocks: int, multiple: int, share: float
) -> None:
    """In any order of popularity: within the bytes, projections counted, or an error that names bytes that suffice."""
    n = len(counts)
    budget = int(4 * n * dim * share)
    options = {"frequencies": torch.tensor(counts), "num_blocks": num_blocks, "width_multiple": multiple}
    try:
        module = MixedDim.from_budget(n, dim, budget, **options)
    except ConfigError as error:
        least = int(str(error).split("the least is ")[1].split(", because")[0].replace(",", ""))
        assert budget < least
        assert MixedDim.from_budget(n, dim, least, **options).num_bytes() <= least
        return
    config = module.config
    assert module.num_bytes() == 4 * stored(config.block_sizes, config.block_widths, dim) <= budget
    assert all(width in (1, dim) or width % multiple == 0 for width in config.block_widths)
    if share >= 1:
        assert set(config.block_widths) == {dim}


def test_a_block_too_small_for_a_projection_is_full() -> None:
    """Where rows and a projection would take as much as full rows, full rows are stored."""
    module = MixedDim.from_budget(1000, 16, 1000 * 16, num_blocks=8)
    for size, width in zip(module.config.block_sizes, module.config.block_widths, strict=True):
        assert width == 16 or width * (size + 16) < size * 16


def test_a_budget_below_one_number_an_id_names_the_ceiling() -> None:
    """The least bytes, projections counted, and the ratio that cannot be passed."""
    with pytest.raises(ConfigError, match=r"the least is 4,256, .* each of 1 blocks a projection; .* stays below 64"):
        MixedDim.from_budget(1000, 64, 4255, num_blocks=1)
    assert MixedDim.from_budget(1000, 64, 4256, num_blocks=1).config.block_widths == (1,)
    with pytest.raises(ConfigError, match="either a budget or block_sizes"):
        MixedDim.from_budget(1000, 64, 10**6, block_sizes=(1000,))
    for name in ("num_blocks", "width_multiple"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
            MixedDim.from_budget(1000, 64, 10**5, **{name: 0})


# ---- fit --------------------------------------------------------------------------------------------------------


def test_the_best_widths_are_those_of_all_combinations() -> None:
    """With gains that fall per column and equal prices, taking the best step first is the optimum."""
    generator = np.random.default_rng(3)
    gain = -np.sort(-generator.random((3, 5)), axis=1).cumsum(1)
    cost = np.full((3, 1), 7) * np.arange(1, 6)
    for budget in range(21, 110, 7):
        found = best_widths(gain, cost, budget)
        best = max(
            sum(gain[k, w - 1] for k, w in enumerate(widths))
            for widths in product(range(1, 6), repeat=3)
            if 7 * sum(widths) <= budget
        )
        assert sum(gain[k, w - 1] for k, w in enumerate(found)) == pytest.approx(best)


def test_vectors_that_have_the_ranks_are_met() -> None:
    """Blocks whose vectors lie in few dimensions get just those, from the singular values."""
    parts = [torch.randn(n, r) @ torch.randn(r, 10) for n, r in ((50, 4), (50, 2), (50, 1))]
    vectors_ND = torch.cat(parts)
    num_floats = stored((50, 50, 50), (4, 2, 1), 10)
    module = MixedDim.fit(vectors_ND, 4 * num_floats, num_blocks=3)
    assert module.config.block_widths == (4, 2, 1)
    torch.testing.assert_close(module(torch.arange(150)), vectors_ND, atol=1e-4, rtol=1e-4)


def test_a_fit_is_no_worse_than_the_power_laws_widths() -> None:
    """On vectors with a falling spectrum and popularity, at equal bytes; and it gets full rows where they fit."""
    n, dim = 2000, 16
    vectors_ND = torch.randn(n, dim) * torch.arange(dim, 0, -1) ** 0.5
    weights_N = 1 / torch.arange(1, n + 1).double()
    budget = 4 * n * dim // 4
    told: list[tuple[str, int, int]] = []
    fitted = MixedDim.fit(vectors_ND, budget, weights_N=weights_N, progress=lambda *step: told.append(step))
    assert fitted.num_bytes() <= budget
    assert told == [("blocks", b, 8) for b in range(8)]
    error = weighted_relative_error(vectors_ND, fitted(torch.arange(n)).detach(), weights_N)
    sized = MixedDim.from_budget(n, dim, budget, frequencies=weights_N)
    assert error < 0.5
    law_gain = kept(vectors_ND, weights_N, sized.config.block_sizes, sized.config.block_widths)
    assert 1 - error**2 >= law_gain - 1e-6
    exact = MixedDim.fit(vectors_ND, 4 * n * dim, weights_N=weights_N)
    assert torch.equal(exact(torch.arange(n)), vectors_ND)


def kept(vectors_ND: torch.Tensor, weights_N: torch.Tensor, sizes: tuple[int, ...], widths: tuple[int, ...]) -> float:
    """The share of the weighted energy that the best rows of these widths hold."""
    weighted_ND = vectors_ND.double() * weights_N.sqrt()[:, None]
    parts = zip(weighted_ND.split(sizes), widths, strict=True)
    held = sum(float(torch.linalg.svdvals(part)[:width].square().sum()) for part, width in parts)
    return held / float(weighted_ND.square().sum())


def test_ids_that_weigh_nothing_are_still_fitted() -> None:
    """A whole block of weight 0 gets the best rows of its width, not an error."""
    vectors_ND = torch.randn(100, 1) @ torch.randn(1, 8)
    weights_N = torch.zeros(100)
    weights_N[:4] = 1
    module = MixedDim.fit(vectors_ND, 4 * 400, weights_N=weights_N, num_blocks=4)
    torch.testing.assert_close(module(torch.arange(100)), vectors_ND, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="weights have shape"):
        MixedDim.fit(vectors_ND, 4 * 400, weights_N=torch.ones(3))
    with pytest.raises(ConfigError, match="the least is"):
        MixedDim.fit(vectors_ND, 100)
