"""robe and lma: where each number of each vector is read from, to the bit, and what that promises."""

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
from support.scheme_cases import all_paths, same_bits
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting.slots import weighted_slot_means
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import LMA, ROBE, lma, robe
from embstore.schemes.lma import LMAConfig, signatures_from_histories, signatures_from_vectors
from embstore.schemes.robe import ROBEConfig
from embstore.train.optimizer import RowwiseAdagrad

HUGE = [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**33 + 5, 2**40, 2**53 + 1, 2**62 - 1]


# ---- robe: the index function -----------------------------------------------------------------------------------


def robe_by_hand(config: ROBEConfig, id_: int) -> list[tuple[int, bool]]:
    """Place and sign of every number of a vector, one at a time."""
    found = []
    num_chunks = -(-config.embedding_dim // config.block_size)
    table_seed = mix(config.table_index, config.seed)
    for i in range(config.embedding_dim):
        chunk, j = divmod(i, config.block_size)
        word = mix(id_ * num_chunks + chunk, table_seed)
        place = (((word >> 32) * config.memory_size >> 32) + j) % config.memory_size
        found.append((place, config.signs and mix(word, j // 64) >> j % 64 & 1 == 1))
    return found


def test_robe_places_are_the_committed_ones() -> None:
    """The index function is part of the file format."""
    config = ROBEConfig(num_embeddings=2**62, embedding_dim=12, memory_size=1000, block_size=5, table_index=3, seed=7)
    index, negative = robe.places(config, torch.tensor([0, 1, 2**40]))
    assert config.table_seed == 16393961507643560470
    assert index.tolist() == [
        [713, 714, 715, 716, 717, 221, 222, 223, 224, 225, 181, 182],
        [207, 208, 209, 210, 211, 120, 121, 122, 123, 124, 521, 522],
        [482, 483, 484, 485, 486, 247, 248, 249, 250, 251, 168, 169],
    ]
    assert negative is not None
    signs = ["".join("-" if bit else "+" for bit in row) for row in negative.tolist()]
    assert signs == ["-++-+-+++-+-", "------+++---", "----+++---++"]


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize(
    ("block_size", "d"), [(1, 3), (4, 8), (8, 64), (16, 64), (16, 19), (33, 40), (70, 150), (999, 5)]
)
@pytest.mark.parametrize("memory_size", [1, 7, 20, 1000])
def test_robe_reads_what_integer_maths_says(signs: bool, block_size: int, d: int, memory_size: int) -> None:
    """Every number by hand, ids up to 2^62, arrays shorter than a block: all ways of lookup read the same."""
    module = ROBE(
        2**62, d, memory_size=memory_size, block_size=block_size, signs=signs, scale=0.37, table_index=2, seed=2**63 - 1
    )
    memory, scale = module.memory.detach().numpy(), np.float32(0.37)
    expected = [
        [memory[place] * (-scale if negative else scale) for place, negative in robe_by_hand(module.config, id_)]
        for id_ in HUGE
    ]
    for vectors in all_paths(module, HUGE):
        assert same_bits(vectors, torch.tensor(np.array(expected)))


@pytest.mark.parametrize("block_size", [4, 8, 16, 24, 64])
def test_robe_blocks_go_round_the_end(block_size: int) -> None:
    """Neighbours of the last number are the first ones: blocks that start at each place occur, all of them whole."""
    size, d = 70, 3 * block_size
    module = ROBE(5000, d, memory_size=size, block_size=block_size, signs=False)
    module.memory.data = torch.arange(float(size))
    starts = set()
    for vectors in all_paths(module, list(range(300))):
        blocks = vectors.reshape(300, 3, block_size)
        assert torch.equal(blocks, (blocks[..., :1] + torch.arange(block_size)) % size)
        starts |= set(blocks[..., 0].flatten().tolist())
    assert starts == set(range(size))


def test_robe_places_and_signs_are_spread() -> None:
    """Sequential ids fill the array evenly, half of the signs are negative, and shared places do not share signs."""
    config = ROBEConfig(num_embeddings=10**6, embedding_dim=64, memory_size=4096)
    index, negative = robe.places(config, torch.arange(4096))
    assert negative is not None
    counts_M = torch.bincount(index.flatten(), minlength=4096).double()
    expected = index.numel() / 4096
    assert float(((counts_M - expected) ** 2 / expected).sum()) / 4096 < 16 * 1.15  # blocks of 16 come together
    assert abs(float(negative.double().mean()) - 0.5) < 0.005
    sums_M = torch.zeros(4096).index_add_(0, index.flatten(), 1 - 2 * negative.flatten().float())
    assert abs(float((sums_M.square() / counts_M.float()).mean()) - 1) < 0.1  # a random walk's


# ---- robe: one array for several tables -------------------------------------------------------------------------


def test_robe_tables_share_one_parameter() -> None:
    """Both gradients add up in the one array; each table reads it at its own places and scale, and exports it."""
    first = ROBE(1000, 32, memory_size=4096, init_std=0.1)
    second = ROBE(500, 64, memory=first.memory, table_index=1, init_std=2.0)
    assert second.memory is first.memory
    assert len({id(p) for p in torch.nn.ModuleList([first, second]).parameters()}) == 1
    assert float(second(torch.arange(500)).detach().std()) == pytest.approx(2.0, rel=0.05)
    assert float(first(torch.arange(1000)).detach().std()) == pytest.approx(0.1, rel=0.05)
    ids = torch.arange(7)
    (first(ids).sum() + second(ids).sum()).backward()
    together, first.memory.grad = first.memory.grad, None
    alone = [torch.autograd.grad(module(ids).sum(), module.memory)[0] for module in (first, second)]
    torch.testing.assert_close(together, alone[0] + alone[1])
    assert not same_bits(alone[0][:32], alone[1][:32])
    config, tensors = second.export()
    assert same_bits(ROBE.from_tensors(config, tensors)(ids), second(ids))


def test_robe_table_index_moves_all_places() -> None:
    """Without an index of its own a second table would read the first one's numbers; with it, it does not."""
    first, second = (
        robe.places(
            ROBEConfig(num_embeddings=99, embedding_dim=64, memory_size=10**6, table_index=table), torch.arange(99)
        )[0]
        for table in (0, 1)
    )
    assert float((first == second).double().mean()) < 0.01


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "robe needs a size"),
        ({"memory": 1000}, "memory is the `memory` of another robe module, got 1000"),
        ({"memory": torch.nn.Parameter(torch.ones(3, 3))}, r"float32 \[memory_size\], got torch.float32 \[3, 3\]"),
        ({"memory": torch.nn.Parameter(torch.ones(3).double())}, "got torch.float64"),
        (
            {"memory": torch.nn.Parameter(torch.ones(3)), "memory_size": 4},
            "memory_size is 4, the memory to share has 3",
        ),
        ({"memory": torch.nn.Parameter(torch.zeros(3))}, "numbers of size 0.0: give a scale"),
        ({"memory_size": 8, "scale": 0.0}, "scale must be a number above 0"),
        ({"memory_size": 8, "scale": float("nan")}, "scale must be a number above 0"),
        ({"memory_size": 8, "scale": 1e39}, "scale must be a number above 0 that float32 holds"),
        ({"memory_size": 8, "scale": True}, "scale must be a number"),
        ({"memory_size": 0}, "memory_size must be at least 1 and at most 2147483647, got 0"),
        ({"memory_size": MAX_BUCKETS + 1}, "memory_size must be"),
        ({"memory_size": 8, "block_size": 0}, "block_size must be at least 1"),
        ({"memory_size": 8, "signs": 1}, "signs must be true or false, got 1"),
        ({"memory_size": 8, "table_index": -1}, "table_index must be at least 0"),
        ({"memory_size": 8, "seed": 2**63}, "seed must be"),
    ],
)
def test_robe_parameters_that_mean_nothing_are_refused(options: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter, its value and what it may be."""
    with pytest.raises(ConfigError, match=named):
        ROBE(10, 4, **options)


def test_robe_budget_is_the_array() -> None:
    """A fourth of the bytes, without a ceiling on the ratio, up to the largest array; a size beside it is refused."""
    assert ROBE.from_budget(10**15, 64, 4003).config.memory_size == 1000
    assert ROBE.from_budget(10**15, 64, 4).num_bytes() == 4
    with pytest.raises(ConfigError, match="robe cannot be stored in 3 bytes here: the least is 4"):
        ROBE.from_budget(10, 4, 3)
    for options in ({"memory_size": 5}, {"memory": torch.nn.Parameter(torch.ones(5))}):
        with pytest.raises(ConfigError, match="either a budget or memory"):
            ROBE.from_budget(10, 4, 400, **options)
    with torch.device("meta"):
        assert ROBE.from_budget(10, 4, 2**50).config.memory_size == MAX_BUCKETS


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
    """By hand for any history, in any order, with repetitions."""
    found = signatures_from_histories(6, np.array(pairs, np.int64).reshape(-1, 2), seed)
    expected = [signature_by_hand({c for i, c in pairs if i == id_}, id_, seed) for id_ in range(6)]
    assert [int(word) % WORD for word in found] == expected
    again = signatures_from_histories(6, torch.tensor(pairs[::-1] + pairs).long().reshape(-1, 2), seed)
    assert torch.equal(found, again)


def test_signatures_and_places_are_the_committed_ones() -> None:
    """Both hashes are part of the file format."""
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
    """The smallest k with 16 ** k D >= 2 M; a given one is kept."""
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
    """DataError names what is wrong and where."""
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


# ---- fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ROBE, LMA])
def test_a_fit_is_the_least_squares_optimum(cls: Any) -> None:
    """No memory gives a smaller weighted error for these places: a general solver finds the same vectors."""
    vectors_ND, weights_N = torch.randn(30, 6), torch.rand(30) + 0.1
    options = {"block_size": 4, "scale": 0.5} if cls is ROBE else {"keys_per_dim": 2}
    fitted = cls.fit(vectors_ND, 4 * 40 + (8 * 30 if cls is LMA else 0), weights_N=weights_N, **options)
    assert fitted.config.memory_size == 40
    found = fitted(torch.arange(30)).detach().double()
    torch.testing.assert_close(found, least_squares_of_memory(fitted, vectors_ND, weights_N), rtol=1e-4, atol=1e-5)


def test_slot_means_say_what_they_explain() -> None:
    """The energy of the vectors less what is explained is the error; a slot that nobody reads is 0."""
    vectors_ND, weights_N = torch.randn(50, 3), torch.tensor([1.0, 0.0]).repeat(25)
    index_ND, negative_ND = torch.randint(20, (50, 3)), torch.rand(50, 3) < 0.5
    means_M, explained = weighted_slot_means(
        vectors_ND, lambda ids: (index_ND[ids], negative_ND[ids]), 22, weights_N=weights_N
    )
    approx_ND = torch.where(negative_ND, -means_M[index_ND], means_M[index_ND])
    energy = float((2 * weights_N @ vectors_ND.double().square().sum(dim=1).float()).double())
    error = weighted_relative_error(vectors_ND, approx_ND, weights_N)
    assert error**2 == pytest.approx(1 - explained / energy, rel=1e-5)
    assert means_M[20:].tolist() == [0.0, 0.0]


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


# ---- training ---------------------------------------------------------------------------------------------------


def test_numbers_of_an_array_have_moments_of_their_own() -> None:
    """Row-wise Adagrad on a 1-d parameter: each number moves by its own gradient's history, untouched ones not."""
    module = ROBE(100, 8, memory_size=64, block_size=4)
    before = module.memory.detach().clone()
    optimizer = RowwiseAdagrad(module.parameters(), learning_rate=0.5)
    ids, moment, expected = torch.tensor([3, 3, 9]), torch.zeros(64), before.clone()
    for _ in range(3):
        module(ids).square().sum().backward()
        assert module.memory.grad is not None
        gradient = module.memory.grad.clone()
        moment += gradient.square()
        expected -= 0.5 * gradient * (moment + 1e-12).rsqrt()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(module.memory.detach(), expected)
    read = torch.zeros(64, dtype=torch.bool)
    read[robe.places(module.config, ids)[0].flatten()] = True
    assert same_bits(module.memory[~read], before[~read])
    assert (module.memory[read] != before[read]).all()
