"""mem_rec: hashed rows times hashed numbers, against integers on paper, against simpler schemes, and its fit."""

# Shapes: N num_embeddings, D embedding_dim, K hashes an id, M num_buckets, S num_weights.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.fits import weighted_relative_error
from support.integer_hashing import paper_bucket
from support.scheme_cases import all_paths, same_bits

from embstore.errors import ConfigError
from embstore.schemes import DoubleHash, Hash, MEMRec

N, D, M = 53, 12, 7

HUGE = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33, 2**40, 2**53 + 1, 2**62 - 1]


def filled(module: Any) -> Any:
    """The module with every parameter drawn from [-1, 1]."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


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


def test_rows_that_meet_do_not_widen_the_start() -> None:
    """In a table so small that an id's hashes often meet in one row, vectors still start at the scale asked for."""
    for num_buckets in (1, 2, 1000):
        sizes = {"num_buckets": num_buckets, "num_weights": 5, "num_hashes": 4, "init_std": 0.5}
        modules = [MEMRec(400, 64, generator=torch.Generator().manual_seed(seed), **sizes) for seed in range(20)]
        means = [float(module(torch.arange(400)).detach().square().mean()) for module in modules]
        assert np.mean(means) ** 0.5 == pytest.approx(0.5, rel=0.08)


def test_bytes_are_the_formula_of_the_docstring() -> None:
    """A table takes 4 m D + 4 K bytes."""
    assert MEMRec(N, D, num_buckets=M, num_weights=10).num_bytes() == 4 * M * D + 40


@pytest.mark.parametrize(
    ("call", "named"),
    [
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


def test_vectors_of_the_scheme_are_fitted_back() -> None:
    """Vectors that a module made are nearly found again by a fit of its size, in which rows and weights alternate."""
    torch.manual_seed(0)
    planted = MEMRec(300, 8, num_buckets=40, num_weights=300)
    with torch.no_grad():
        planted.tokens.uniform_(-1, 1)
        planted.weights.uniform_(0.5, 1.5)
    vectors_ND = planted(torch.arange(300)).detach()
    told: list[tuple[str, int, int]] = []
    fit = MEMRec.fit(vectors_ND, planted.num_bytes(), progress=lambda *words: told.append(words), num_weights=300)
    assert fit.config == planted.config
    assert told
    assert weighted_relative_error(vectors_ND, fit(torch.arange(300)).detach()) < 0.02


def test_a_fit_serves_the_heavy_ids_first() -> None:
    """On vectors that cannot be fitted, ids that count a hundred times as much end nearer to theirs."""
    vectors_ND = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    weights_N = torch.where(torch.arange(400) < 20, 100.0, 1.0)
    module = MEMRec.fit(vectors_ND, 400 * 32 // 4, weights_N=weights_N)
    found_ND = module(torch.arange(400)).detach()
    assert module.num_bytes() <= 400 * 32 // 4
    hot, cold = (weighted_relative_error(vectors_ND[at], found_ND[at]) for at in (slice(20), slice(20, None)))
    assert hot < 0.6 * cold
    assert cold < 1.1


def test_zeros_are_fitted_by_zeros() -> None:
    """Vectors of nothing give finite tables that compose to nothing."""
    module = MEMRec.fit(torch.zeros(20, 4), 160)
    assert (module(torch.arange(20)) == 0).all()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
