"""Path-based composition: every id's own row through its own bucket's network, in any company."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, W width of a row, H hidden units, Q networks.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.scheme_cases import looked_up, same, same_bits, served
from torch import Tensor

from embstore.errors import ConfigError
from embstore.kernels.cpu.matmul_tile import DEPTH, LANES, ROWS
from embstore.schemes import Full, PathBased
from embstore.schemes.path import PathConfig

pytestmark = pytest.mark.slow

RTOL = 2e-6
SIZES = [  # n, D, m, H, W: below, at and above a tile's lanes and depth, one of everything, more rows than ids
    (53, 19, 7, 16, 19),
    (53, 64, 7, 16, 64),
    (1, 1, 1, 1, 1),
    (50, 2, 1, 3, 5),
    (100, LANES, 30, LANES + 1, DEPTH - 1),
    (100, LANES + 1, 30, LANES - 1, DEPTH + 1),
    (100, 3 * LANES, 200, DEPTH + 5, 2 * DEPTH + 3),
]
every_size = pytest.mark.parametrize(("n", "d", "m", "h", "w"), SIZES)


def filled(n: int, d: int, m: int, h: int = 16, w: int | None = None, **options: Any) -> PathBased:
    module = PathBased(n, d, num_buckets=m, hidden_dim=h, input_dim=w, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
    return module


def all_paths(module: PathBased, ids: Tensor) -> list[Tensor]:
    """Vectors by forward, by the torch lookup and by the compiled one."""
    return [module(ids).detach(), looked_up(module, ids), served(module, ids)]


def formula(module: PathBased, ids: Tensor) -> NDArray[np.float64]:
    """One id after the other, in float64."""
    m = module.config.num_buckets
    weight, hidden, hidden_bias, output, output_bias = (
        module.get_parameter(name).detach().double().numpy()
        for name in ("weight", "hidden", "hidden_bias", "output", "output_bias")
    )
    vectors = np.empty((len(ids), module.embedding_dim))
    for i, x in enumerate(ids.tolist()):
        q, r = divmod(x, m)
        vectors[i] = np.maximum(weight[r] @ hidden[q] + hidden_bias[q], 0) @ output[q] + output_bias[q]
    return vectors


@every_size
def test_vectors_are_the_formula_id_by_id(n: int, d: int, m: int, h: int, w: int) -> None:
    """Around the tile's rows, lanes and depth, every id's row goes through its bucket's network and no other."""
    module = filled(n, d, m, h, w)
    for batch in (0, 1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 1):
        ids = torch.randint(n, (batch,))
        expected = torch.from_numpy(formula(module, ids)).float()
        for vectors in all_paths(module, ids):
            assert same(vectors, expected, RTOL)


@every_size
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_rows_of_any_dtype_go_through_the_networks(n: int, d: int, m: int, h: int, w: int, dtype: str) -> None:
    """The shared table may be stored in fewer bits; the networks stay float32."""
    w += w % 2 + 2  # int4 keeps two numbers in a byte, and narrow rows do not get smaller
    module, ids = filled(n, d, m, h, w), torch.randint(n, (100,))
    assert same(served(module, ids, dtype), looked_up(module, ids, dtype), RTOL)


@given(ids=st.lists(st.integers(-3, 99) | st.just(-(2**63)), max_size=60))
def test_the_compiled_vector_of_an_id_has_the_same_bits_in_any_batch(ids: list[int]) -> None:
    """Order, repetition and company change nothing; rows of missing ids are left as they were."""
    torch.manual_seed(0)
    module = filled(100, 19, 23, 5)
    alone = torch.cat([served(module, torch.tensor([x])) for x in range(100)])
    tensors = {name: tensor.detach().numpy() for name, tensor in module.tensors().items()}
    ids_B, out = np.array(ids, np.int64), np.full((len(ids), 19), 0.125, np.float32)
    PathBased.lookup(module.config, tensors, ids_B, out)
    expected = torch.where(torch.from_numpy(ids_B >= 0)[:, None], alone[np.maximum(ids_B, 0)], 0.125)
    assert same_bits(torch.from_numpy(out), expected)


@pytest.mark.parametrize("num_buckets", [53, 54, 200])
def test_a_row_per_id_and_an_identity_are_the_full_table(num_buckets: int) -> None:
    """m >= n and one network of relu(x) - relu(-x), which is x: the table itself, bit for bit."""
    module, full = filled(53, 5, num_buckets, h=10), Full(53, 5)
    identity = torch.cat([torch.eye(5), -torch.eye(5)], dim=1)
    module.hidden.data[0], module.output.data[0] = identity, identity.T
    module.hidden_bias.data.zero_()
    module.output_bias.data.zero_()
    full.load_state_dict({"weight": module.weight[:53].detach()})
    for vectors in all_paths(module, torch.arange(53)):
        assert torch.equal(vectors, full(torch.arange(53)))  # zeros may change their sign


