"""robe: where each number of each vector is read from, to the bit, and what that promises."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M memory_size.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.fits import least_squares_of_memory
from support.integer_hashing import mix
from support.scheme_cases import all_paths, same_bits

from embstore.errors import ConfigError
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import ROBE, robe
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


def test_a_fit_is_the_least_squares_optimum() -> None:
    """No memory gives a smaller weighted error for these places: a general solver finds the same vectors."""
    vectors_ND, weights_N = torch.randn(30, 6), torch.rand(30) + 0.1
    fitted = ROBE.fit(vectors_ND, 4 * 40, weights_N=weights_N, block_size=4, scale=0.5)
    assert fitted.config.memory_size == 40
    found = fitted(torch.arange(30)).detach().double()
    best = least_squares_of_memory(fitted, vectors_ND, weights_N)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
