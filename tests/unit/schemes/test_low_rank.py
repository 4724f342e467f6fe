"""Low rank: a short row per id, times a projection that all share, plus an offset."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, R rank.

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.fits import weighted_relative_error
from support.scheme_cases import same_bits, served

from embstore.errors import ConfigError, DataError, IdOutOfRange
from embstore.kernels.cpu import project as cpu_project
from embstore.schemes import LowRank


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def in_order(
    base_D: NDArray[np.float32], row_R: NDArray[np.float32], matrix_RD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """base + row @ matrix, one rounded product after the other."""
    total_D = base_D.copy()
    for factor, column_D in zip(row_R, matrix_RD, strict=True):
        total_D += factor * column_D
    return total_D


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 67, 130])
def test_products_are_added_in_order(rank: int, dim: int) -> None:
    """The compiled product has the bits of plain float32 sums, column by column, whatever the width."""
    factors, projection, offset = random(9, rank), random(rank, dim), random(1, dim)
    ids, out = np.array([8, 0, 3, 3, -1, 7]), np.full((6, dim), np.float32(0.125))
    cpu_project.project(factors, projection, offset, ids, out)
    for row, id_ in zip(out, ids, strict=True):
        expected = in_order(offset[0], factors[id_], projection) if id_ >= 0 else np.full(dim, np.float32(0.125))
        assert (row.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_served_vector_does_not_depend_on_its_batch(dtype: str) -> None:
    """A vector has the same bits alone, repeated or among many."""
    module = LowRank(50, 24, rank=10)
    alone = torch.cat([served(module, torch.tensor([x]), dtype) for x in range(50)])
    ids = torch.randint(50, (400,))
    assert same_bits(served(module, ids, dtype), alone[ids])


def test_full_rank_and_the_identity_is_a_full_table() -> None:
    """With r = D, P = I and o = 0 every vector is its row."""
    weight_ND = torch.randn(30, 16)
    state = {"factors": weight_ND, "projection": torch.eye(16), "offset": torch.zeros(1, 16)}
    module = LowRank(30, 16, rank=16)
    module.load_state_dict(state)
    assert torch.equal(module(torch.arange(30)), weight_ND)
    assert torch.equal(served(module, torch.arange(30)), weight_ND)


def test_rank_one_is_a_line_through_the_offset() -> None:
    """With r = 1 the vectors less o are multiples of P."""
    module = LowRank(20, 8, rank=1)
    with torch.no_grad():
        module.offset.normal_()
    expected = module.factors * module.projection + module.offset
    assert torch.equal(module(torch.arange(20)), expected)


@pytest.mark.parametrize(("rank", "dim"), [(1, 64), (4, 64), (64, 64), (3, 5)])
def test_the_start_keeps_the_rows_scale(rank: int, dim: int) -> None:
    """Rows of P are orthogonal and of length sqrt(D / r), so vectors are as large as the numbers of A."""
    module = LowRank(4000, dim, rank=rank, init_std=0.5)
    gram = module.projection @ module.projection.T
    torch.testing.assert_close(gram, torch.eye(rank) * dim / rank, atol=1e-4, rtol=1e-4)
    assert not module.offset.any()
    assert abs(float((module(torch.arange(4000)).std() / module.factors.std()).detach()) - 1) < 0.05


def test_the_networks_are_what_all_ids_share() -> None:
    """The networks are the projection and the offset, but not the rows."""
    shared, plain = LowRank(9, 8, rank=2), LowRank(9, 8, rank=2, offset=False)
    assert list(map(id, shared.networks())) == [id(shared.projection), id(shared.offset)]
    assert list(map(id, plain.networks())) == [id(plain.projection)]


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (53, 19), (1000, 64)])
def test_a_budget_gives_the_largest_rank(n: int, d: int, offset: bool) -> None:
    """Bytes are 4 (n r + r D + D); of the ranks up to D the largest that fits is taken, and never more than D."""
    sizes = [4 * (n * r + r * d + offset * d) for r in range(1, d + 1)]
    assert [LowRank(n, d, rank=r, offset=offset).num_bytes() for r in (1, d)] == [sizes[0], sizes[-1]]
    for num_bytes in (*sizes, *(size - 1 for size in sizes[1:]), 10 * sizes[-1]):
        module = LowRank.from_budget(n, d, num_bytes, offset=offset)
        assert module.config.rank == sum(size <= num_bytes for size in sizes)


def test_a_budget_below_one_number_an_id_names_the_ceiling() -> None:
    """The error names the least bytes and the ratio that cannot be passed."""
    with pytest.raises(ConfigError, match=r"the least is 4,512, because each id keeps a number .* stays below 64"):
        LowRank.from_budget(1000, 64, 4511)
    assert LowRank.from_budget(1000, 64, 4512).config.rank == 1
    with pytest.raises(ConfigError, match="either a budget or rank"):
        LowRank.from_budget(1000, 64, 10**6, rank=2)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 0}, "rank must be at least 1 and at most 8, got 0"),
        ({"rank": 9}, "rank must be at least 1 and at most 8, got 9"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rank": 2, "offset": 1}, "offset must be true or false, got 1"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, int], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        LowRank(10, 8, **wrong)


def test_an_id_past_the_end_is_refused() -> None:
    """An id past the end has no row, and none is made up."""
    with pytest.raises(IdOutOfRange):
        LowRank(10, 8, rank=2)(torch.tensor([10]))


def test_a_fit_is_the_truncated_svd() -> None:
    """About the mean, the error is what the left out singular values hold; and it is the same with weights of one."""
    vectors_ND = torch.randn(300, 12, dtype=torch.float64) * torch.arange(12, 0, -1) + 3
    module = LowRank.fit(vectors_ND, 4 * (5 * 300 + 5 * 12 + 12))
    assert module.config.rank == 5
    left = torch.linalg.svdvals(vectors_ND - vectors_ND.mean(0))[5:].square().sum()
    error = (module(torch.arange(300)).detach().double() - vectors_ND).square().sum()
    assert float(error / left) == pytest.approx(1, abs=1e-5)
    again = LowRank.fit(vectors_ND, module.num_bytes(), weights_N=torch.ones(300))
    torch.testing.assert_close(again(torch.arange(300)), module(torch.arange(300)), atol=1e-5, rtol=1e-5)


def test_a_fit_counts_errors_by_weight() -> None:
    """The ids that weigh something are met where the rank suffices for them; others are not."""
    vectors_ND = torch.randn(40, 8)
    weights_N = torch.zeros(40)
    weights_N[:3] = 1
    module = LowRank.fit(vectors_ND, 4 * (2 * 40 + 2 * 8 + 8), weights_N=weights_N)
    found_ND = module(torch.arange(40)).detach()
    assert weighted_relative_error(vectors_ND, found_ND, weights_N) < 1e-5
    assert weighted_relative_error(vectors_ND, found_ND) > 0.5


def test_a_fit_without_offset_goes_through_the_origin() -> None:
    """Vectors of rank 2 are met exactly; nothing is added to them."""
    vectors_ND = torch.randn(60, 2) @ torch.randn(2, 9)
    module = LowRank.fit(vectors_ND, 4 * (2 * 60 + 2 * 9), offset=False)
    assert set(module.state_dict()) == {"factors", "projection"}
    torch.testing.assert_close(module(torch.arange(60)), vectors_ND, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="NaN or infinity"):
        LowRank.fit(vectors_ND / 0, 10**6)
