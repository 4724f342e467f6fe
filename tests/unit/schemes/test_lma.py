"""lma: signatures, where each number of each vector is read from, to the bit, and what that promises."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M memory_size, E pairs of a history.

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import least_squares_of_memory, weighted_relative_error
from support.integer_hashing import WORD, mix
from support.scheme_cases import all_paths
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import LMA, lma
from embstore.schemes.lma import LMAConfig, signatures_from_histories, signatures_from_vectors

pytestmark = pytest.mark.slow

# ---- lma: signatures --------------------------------------------------------------------------------------------


def signature_by_hand(history: set[int], id_: int, seed: int) -> int:
    """16 minhashes (the least as signed numbers), 4 bits of each; the id's hash without a history."""
    if not history:
        return mix(id_, seed)
    signature = 0
    for key in range(16):
        hashes = [mix(context % WORD, mix(key, seed)) for context in history]
        least = min(hashes, key=lambda word: word - WORD if word >> 63 else word)
        signature |= (least & 15) << 4 * key
    return signature


PAIRS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([-1, 0, 1, 7, 2**40, 2**63 - 1])), max_size=12)


@settings(max_examples=30)
@given(pairs=PAIRS, seed=st.sampled_from([0, 3, 2**63 - 1]))
def test_signatures_are_the_minhashes(pairs: list[tuple[int, int]], seed: int) -> None:
    """Signatures are the minhashes worked out by hand, for any history, in any order, with repetitions."""
    found = signatures_from_histories(6, np.array(pairs, np.int64).reshape(-1, 2), seed)
    expected = [signature_by_hand({c for i, c in pairs if i == id_}, id_, seed) for id_ in range(6)]
    assert [int(word) % WORD for word in found] == expected
    again = signatures_from_histories(6, torch.tensor(pairs[::-1] + pairs).long().reshape(-1, 2), seed)
    assert torch.equal(found, again)


def test_signatures_and_places_are_the_committed_ones() -> None:
    """Signatures and places are part of the file format."""
    config = LMAConfig(num_embeddings=4, embedding_dim=4, memory_size=1000, keys_per_dim=3, seed=7)
    masks, offsets = lma.addressing(config)
    assert [int(m) % WORD for m in masks] == [0xF00FF0, 0xF00000000F00F000, 0xF000000F00F0000, 0xF000000000FF]
    assert [int(o) % WORD for o in offsets] == [
        0x48B25B666A637449,
        0x7F442A2520D6137E,
        0x2C5BCDB78D759870,
        0xE7B1DDB0D25C7D47,
    ]
    signatures = signatures_from_histories(4, [[0, 5], [0, 9], [2, 5], [2, 9], [3, 2**40]], 7)
    assert [int(s) % WORD for s in signatures] == [
        0xAD679B1DF7B670FE,
        0x85E7BB0F12278575,
        0xAD679B1DF7B670FE,
        0xFB17CD4E9AC4E55B,
    ]
    assert lma.places(config, signatures).tolist() == [
        [759, 966, 295, 269],
        [488, 381, 743, 875],
        [759, 966, 295, 269],
        [639, 88, 473, 758],
    ]


@pytest.mark.parametrize(("keys_per_dim", "d"), [(1, 5), (3, 64), (16, 2)])
def test_lma_reads_what_integer_maths_says(keys_per_dim: int, d: int) -> None:
    """Keys chosen, masked, hashed and put into range by hand: all ways of lookup read the same numbers."""
    seed, size = 2**63 - 1, 777
    module = LMA(40, d, memory_size=size, keys_per_dim=keys_per_dim, seed=seed, histories=[[3, 1], [3, 2], [4, 1]])
    histories, memory = {3: {1, 2}, 4: {1}}, module.memory.tolist()
    expected = []
    for id_ in range(40):
        signature = signature_by_hand(histories.get(id_, set()), id_, seed)
        row = []
        for i in range(d):
            words = [mix(16 * i + key, seed) for key in range(16)]
            order = sorted(range(16), key=lambda key: words[key] - WORD if words[key] >> 63 else words[key])
            mask = sum(15 << 4 * key for key in order[:keys_per_dim])
            word = mix(signature & mask, mix((-1 - i) % WORD, seed))
            row.append(memory[(word >> 32) * size >> 32])
        expected.append(row)
    for vectors in all_paths(module, list(range(40))):
        assert vectors.tolist() == expected


