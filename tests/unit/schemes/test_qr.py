"""qr: no two ids share all buckets, budgets are searched exactly, fits are least squares."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, K partitions.

from __future__ import annotations

import math
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.scheme_cases import all_paths, same_bits
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes import QR, Full
from embstore.schemes.parts.partitions import first_moduli, moduli
from embstore.schemes.qr import OPS, PARTITIONS, QRConfig, indices

pytestmark = pytest.mark.slow

every_op = pytest.mark.parametrize("op", OPS)

every_partition = pytest.mark.parametrize("partition", PARTITIONS)

HUGE = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 + 3, 2**40, 2**53 + 1, 2**62 - 1]


def filled(n: int, d: int, **options: Any) -> QR:
    module = QR(n, d, **options)
    with torch.no_grad():
        module.weight.uniform_(-1, 1)
    return module


def buckets(config: QRConfig, x: int) -> list[int]:
    """i_1 .. i_k of one id, in integers without limits."""
    if config.partition == "crt":
        return [x % m for m in config.moduli]
    divisors = accumulate(config.moduli[:-1], lambda a, b: a * b, initial=1)
    return [x // divisor % m for divisor, m in zip(divisors, config.moduli, strict=True)]


def parts(module: QR, x: int) -> list[NDArray[np.float32]]:
    """The rows of one id, one per partition."""
    config, weight = module.config, module.weight.detach().numpy()
    starts = accumulate(config.moduli[:-1], initial=0)
    return [weight[start + i] for start, i in zip(starts, buckets(config, x), strict=True)]


@every_partition
@pytest.mark.parametrize("k", [2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 2, 16, 97, 100, 101, 1024, 5041])
def test_no_two_ids_share_all_their_buckets(n: int, k: int, partition: str) -> None:
    """The index tuples of all ids are enumerated: all different, all in range, as integer maths has them."""
    for m in sorted({1, 2, 3, 7, 10, round(n ** (1 / k)), math.isqrt(n), n - 1, n, n + 3} - {0}):
        config = QRConfig(num_embeddings=n, embedding_dim=1, num_buckets=m, num_partitions=k, partition=partition)
        found = torch.stack(indices(config, torch.arange(n)), dim=1)
        assert len(found.unique(dim=0)) == n
        assert bool((found >= 0).all())
        assert bool((found < torch.tensor(config.moduli)).all())
        for x in {0, n // 2, n - 1}:
            assert found[x].tolist() == buckets(config, x)


@pytest.mark.parametrize(
    ("partition", "k", "m"),
    [("radix", 3, 2**21 - 1), ("radix", 4, 1), ("radix", 16, 15), ("crt", 3, 2**21 - 1), ("crt", 4, 1000)],
)
def test_buckets_of_huge_ids_are_exact(partition: str, k: int, m: int) -> None:
    """Up to 2^62 each path reads the rows that integer maths says; row i holds the number i."""
    module = QR(2**62, k, num_buckets=m, op="concat", num_partitions=k, partition=partition)
    module.weight.data = torch.arange(len(module.weight), dtype=torch.float32)[:, None]
    starts = list(accumulate(module.config.moduli[:-1], initial=0))
    expected = [[float(s + i) for s, i in zip(starts, buckets(module.config, x), strict=True)] for x in HUGE]
    for vectors in all_paths(module, torch.tensor(HUGE)):
        assert vectors.tolist() == expected


# ---- what is computed from their rows ---------------------------------------------------------------------------


@every_op
@every_partition
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("width", [1, 3, 16, 33])
def test_vectors_are_the_formula_id_by_id(op: str, partition: str, k: int, width: int) -> None:
    """Rows combined from the left, each result rounded, bit for bit; around the loop's depth, missing ids left out."""
    n, d = 211, width * k if op == "concat" else width
    module = filled(n, d, num_buckets=11, op=op, num_partitions=k, partition=partition)
    combine = {"mult": np.multiply, "add": np.add, "concat": lambda a, b: np.concatenate([a, b])}[op]
    for batch in (1, 15, 16, 17, 33, 100):
        ids = torch.randint(n, (batch,))
        expected = torch.from_numpy(np.stack([reduce(combine, parts(module, x)) for x in ids.tolist()]))
        for vectors in all_paths(module, ids):
            assert same_bits(vectors, expected)
        missing = torch.randint(2, (batch,)).bool()
        out = np.full((batch, d), 0.125, np.float32)
        QR.lookup(module.config, {"weight": module.weight.detach().numpy()}, torch.where(missing, -1, ids).numpy(), out)
        assert same_bits(torch.from_numpy(out), torch.where(missing[:, None], 0.125, expected))


