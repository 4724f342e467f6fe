"""Several hashes an id: double_hash and mem_rec against integers on paper, against simpler schemes, and their fits."""

# Shapes: N num_embeddings, D embedding_dim, K hashes an id, M num_buckets, S weight slots, R rows.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import weighted_relative_error
from support.integer_hashing import paper_bucket
from support.scheme_cases import all_paths, same_bits
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting.sums import best_factors, best_rows
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import DoubleHash, Hash, MEMRec

N, D, M = 53, 12, 7
HUGE = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**40, 2**53 + 1, 2**62 - 1]


def filled(module: Any) -> Any:
    """The module with every parameter drawn from [-1, 1]."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


# ---- where ids lead ---------------------------------------------------------------------------------------------

GOLDEN = {
    # id: buckets of 1,000 by seeds 0, 1, 2
    0: [883, 431, 26],
    1: [566, 745, 971],
    2**24 + 1: [847, 576, 206],
    2**31: [145, 970, 885],
    2**40: [124, 23, 887],
    2**62 - 1: [265, 62, 965],
}


def test_golden_buckets() -> None:
    """Which rows an id reads stands in published tables and never changes; row r holds the number r here."""
    module = DoubleHash(2**62, 3, num_buckets=1000, num_hashes=3, op="concat")
    module.weight.data = torch.arange(1000.0)[:, None]
    for vectors in all_paths(module, list(GOLDEN)):
        assert vectors.tolist() == [[float(b) for b in buckets] for buckets in GOLDEN.values()]


@pytest.mark.parametrize("num_weights", [None, 5])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("op", ["sum", "concat"])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_double_hash_is_its_formula(seed: int, op: str, shared: bool, num_weights: int | None) -> None:
    """Every id's vector, one at a time, from integer hashes and float32 additions in order; ids up to 2^62."""
    options = {"op": op, "shared_table": shared, "num_weights": num_weights, "seed": seed}
    module = filled(DoubleHash(2**62, D, num_buckets=M, num_hashes=3, **options))
    weight = module.weight.detach().numpy()
    expected = []
    for id_ in HUGE:
        rows = [weight[paper_bucket(id_, M, seed + j) + (0 if shared else j * M)] for j in range(3)]
        if num_weights:
            rows = [row * module.weights[id_ % num_weights, j].item() for j, row in enumerate(rows)]
        expected.append(rows[0] + rows[1] + rows[2] if op == "sum" else np.concatenate(rows))
    for vectors in all_paths(module, HUGE):
        assert same_bits(vectors, torch.from_numpy(np.array(expected, np.float32)))


@pytest.mark.parametrize(("num_hashes", "num_weight_hashes"), [(1, 1), (4, 2), (3, 5)])
def test_mem_rec_is_its_formula(num_hashes: int, num_weight_hashes: int) -> None:
    """The sum of the hashed rows times the sum of the hashed numbers, whose seeds follow those of the rows."""
    hashes = {"num_hashes": num_hashes, "num_weight_hashes": num_weight_hashes, "seed": 9}
    module = filled(MEMRec(2**62, D, num_buckets=M, num_weights=11, **hashes))
    tokens, weights = module.tokens.detach().numpy(), module.weights.detach().numpy()[:, 0]
    expected = []
    for id_ in HUGE:
        row = tokens[paper_bucket(id_, M, 9)]
        for j in range(1, num_hashes):
            row = row + tokens[paper_bucket(id_, M, 9 + j)]
        factor = weights[paper_bucket(id_, 11, 9 + num_hashes)]
        for j in range(1, num_weight_hashes):
            factor = factor + weights[paper_bucket(id_, 11, 9 + num_hashes + j)]
        expected.append(row * factor)
    for vectors in all_paths(module, HUGE):
        assert same_bits(vectors, torch.from_numpy(np.array(expected)))


# ---- special cases that are simpler schemes ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["sum", "concat"])
@pytest.mark.parametrize("seed", [0, 7])
def test_one_hash_is_the_hashing_trick(seed: int, op: str) -> None:
    """k = 1 reads what `hash` reads with that seed."""
    plain = Hash(N, D, num_buckets=M, seed=seed)
    module = DoubleHash(N, D, num_buckets=M, num_hashes=1, seed=seed, op=op)
    module.load_state_dict(plain.state_dict())
    assert same_bits(module(torch.arange(N)), plain(torch.arange(N)))