def histories_with(jaccard: float, num_pairs: int, num_shared: int) -> Tensor:
    """Pairs of ids (2 p, 2 p + 1) whose histories have this Jaccard similarity."""
    own = round(num_shared * (1 / jaccard - 1) / 2) if jaccard else 20
    num_shared = num_shared if jaccard else 0
    rows = []
    for pair in range(num_pairs):
        first = pair * 1000
        rows += [[2 * pair + side, first + c] for side in (0, 1) for c in range(num_shared)]
        rows += [[2 * pair + side, first + 200 + 100 * side + c] for side in (0, 1) for c in range(own)]
    return torch.tensor(rows)


def shared(module: LMA) -> float:
    """The share of dimensions in which ids 2 p and 2 p + 1 read the same number."""
    index = lma.places(module.config, module.signatures)
    return float((index[0::2] == index[1::2]).double().mean())


@pytest.mark.parametrize("keys_per_dim", [1, 2, 4])
def test_lma_shares_as_histories_do(keys_per_dim: int) -> None:
    """(J + (1 - J) / 16) ** k of the dimensions: all of them for equal histories, almost none for disjoint ones."""
    found = []
    for jaccard in (0.0, 0.2, 0.5, 0.8, 1.0):
        histories = histories_with(jaccard, num_pairs=400, num_shared=24)
        module = LMA(800, 64, memory_size=10**6, keys_per_dim=keys_per_dim, histories=histories)
        found.append(shared(module))
        assert found[-1] == pytest.approx((jaccard + (1 - jaccard) / 16) ** keys_per_dim, abs=0.025)
    assert found == sorted(found)
    assert found[-1] == 1.0


def test_lma_without_histories_shares_by_chance() -> None:
    """Hashed signatures: two ids have a dimension in common as rarely as two random keys are equal."""
    module = LMA(4000, 64, memory_size=10**6, keys_per_dim=3)
    assert shared(module) < 0.001
    assert torch.equal(module.signatures, lma.hashed_signatures(4000, 0))


@pytest.mark.parametrize(
    ("d", "memory_size", "keys"),
    [(64, 1, 1), (64, 512, 1), (64, 513, 2), (64, 8192, 2), (64, 8193, 3), (1, MAX_BUCKETS, 8)],
)
def test_lma_takes_as_many_keys_as_fill_the_memory(d: int, memory_size: int, keys: int) -> None:
    """keys_per_dim is the smallest k with 16 ** k D >= 2 M; a given one is kept."""
    assert LMAConfig(num_embeddings=9, embedding_dim=d, memory_size=memory_size).keys_per_dim == keys
    assert LMAConfig(num_embeddings=9, embedding_dim=d, memory_size=memory_size, keys_per_dim=5).keys_per_dim == 5


@pytest.mark.parametrize(
    ("histories", "named"),
    [
        ([[1, 2, 3]], r"\[pairs, 2\], an id and what it occurred with, got torch.int64 \[1, 3\]"),
        ([[1.0, 2.0]], "got torch.float32"),
        ([[3, 1], [-1, 2]], r"id -1 in row 1, ids are in \[0, 10\)"),
        ([[10, 1]], r"id 10 in row 0, ids are in \[0, 10\)"),
    ],
)
def test_histories_that_are_none_are_refused(histories: Any, named: str) -> None:
    """DataError names what is wrong with the histories and where."""
    with pytest.raises(DataError, match=named):
        LMA(10, 4, memory_size=8, histories=histories)