def test_huge_ids_reach_their_row_and_their_network() -> None:
    """Past 2^24, 2^31 and 2^32 quotient and remainder are exact: networks that give (q, r) give these."""
    m, n = 2**20 - 3, 2**33
    module = PathBased(n, 2, num_buckets=m, hidden_dim=1, input_dim=1)
    module.weight.data = torch.arange(m, dtype=torch.float32)[:, None]
    for parameter in module.networks():
        parameter.data.zero_()
    module.hidden.data.fill_(1.0)
    module.output.data[..., 1] = 1.0
    module.output_bias.data[:, 0] = torch.arange(module.config.num_networks)
    ids = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 3, n - 1, 8000 * m - 1, 8000 * m, 8000 * m + 1]
    for vectors in all_paths(module, torch.tensor(ids)):
        assert vectors.tolist() == [[float(part) for part in divmod(x, m)] for x in ids]


def test_nan_is_served_as_nan() -> None:
    """A rectifier that compares must not turn NaN into 0."""
    module = filled(10, 4, 5, 3)
    module.weight.data[2] = math.nan
    for vectors in all_paths(module, torch.arange(10)):
        assert vectors.isnan().all(dim=1).tolist() == [x % 5 == 2 for x in range(10)]


def test_gradients_reach_what_the_batch_used_and_nothing_else() -> None:
    """Rows sparse where asked, layers dense: only the batch's rows and its buckets' networks get gradients."""
    module = filled(100, 8, 10, 4, sparse=True)
    module(torch.tensor([3, 13, 17, 95])).square().sum().backward()
    gradient = module.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.coalesce().indices()[0].tolist() == [3, 5, 7]
    for parameter in module.networks():
        assert parameter.grad is not None
        used = parameter.grad.flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert used == [0, 1, 9]


def test_the_networks_are_what_all_ids_of_a_bucket_share() -> None:
    """Everything but the shared table is a layer."""
    module = filled(100, 8, 10)
    named = {name for name, p in module.named_parameters() if any(p is layer for layer in module.networks())}
    assert named == {"hidden", "hidden_bias", "output", "output_bias"}


@pytest.mark.parametrize(("d", "w", "init_std"), [(64, None, None), (32, 8, 0.1), (64, 128, 3.0)])
def test_every_bucket_starts_with_mean_0_and_the_scale_asked_for(d: int, w: int | None, init_std: float | None) -> None:
    """Rectified units have a mean above 0: what they add up to is taken off, bucket by bucket."""
    torch.manual_seed(0)
    m, num_networks = 512, 64
    module = PathBased(m * num_networks, d, num_buckets=m, input_dim=w, init_std=init_std)
    vectors = module(torch.arange(m * num_networks)).detach().view(num_networks, m, d).double()
    std = d**-0.5 if init_std is None else init_std
    assert float(vectors.std()) == pytest.approx(std, rel=0.05)
    assert float(vectors.mean(dim=1).square().mean().sqrt()) < 0.12 * std  # 512 ids: 0.044 by chance


@pytest.mark.parametrize(("n", "d", "h", "w"), [(1, 1, 1, 1), (30, 4, 2, 4), (100, 2, 3, 7), (500, 16, 4, 3)])
def test_a_budget_is_searched_exactly(n: int, d: int, h: int, w: int) -> None:
    """All m are compared: the largest that fits, and a refusal that names the least bytes and the ceiling."""
    sizes = [4 * (w * m + (w * h + h + h * d + d) * -(-n // m)) for m in range(1, n + 1)]
    least = min(sizes)
    for num_bytes in sorted({least - 1, least, least + 4, *sizes[:: max(1, n // 50)], 10 * max(sizes)}):
        if num_bytes < least:
            with pytest.raises(ConfigError, match=rf"the least is {least:,} \(m = \d+\), because .*cannot pass "):
                PathBased.from_budget(n, d, num_bytes, hidden_dim=h, input_dim=w)
            continue
        module = PathBased.from_budget(n, d, num_bytes, hidden_dim=h, input_dim=w)
        assert module.config.num_buckets == max(m for m, size in enumerate(sizes, 1) if size <= num_bytes)
        assert module.num_bytes() == sizes[module.config.num_buckets - 1]


def test_the_ceiling_grows_with_the_root_of_the_ids() -> None:
    """The docstring's figures: 8.7 for 10,000 ids of 64 floats, 122 for two million."""
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=r"its ratio cannot pass 8\.66"):
            PathBased.from_budget(10_000, 64, 10_000)
        with pytest.raises(ConfigError, match=r"its ratio cannot pass 122\.6"):
            PathBased.from_budget(2_000_000, 64, 10_000)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"hidden_dim": 2.0}, "hidden_dim must be a whole number"),
        ({"input_dim": 0}, "input_dim must be at least 1"),
        ({"input_dim": True}, "input_dim must be a whole number"),
        ({"num_buckets": 0}, "num_buckets must be at least 1"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        PathConfig(**({"num_embeddings": 10, "embedding_dim": 4, "num_buckets": 3} | wrong))