def test_tables_of_their_own_are_a_sum_of_hashing_tricks() -> None:
    """Hash j reads the j-th part of the stacked tensor, with seed + j."""
    module = DoubleHash(N, D, num_buckets=M, num_hashes=2, shared_table=False, seed=4)
    parts = [Hash(N, D, num_buckets=M, seed=4 + j) for j in range(2)]
    for part, weight in zip(parts, module.weight.split(M), strict=True):
        part.load_state_dict({"weight": weight.detach()})
    ids = torch.arange(N)
    assert same_bits(module(ids), parts[0](ids) + parts[1](ids))


@pytest.mark.parametrize("op", ["sum", "concat"])
def test_fresh_weights_change_nothing(op: str) -> None:
    """Weights start at 1; with a slot per id each belongs to one id."""
    plain = DoubleHash(N, D, num_buckets=M, op=op)
    module = DoubleHash(N, D, num_buckets=M, op=op, num_weights=N)
    module.load_state_dict({"weight": plain.weight.detach(), "weights": module.weights.detach()})
    ids = torch.arange(N)
    assert same_bits(module(ids), plain(ids))
    before = module(ids).detach()
    with torch.no_grad():
        module.weights[17] = 3.0
    assert (module(ids) != before).any(dim=1).nonzero().tolist() == [[17]]


@pytest.mark.parametrize("num_weight_hashes", [1, 2, 4])
def test_mem_rec_starts_as_the_sum_of_its_rows(num_weight_hashes: int) -> None:
    """The weights of a fresh module sum to 1 for every id: it is `double_hash` of the same hashes."""
    module = MEMRec(N, D, num_buckets=M, num_weights=11, num_weight_hashes=num_weight_hashes)
    plain = DoubleHash(N, D, num_buckets=M, num_hashes=4)
    plain.load_state_dict({"weight": module.tokens.detach()})
    assert same_bits(module(torch.arange(N)), plain(torch.arange(N)))


def test_mem_rec_with_one_hash_each_is_memcom_with_hashed_weights() -> None:
    """k_t = k_w = 1: a hashed row times a number, that of the id's bucket."""
    module = filled(MEMRec(N, D, num_buckets=M, num_weights=N, num_hashes=1, num_weight_hashes=1, seed=3))
    row = Hash(N, D, num_buckets=M, seed=3)
    row.load_state_dict({"weight": module.tokens.detach()})
    scale = torch.stack([module.weights[paper_bucket(i, N, 4)] for i in range(N)])
    assert same_bits(module(torch.arange(N)), row(torch.arange(N)) * scale)


# ---- how vectors start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_buckets", [1, 2, 1000])
@pytest.mark.parametrize("scheme", ["double_hash", "double_hash apart", "mem_rec"])
def test_rows_that_meet_do_not_widen_the_start(scheme: str, num_buckets: int) -> None:
    """In a table so small that an id's hashes often meet in one row, vectors still start at the scale asked for."""
    sizes = {"num_buckets": num_buckets, "num_hashes": 4, "init_std": 0.5}
    means = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        if scheme == "mem_rec":
            module: Any = MEMRec(400, 64, num_weights=5, generator=generator, **sizes)
        else:
            module = DoubleHash(400, 64, shared_table=scheme == "double_hash", generator=generator, **sizes)
        means.append(float(module(torch.arange(400)).detach().square().mean()))
    assert np.mean(means) ** 0.5 == pytest.approx(0.5, rel=0.08)


# ---- bytes and budgets ------------------------------------------------------------------------------------------