def test_lma_parameters_that_mean_nothing_are_refused() -> None:
    """ConfigError or DataError names the parameter, its value and what it may be."""
    for options, named in (
        ({"memory_size": 0}, "memory_size must be at least 1"),
        ({"memory_size": 8, "keys_per_dim": 17}, "keys_per_dim must be at least 1 and at most 16, got 17"),
        ({"memory_size": 8, "keys_per_dim": 0}, "keys_per_dim must be"),
        ({"memory_size": 8, "seed": -1}, "seed must be at least 0"),
        ({"memory_size": 8, "histories": [[0, 0]], "signatures": torch.zeros(10).long()}, "histories or signatures"),
    ):
        with pytest.raises(ConfigError, match=named):
            LMA(10, 4, **options)  # type: ignore[arg-type]
    for signatures in (torch.zeros(9).long(), torch.zeros(10)):
        with pytest.raises(DataError, match=re.escape("signatures are int64 [10], one an id, got")):
            LMA(10, 4, memory_size=8, signatures=signatures)


def test_lma_budget_pays_for_signatures_first() -> None:
    """8 bytes an id, the rest is memory; the error names the least and the ceiling, 4 D / 8."""
    module = LMA.from_budget(100, 16, 1000, histories=[[0, 1]])
    assert (module.config.memory_size, module.num_bytes()) == (50, 1000)
    assert torch.equal(module.signatures, signatures_from_histories(100, [[0, 1]]))
    assert LMA.from_budget(100, 16, 804).config.memory_size == 1
    with pytest.raises(ConfigError, match=r"the least is 804, because each id keeps a signature .* stays below 8"):
        LMA.from_budget(100, 16, 803)
    with pytest.raises(ConfigError, match="either a budget or memory_size"):
        LMA.from_budget(100, 16, 1000, memory_size=5)


def test_lma_fit_lets_similar_vectors_share() -> None:
    """Copies of a few vectors fit in the memory of those few, which unrelated places could not hold."""
    kinds = torch.randn(20, 16)
    vectors_ND = kinds[torch.arange(2000) % 20]
    num_bytes = 8 * 2000 + 4 * 20 * 16 * 8
    fitted = LMA.fit(vectors_ND, num_bytes, generator=torch.Generator().manual_seed(0))
    hashed = LMA.fit(vectors_ND, num_bytes, signatures=lma.hashed_signatures(2000, 0))
    errors = [weighted_relative_error(vectors_ND, module(torch.arange(2000)).detach()) for module in (fitted, hashed)]
    assert errors[0] < 0.45
    assert errors[1] > 0.85
    assert fitted.num_bytes() <= num_bytes


def test_signatures_of_vectors_are_their_sides() -> None:
    """Equal vectors have equal signatures, opposite ones opposite bits, and the angle decides in between."""
    x_ND = torch.randn(4000, 32, dtype=torch.float64)
    cosine = 0.9
    y_ND = cosine * x_ND + (1 - cosine**2) ** 0.5 * torch.randn(4000, 32, dtype=torch.float64)
    signatures = signatures_from_vectors(
        torch.cat([x_ND, x_ND, -x_ND, y_ND]), generator=torch.Generator().manual_seed(1)
    )
    x, same, opposite, near = signatures.reshape(4, 4000)
    assert torch.equal(x, same)
    differing = [np.bitwise_count((x ^ other).numpy().view(np.uint64)).mean() / 64 for other in (opposite, near)]
    assert differing[0] > 0.97  # the mean that is taken off is not quite 0
    assert differing[1] == pytest.approx(np.arccos(cosine) / np.pi, abs=0.01)


def test_a_fit_is_the_least_squares_optimum() -> None:
    """No memory gives a smaller weighted error for these places: a general solver finds the same vectors."""
    vectors_ND, weights_N = torch.randn(30, 6), torch.rand(30) + 0.1
    fitted = LMA.fit(vectors_ND, 4 * 40 + 8 * 30, weights_N=weights_N, keys_per_dim=2)
    assert fitted.config.memory_size == 40
    found = fitted(torch.arange(30)).detach().double()
    best = least_squares_of_memory(fitted, vectors_ND, weights_N)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
