"""double_hash: several hashes an id, against integers on paper, against simpler schemes, and its fit."""

# Shapes: N num_embeddings, D embedding_dim, K hashes an id, M num_buckets, S weight slots.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.fits import weighted_relative_error
from support.integer_hashing import paper_bucket
from support.scheme_cases import all_paths, same_bits

from embstore.errors import ConfigError
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import DoubleHash, Hash

pytestmark = pytest.mark.slow

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


# ---- special cases that are simpler schemes ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["sum", "concat"])
@pytest.mark.parametrize("seed", [0, 7])
def test_one_hash_is_the_hashing_trick(seed: int, op: str) -> None:
    """With k = 1 an id reads what `hash` reads with that seed."""
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


# ---- how vectors start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_buckets", [1, 2, 1000])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_that_meet_do_not_widen_the_start(shared: bool, num_buckets: int) -> None:
    """In a table so small that an id's hashes often meet in one row, vectors still start at the scale asked for."""
    means = []
    for seed in range(20):
        sizes: dict[str, Any] = {"num_buckets": num_buckets, "num_hashes": 4, "shared_table": shared, "init_std": 0.5}
        module = DoubleHash(400, 64, generator=torch.Generator().manual_seed(seed), **sizes)
        means.append(float(module(torch.arange(400)).detach().square().mean()))
    assert np.mean(means) ** 0.5 == pytest.approx(0.5, rel=0.08)


# ---- bytes and budgets ------------------------------------------------------------------------------------------


def test_bytes_are_the_formula_of_the_docstring() -> None:
    """A table takes 4 m W (k) + 4 K k bytes."""
    for options, num_bytes in [
        ({}, 4 * M * D),
        ({"op": "concat"}, 4 * M * D // 2),
        ({"shared_table": False, "num_hashes": 3}, 3 * 4 * M * D),
        ({"op": "concat", "shared_table": False, "num_hashes": 4, "num_weights": 10}, 4 * M * D + 4 * 10 * 4),
    ]:
        assert DoubleHash(N, D, num_buckets=M, **options).num_bytes() == num_bytes  # type: ignore[arg-type]


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
    ],
)
def test_what_cannot_be_is_refused(call: Any, named: str) -> None:
    """ConfigError names the parameter and what it may be, or the least budget."""
    with pytest.raises(ConfigError, match=named):
        call()


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 1e-3),
        ({"op": "concat"}, 1e-6),
        ({"op": "concat", "num_hashes": 4, "shared_table": False}, 1e-6),
        ({"num_weights": 300}, 0.01),
        ({"op": "concat", "num_weights": 300}, 1e-6),
    ],
)
def test_vectors_of_the_scheme_are_fitted_back(options: dict[str, Any], limit: float) -> None:
    """Vectors that a module made are found again by a fit of its size, or nearly where rows and weights alternate."""
    torch.manual_seed(0)
    planted = DoubleHash(300, 8, num_buckets=40, **options)
    with torch.no_grad():
        for name, parameter in planted.named_parameters():
            parameter.uniform_(-1, 1) if name != "weights" else parameter.uniform_(0.5, 1.5)
    vectors_ND = planted(torch.arange(300)).detach()
    told: list[tuple[str, int, int]] = []
    module = DoubleHash.fit(vectors_ND, planted.num_bytes(), progress=lambda *words: told.append(words), **options)
    assert module.config == planted.config
    assert told
    assert weighted_relative_error(vectors_ND, module(torch.arange(300)).detach()) < limit


@pytest.mark.parametrize("options", [{}, {"op": "concat"}, {"num_weights": 200}], ids=str)
def test_a_fit_serves_the_heavy_ids_first(options: dict[str, Any]) -> None:
    """On vectors that cannot be fitted, ids that count a hundred times as much end nearer to theirs."""
    vectors_ND = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    weights_N = torch.where(torch.arange(400) < 20, 100.0, 1.0)
    module = DoubleHash.fit(vectors_ND, 400 * 32 // 4, weights_N=weights_N, **options)
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
    ):
        assert (module(torch.arange(20)) == 0).all()
        assert all(parameter.isfinite().all() for parameter in module.parameters())