def test_bytes_are_the_formula_of_the_docstring() -> None:
    """4 m W (k) + 4 K k and 4 m D + 4 K."""
    for options, num_bytes in [
        ({}, 4 * M * D),
        ({"op": "concat"}, 4 * M * D // 2),
        ({"shared_table": False, "num_hashes": 3}, 3 * 4 * M * D),
        ({"op": "concat", "shared_table": False, "num_hashes": 4, "num_weights": 10}, 4 * M * D + 4 * 10 * 4),
    ]:
        assert DoubleHash(N, D, num_buckets=M, **options).num_bytes() == num_bytes  # type: ignore[arg-type]
    assert MEMRec(N, D, num_buckets=M, num_weights=10).num_bytes() == 4 * M * D + 40


def test_mem_rec_divides_its_budget() -> None:
    """A quarter for weights unless told otherwise, at most a weight an id; both tables fit."""
    config = MEMRec.from_budget(1000, 16, 16_000).config
    assert (config.num_weights, config.num_buckets) == (1000, 187)
    config = MEMRec.from_budget(10_000, 16, 16_000, weight_share=0.5).config
    assert (config.num_weights, config.num_buckets) == (2000, 125)
    config = MEMRec.from_budget(10_000, 16, 16_000, weight_share=0).config
    assert (config.num_weights, config.num_buckets) == (1, 249)
    config = MEMRec.from_budget(10_000, 16, 16_000, num_weights=7).config
    assert (config.num_weights, config.num_buckets) == (7, 249)
    config = MEMRec.from_budget(10_000, 16, 68).config
    assert (config.num_weights, config.num_buckets) == (1, 1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: DoubleHash(N, 8, num_buckets=0), "num_buckets must be at least 1"),
        (lambda: DoubleHash(N, 8, num_buckets=MAX_BUCKETS + 1), "num_buckets must be .* at most 2147483647"),
        (lambda: DoubleHash(N, 8, num_buckets=2, num_hashes=0), "num_hashes must be at least 1"),
        (lambda: DoubleHash(N, 8, num_buckets=2, num_hashes=65), "num_hashes must be .* at most 64"),
        (lambda: DoubleHash(N, 8, num_buckets=2, num_weights=0), "num_weights must be at least 1"),
        (lambda: DoubleHash(N, 8, num_buckets=2, seed=-1), "seed must be at least 0"),
        (lambda: DoubleHash(N, 8, num_buckets=2, op="mean"), "op must be one of sum, concat, got 'mean'"),
        (lambda: DoubleHash(N, 8, num_buckets=2, shared_table=1), "shared_table must be true or false, got 1"),
        (lambda: DoubleHash(N, 8, num_buckets=2, op="concat", num_hashes=3), "a multiple of num_hashes, got 8"),
        (lambda: DoubleHash.from_budget(N, 8, 31), "the least is 32"),
        (lambda: DoubleHash.from_budget(N, 8, 10**4, num_weights=2000), "the least is 16,032"),
        (lambda: MEMRec(N, 8, num_buckets=2, num_weights=0), "num_weights must be at least 1"),
        (lambda: MEMRec(N, 8, num_buckets=2, num_weights=2, num_weight_hashes=0), "num_weight_hashes must be"),
        (lambda: MEMRec.from_budget(N, 8, 35), "the least is 36"),
        (lambda: MEMRec.from_budget(N, 8, 999, weight_share=1), "weight_share must be at least 0 and below 1"),
        (lambda: MEMRec.from_budget(N, 8, 999, num_weights="all"), "num_weights must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, named: str) -> None:
    """ConfigError names the parameter and what it may be, or the least budget."""
    with pytest.raises(ConfigError, match=named):
        call()


# ---- fits -------------------------------------------------------------------------------------------------------


def design(index_NK: Tensor, factors_NK: Tensor, num_rows: int) -> Tensor:
    """The matrix [N, R] that takes rows to sums."""
    matrix_NR = torch.zeros(len(index_NK), num_rows, dtype=torch.float64)
    for k in range(index_NK.shape[1]):
        matrix_NR[torch.arange(len(index_NK)), index_NK[:, k]] += factors_NK[:, k].double()
    return matrix_NR


@settings(max_examples=30)
@given(n=st.integers(1, 40), k=st.integers(1, 3), r=st.integers(1, 12), weighted=st.booleans(), seed=st.integers(0, 99))
def test_best_rows_are_the_least_squares_rows(n: int, k: int, r: int, weighted: bool, seed: int) -> None:
    """The error is that of a dense solver, whatever rows, factors and weights."""
    generator = torch.Generator().manual_seed(seed)
    vectors_ND = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    index_NK = torch.randint(r, (n, k), generator=generator)
    factors_NK = torch.randn(n, k, dtype=torch.float64, generator=generator)
    weights_N = torch.rand(n, dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    found_RD = best_rows(vectors_ND, index_NK, r, weights_N=weights_N, factors_NK=factors_NK, tolerance=0)
    matrix_NR = design(index_NK, factors_NK, r)
    root_N1 = (torch.ones(n) if weights_N is None else weights_N).double().sqrt()[:, None]
    best_RD = torch.linalg.lstsq(matrix_NR * root_N1, vectors_ND * root_N1, driver="gelsd").solution
    error, least = (((matrix_NR @ rows - vectors_ND) * root_N1).square().sum() for rows in (found_RD, best_RD))
    assert float(error) <= float(least) + 1e-6 * float((vectors_ND * root_N1).square().sum())


def test_best_factors_are_the_least_squares_factors() -> None:
    """Slot by slot those of a dense solver; a slot without vectors has factors of 1."""
    generator = torch.Generator().manual_seed(0)
    vectors_ND = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    rows_RD = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    index_NK, slot_N = torch.randint(9, (60, 2), generator=generator), torch.randint(6, (60,), generator=generator)
    weights_N = torch.rand(60, dtype=torch.float64, generator=generator)
    found_SK = best_factors(vectors_ND, index_NK, rows_RD, slot_N, 7, weights_N=weights_N)
    assert found_SK[6].tolist() == [1.0, 1.0]
    for slot in range(6):
        here = slot_N == slot
        root = weights_N[here].sqrt()[:, None, None]
        matrix = (rows_RD[index_NK[here]].transpose(1, 2) * root).reshape(-1, 2)
        expected = torch.linalg.lstsq(matrix, (vectors_ND[here][:, :, None] * root).reshape(-1, 1)).solution
        torch.testing.assert_close(found_SK[slot], expected[:, 0], rtol=1e-5, atol=1e-6)


def test_rows_outside_the_table_are_no_fit() -> None:
    """A row that does not exist is named."""
    with pytest.raises(DataError, match=r"row 3 is outside \[0, 3\)"):
        best_rows(torch.ones(2, 2), torch.tensor([[0], [3]]), 3)
    with pytest.raises(DataError, match="one line a vector"):
        best_rows(torch.ones(2, 2), torch.zeros(3, 1, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("scheme", "options", "limit"),
    [
        (DoubleHash, {}, 1e-3),
        (DoubleHash, {"op": "concat"}, 1e-6),
        (DoubleHash, {"op": "concat", "num_hashes": 4, "shared_table": False}, 1e-6),
        (DoubleHash, {"num_weights": 300}, 0.01),
        (DoubleHash, {"op": "concat", "num_weights": 300}, 1e-6),
        (MEMRec, {"num_weights": 300}, 0.02),
    ],
)
def test_vectors_of_the_scheme_are_fitted_back(scheme: Any, options: dict[str, Any], limit: float) -> None:
    """Vectors that a module made are found again by a fit of its size, or nearly where rows and weights alternate."""
    torch.manual_seed(0)
    planted = scheme(300, 8, num_buckets=40, **options)
    with torch.no_grad():
        for name, parameter in planted.named_parameters():
            parameter.uniform_(-1, 1) if name != "weights" else parameter.uniform_(0.5, 1.5)
    vectors_ND = planted(torch.arange(300)).detach()
    told: list[tuple[str, int, int]] = []
    module = scheme.fit(vectors_ND, planted.num_bytes(), progress=lambda *words: told.append(words), **options)
    assert module.config == planted.config
    assert told
    assert weighted_relative_error(vectors_ND, module(torch.arange(300)).detach()) < limit


@pytest.mark.parametrize(
    ("scheme", "options"),
    [(DoubleHash, {}), (DoubleHash, {"op": "concat"}), (DoubleHash, {"num_weights": 200}), (MEMRec, {})],
)
def test_a_fit_serves_the_heavy_ids_first(scheme: Any, options: dict[str, Any]) -> None:
    """On vectors that cannot be fitted, ids that count a hundred times as much end nearer to theirs."""
    vectors_ND = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    weights_N = torch.where(torch.arange(400) < 20, 100.0, 1.0)
    module = scheme.fit(vectors_ND, 400 * 32 // 4, weights_N=weights_N, **options)
    found_ND = module(torch.arange(400)).detach()
    assert module.num_bytes() <= 400 * 32 // 4
    hot, cold = (weighted_relative_error(vectors_ND[at], found_ND[at]) for at in (slice(20), slice(20, None)))
    assert hot < 0.6 * cold
    assert cold < 1.1


def test_zeros_are_fitted_by_zeros() -> None:
    """Vectors of nothing give finite tables that compose to nothing."""
    for module in (
        DoubleHash.fit(torch.zeros(20, 4), 160),
        DoubleHash.fit(torch.zeros(20, 4), 160, num_weights=5),
        MEMRec.fit(torch.zeros(20, 4), 160),
    ):
        assert (module(torch.arange(20)) == 0).all()
        assert all(parameter.isfinite().all() for parameter in module.parameters())