@every_partition
def test_products_are_taken_from_the_left(partition: str) -> None:
    """(1e30 * 1e30) * 1e-30 overflows, 1e30 * (1e30 * 1e-30) would not: all paths overflow."""
    module = QR(1000, 3, num_buckets=10, num_partitions=3, partition=partition)
    first, second, _ = module.config.moduli
    module.weight.data[: first + second] = 1e30
    module.weight.data[first + second :] = 1e-30
    for vectors in all_paths(module, torch.arange(1000)):
        assert bool(vectors.isinf().all())


class ReferenceQR(nn.Module):
    """Quotient-remainder as the DLRM code has it: two bags of one id each, then the operation; the quotient first."""

    def __init__(self, quotient: Tensor, remainder: Tensor, op: str) -> None:
        super().__init__()
        self.divisor, self.op = len(remainder), op
        self.q = nn.EmbeddingBag.from_pretrained(quotient, mode="sum")
        self.r = nn.EmbeddingBag.from_pretrained(remainder, mode="sum")

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        q, r = self.q(ids // self.divisor, offsets), self.r(torch.remainder(ids, self.divisor), offsets)
        return torch.cat((q, r), dim=1) if self.op == "concat" else q * r if self.op == "mult" else q + r


@every_op
@pytest.mark.parametrize(("n", "m"), [(1000, 32), (1000, 4), (999, 250), (10, 10)])
def test_two_digits_are_the_reference_quotient_and_remainder(op: str, n: int, m: int) -> None:
    """With injected weights the vectors are the reference's; its concatenation has the quotient first."""
    module = filled(n, 8, num_buckets=m, op=op)
    remainder, quotient = torch.split(module.weight.detach(), list(module.config.moduli))
    ids = torch.arange(n)
    expected = ReferenceQR(quotient, remainder, op)(ids, torch.arange(n))
    vectors = module(ids).roll(4, dims=1) if op == "concat" else module(ids)
    assert same_bits(vectors, expected)


@pytest.mark.parametrize("num_buckets", [53, 54, 200])
@pytest.mark.parametrize(("op", "neutral"), [("mult", 1.0), ("add", 0.0)])
@pytest.mark.parametrize("k", [2, 3])
@every_partition
def test_a_row_per_id_and_neutral_others_are_the_full_table(
    num_buckets: int, op: str, neutral: float, k: int, partition: str
) -> None:
    """m >= n: the other partitions have one row each; where it is neutral, the first is the table."""
    module = filled(53, 5, num_buckets=num_buckets, op=op, num_partitions=k, partition=partition)
    assert module.config.moduli == (num_buckets, *[1] * (k - 1))
    module.weight.data[num_buckets:] = neutral
    for vectors in all_paths(module, torch.arange(53)):
        assert same_bits(vectors, module.weight[:53])


@every_op
@every_partition
def test_a_table_up_to_the_threshold_is_plain(op: str, partition: str) -> None:
    """n <= threshold: one row of the whole width per id, that starts and is looked up as in a full table."""
    options: dict[str, Any] = {"num_buckets": 3, "op": op, "partition": partition, "threshold": 53}
    module, full = QR(53, 4, **options), Full(53, 4)
    assert module.config.moduli == (53,)
    full.load_state_dict(module.state_dict())
    for vectors in all_paths(module, torch.arange(53)):
        assert same_bits(vectors, full(torch.arange(53)))
    assert len(QR(54, 4, **options).config.moduli) == 2
    start = QR(4096, 64, num_buckets=1, op=op, threshold=4096, init_std=1.0).weight.detach()
    assert abs(float(start.std()) - 1) < 0.01


# ---- how vectors start ------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("k", [2, 4])
def test_vectors_start_at_the_scale_to_a_thousandth(op: str, k: int) -> None:
    """A million independent products or sums: the spread of the factors around 1 is accounted for."""
    m, d = 4096, 512
    n = m * m if k == 2 else 2**40
    module = QR(n, d, num_buckets=m, op=op, num_partitions=k, init_std=1.0)
    ids = torch.arange(m) * (n // m) + torch.arange(m)  # every row of the first partition once
    assert abs(float(module(ids).detach().double().std()) - 1) < (0.0025 if k == 2 else 0.01)


@pytest.mark.parametrize("k", [2, 3])
def test_the_most_frequent_ids_start_apart(k: int) -> None:
    """The first m ids own a row of the first partition, and products start from these, not from what they share."""
    vectors = QR(1000, 256, num_buckets=100, num_partitions=k)(torch.arange(100)).detach()
    cosines = torch.corrcoef(vectors) - torch.eye(100)
    assert float(cosines.abs().max()) < 0.4


# ---- budgets ----------------------------------------------------------------------------------------------------


@every_partition
@pytest.mark.parametrize("k", [2, 3, 4, 6])
@pytest.mark.parametrize("n", [*range(1, 20), 97, 100, 128, 1000])
def test_the_search_finds_the_least_and_the_largest(n: int, k: int, partition: str) -> None:
    """Every first modulus is compared, for every sum there is near the least, and for the largest."""
    crt = partition == "crt"
    sums = [math.inf, *(sum(moduli(n, m, k, coprime=crt)) for m in range(1, n + 1))]
    search, least = first_moduli(n, k, coprime=crt), min(sums)
    assert sums[search.least()] == least
    for budget in {*range(int(least) - 2, int(least) + 20), int(sums[-1]) - 1, int(sums[-1]), 10 * n + k}:
        largest = max((m for m in range(1, n + 1) if sums[m] <= budget), default=None)
        assert search.largest(budget) == largest


@pytest.mark.parametrize("n", [9_973, 99_999, 1_000_000])
@pytest.mark.parametrize(("op", "d"), [("mult", 3), ("mult", 16), ("add", 5), ("concat", 10)])
def test_quotient_and_remainder_are_searched_exactly_at_full_size(n: int, op: str, d: int) -> None:
    """All m of a million are compared: the least budget, the largest m, and the text that names the least."""
    m, row_bytes = np.arange(1, n + 1), 4 * (d // 2 if op == "concat" else d)
    sizes = row_bytes * (m + -(-n // m))
    least = int(sizes.min())
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=rf"the least is {least:,} \(m = [\d,]+\); its ratio cannot pass "):
            QR.from_budget(n, d, least - 1, op=op)
        for num_bytes in (least, least + 4, least + 100, 2 * least, int(sizes.max()) - 4):
            module = QR.from_budget(n, d, num_bytes, op=op)
            assert module.config.num_buckets == int(m[sizes <= num_bytes].max())
            assert module.num_bytes() <= num_bytes


@every_partition
def test_budgets_of_ids_past_2_to_53_are_exact(partition: str) -> None:
    """No square root in floating point: one byte less than the least is refused, by name."""
    n = 2**62 - 57
    search = first_moduli(n, 2, coprime=partition == "crt")
    least = 4 * search.total(search.least())
    with torch.device("meta"):
        assert QR.from_budget(n, 1, least, partition=partition).num_bytes() == least
        with pytest.raises(ConfigError, match=f"the least is {least:,} "):
            QR.from_budget(n, 1, least - 1, partition=partition)


def test_the_ceiling_is_the_square_root() -> None:
    """10,000 ids take 200 rows at least: a fiftieth, and the message says so."""
    with pytest.raises(ConfigError, match=r"the least is 12,800 \(m = 100\); its ratio cannot pass 50$"):
        QR.from_budget(10_000, 16, 12_799)
    assert QR.from_budget(10_000, 16, 12_800).config.moduli == (100, 100)


def test_a_plain_table_has_one_budget() -> None:
    """n <= threshold: all rows fit, or the message says that the threshold asks for them."""
    assert QR.from_budget(100, 4, 1600, threshold=100).config.moduli == (100,)
    with pytest.raises(ConfigError, match=r"the least is 1,600 \(a table of 100 ids or fewer is plain\)"):
        QR.from_budget(100, 4, 1599, threshold=100)
    assert len(QR.from_budget(101, 4, 1599, threshold=100).config.moduli) == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"op": "max"}, "op must be one of mult, add, concat, got 'max'"),
        ({"op": None}, "op must be one of"),
        ({"partition": "mixed"}, "partition must be one of radix, crt, got 'mixed'"),
        ({"num_partitions": 1}, "num_partitions must be at least 2 and at most 16, got 1"),
        ({"num_partitions": 17}, "num_partitions must be at least 2 and at most 16"),
        ({"num_partitions": 2.0}, "num_partitions must be a whole number"),
        ({"threshold": -1}, "threshold must be at least 0"),
        ({"threshold": True}, "threshold must be a whole number"),
        ({"op": "concat", "num_partitions": 3}, "embedding_dim that num_partitions divides, got 4 and 3"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        QRConfig(**({"num_embeddings": 10, "embedding_dim": 4, "num_buckets": 3} | wrong))


# ---- fits -------------------------------------------------------------------------------------------------------


def error(vectors_ND: Tensor, approximation_ND: Tensor, weights_N: Tensor | None = None) -> float:
    """The weighted relative squared error."""
    weights_N = torch.ones(len(vectors_ND)) if weights_N is None else weights_N
    squares_N = (vectors_ND - approximation_ND.detach()).double().square().sum(dim=1)
    return float((weights_N * squares_N).sum() / (weights_N * vectors_ND.double().square().sum(dim=1)).sum())


def fit(vectors_ND: Tensor, m: int, op: str, weights_N: Tensor | None = None, **options: Any) -> QR:
    """A fit whose budget leaves room for `m` buckets, and rarely for more."""
    n, d = vectors_ND.shape
    num_bytes = QR(n, d, num_buckets=m, op=op, **options).num_bytes()
    generator = torch.Generator().manual_seed(0)
    return QR.fit(vectors_ND, num_bytes, weights_N=weights_N, generator=generator, op=op, **options)


@every_op
@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_of_the_scheme_itself_are_fitted_exactly(op: str, weighted: bool) -> None:
    """Two partitions' products, sums and concatenations are found again, from their vectors alone."""
    torch.manual_seed(0)
    n, m, d = 397, 40, 6
    vectors = filled(n, d, num_buckets=m, op=op)(torch.arange(n)).detach()
    weights = torch.rand(n) + 0.1 if weighted else None
    module = fit(vectors, m, op, weights)
    assert error(vectors, module(torch.arange(n))) < 1e-6


@every_op
@every_partition
@pytest.mark.parametrize("k", [2, 3])
def test_a_fit_is_no_worse_than_the_means_it_starts_from(op: str, k: int, partition: str) -> None:
    """With sums and products: one mean per bucket of the first partition. With concat: zeros."""
    torch.manual_seed(1)
    n, m, d = 600, 40, 12
    vectors = torch.randn(n, d) + torch.randn(d)
    weights = 1.0 / torch.arange(1, n + 1)
    module = fit(vectors, m, op, weights, num_partitions=k, partition=partition)
    m = module.config.num_buckets
    means = torch.zeros(m, d).index_add_(0, torch.arange(n) % m, vectors * weights[:, None])
    means /= torch.zeros(m).index_add_(0, torch.arange(n) % m, weights)[:, None]
    start = error(vectors, means[torch.arange(n) % m], weights) if op != "concat" else 1.0
    assert error(vectors, module(torch.arange(n)), weights) < start * (1.0 if op == "concat" else 1.01)


def test_a_sum_is_the_least_squares_solution() -> None:
    """Alternation ends where numpy's least squares over the indicator columns ends."""
    torch.manual_seed(2)
    n, m, d = 300, 20, 3
    vectors, weights = torch.randn(n, d).double(), torch.rand(n).double() + 0.05
    module = fit(vectors, m, "add", weights)
    x = np.arange(n)
    design = np.concatenate([np.eye(m)[x % m], np.eye(-(-n // m))[x // m]], axis=1)
    root = weights.sqrt().numpy()[:, None]
    solution = np.linalg.lstsq(root * design, root * vectors.numpy(), rcond=None)[0]
    expected = error(vectors, torch.from_numpy(design @ solution), weights)
    assert error(vectors, module(torch.arange(n)), weights) == pytest.approx(expected, rel=1e-3)


def test_a_concatenation_is_the_means_of_every_bucket() -> None:
    """Each part's columns get their buckets' weighted means, at once."""
    torch.manual_seed(3)
    n, m = 100, 10
    vectors, weights = torch.randn(n, 4), torch.rand(n)
    module = fit(vectors, m, "concat", weights)
    expected = torch.from_numpy(
        np.array([np.average(vectors[i::m, :2], axis=0, weights=weights[i::m]) for i in range(m)])
    ).float()
    torch.testing.assert_close(module.weight[:m].detach(), expected)


@every_op
def test_ids_without_weight_do_not_count(op: str) -> None:
    """A vector of weight 0 changes nothing that others read; rows that only such ids read are finite."""
    torch.manual_seed(4)
    n, m = 200, 20
    vectors, weights = torch.randn(n, 4), torch.rand(n) + 0.1
    weights[[7, 27, *range(180, 200)]] = 0
    changed = vectors.clone()
    changed[weights == 0] += 5.0
    one, other = fit(vectors, m, op, weights), fit(changed, m, op, weights)
    assert bool(one.weight.isfinite().all())
    counted = (weights > 0).nonzero().squeeze(1)
    torch.testing.assert_close(one(counted), other(counted), rtol=1e-3, atol=1e-3)


@every_op
def test_a_fit_leaves_the_vectors_alone(op: str) -> None:
    """float64 vectors are computed with as they are, and are not written to."""
    vectors = torch.randn(60, 4, dtype=torch.float64)
    before = vectors.clone()
    fit(vectors, 10, op)
    assert torch.equal(vectors, before)


def test_a_plain_table_is_fitted_by_its_vectors() -> None:
    """n <= threshold: the vectors themselves, bit for bit, whatever they weigh."""
    vectors, weights = torch.randn(50, 4), torch.rand(50)
    module = QR.fit(vectors, 10**6, weights_N=weights, threshold=50)
    assert same_bits(module(torch.arange(50)), vectors)
