"""The contract of every scheme: how vectors start, what is stored, what a budget buys, what configs refuse."""

# Shapes: N num_embeddings, D embedding_dim, M num_buckets.

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.scheme_cases import (
    ALL,
    CASES,
    Case,
    D,
    M,
    N,
    every_case,
    same_bits,
    served,
    stored_arrays,
)

from embstore import schemes
from embstore.errors import ConfigError, IdOutOfRange
from embstore.hashing import MAX_BUCKETS
from embstore.schemes import scheme_class
from embstore.schemes.base import MAX_IDS, target_std
from embstore.store.tensor_file import write_arrays

# ---- how vectors start ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("d", "init_std"), [(64, None), (512, None), (64, 0.02), (64, 3.0)])
def test_vectors_start_at_the_stated_scale(case: Case, d: int, init_std: float | None) -> None:
    """Mean 0 and standard deviation `init_std`, embedding_dim ** -0.5 by default, whatever the scheme."""
    n, m = 2**12, 2**7
    module = case.build(n=n, d=d, m=m) if init_std is None else case.build(n=n, d=d, m=m, init_std=init_std)
    expected = case.dim(d) ** -0.5 if init_std is None else init_std
    vectors = module(torch.arange(n)).detach().double()
    assert abs(float(vectors.std()) / expected - 1) < case.variant.std_tolerance
    assert abs(float(vectors.mean())) < case.variant.std_tolerance * expected


@every_case
def test_a_generator_decides_the_start(case: Case) -> None:
    """The same generator seed gives the same parameters, another seed others."""
    first, again, other = (case.build(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    ids = torch.arange(N)
    assert same_bits(first(ids), again(ids))
    assert not same_bits(first(ids), other(ids))


@pytest.mark.parametrize("init_std", [0, 0.0, -1.0, float("nan")])
def test_a_scale_that_is_none_is_refused(init_std: float) -> None:
    """init_std is above 0."""
    with pytest.raises(ConfigError, match="init_std must be above 0"):
        target_std(8, init_std)


# ---- bytes ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("n", "d", "m"), [(N, D, M), (1, 2, 1), (64, 16, 8), (10, 3, 30)])
def test_bytes_stated_are_bytes_on_disk(case: Case, n: int, d: int, m: int) -> None:
    """num_bytes() is the file's size less its header, and `layout` says what is in it without building it."""
    module = case.build(n=n, d=d, m=m)
    config, tensors = module.export()
    layout = case.cls.layout(config)
    arrays = stored_arrays(module)
    assert {name: slot.shape for name, slot in layout.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    file = io.BytesIO()
    write_arrays(file, arrays)
    data = file.getvalue()
    assert module.num_bytes() == len(data) - 8 - int.from_bytes(data[:8], "little") == case.num_bytes(n, d, m)


def least_bytes(error: ConfigError) -> int:
    """The least budget that an error names."""
    match = re.search(r"the least is ([\d,]*\d)", str(error))
    assert match, str(error)
    return int(match[1].replace(",", ""))


STATED: dict[str, Callable[[int, int, int], int]] = {
    "full-plain": lambda n, d, _: 4 * n * d,
    "hash-mod": lambda _, d, m: 4 * m * d,
    "memcom-scale": lambda n, d, m: 4 * m * d + 4 * n,
    "memcom-bias": lambda n, d, m: 4 * m * d + 8 * n,
    "memcom-bias-offset": lambda n, d, m: 4 * m * d + 8 * n + 4 * d,
}


@pytest.mark.parametrize("label", STATED)
def test_bytes_are_the_formula_of_the_docstring(label: str) -> None:
    """The bytes that each scheme's file promises."""
    for n, d, m in [(N, D, M), (100, 16, 10), (7, 2, 7)]:
        assert dict(ALL)[label].num_bytes(n, d, m) == STATED[label](n, d, m)


@every_case
@pytest.mark.parametrize(("n", "d"), [(1, 2), (8, 2), (N, 4), (N, D), (120, 16)])
def test_a_budget_is_kept(case: Case, n: int, d: int) -> None:
    """Never above the budget; where none fits, the error names the least, and the least fits."""
    d = case.dim(d)
    for num_bytes in sorted({1, *np.geomspace(8, 40 * n * d, 12).astype(int).tolist()}):
        try:
            module = case.budgeted(n, d, num_bytes)
        except ConfigError as error:
            least = least_bytes(error)
            assert num_bytes < least
            assert case.budgeted(n, d, least).num_bytes() <= least
            continue
        assert module.num_bytes() <= num_bytes
        assert (module.num_embeddings, module.embedding_dim) == (n, d)


@pytest.mark.parametrize("case", [p for p in CASES if p.values[0].variant.searched])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (8, 2), (N, 3), (N, D), (120, 5), (121, 4)])
def test_a_budget_is_used(case: Case, n: int, d: int) -> None:
    """Of all configurations up to one bucket per id, the largest m that fits; ConfigError where none does."""
    d = case.dim(d)
    sizes = {m: case.num_bytes(n, d, m) for m in range(1, n + 1)}
    least, most = min(sizes.values()), max(sizes.values())
    budgets = {1, least - 1, least, least + 1, most - 1, most, most + 1, 10 * most, *range(least, most, most // 20 + 1)}
    for num_bytes in sorted(budgets):
        if num_bytes < least:
            with pytest.raises(ConfigError) as raised:
                case.budgeted(n, d, num_bytes)
            assert re.search(rf"(?<![\d,]){least:,}(?!\d|,\d)", str(raised.value))
            continue
        module = case.budgeted(n, d, num_bytes)
        assert module.config.num_buckets == max(m for m, size in sizes.items() if size <= num_bytes)
        for name, value in case.variant.options.items():
            assert getattr(module.config, name) == value


@every_case
def test_a_budget_passes_its_options_on(case: Case) -> None:
    """sparse, init_std and generator reach the module; a size beside a budget is refused."""
    module = case.budgeted(N, case.dim(D), 10**6, sparse=True, init_std=1e-9).eval()
    assert module.sparse
    assert float(module(torch.arange(N)).detach().abs().max()) < 1e-6
    if case.variant.searched:
        with pytest.raises(ConfigError, match="either a budget or num_buckets"):
            case.budgeted(N, case.dim(D), 10**6, num_buckets=3)


@every_case
@pytest.mark.parametrize(("n", "d"), [(0, 4), (-5, 4), (10, 0), (10, -1), (2**63, 4)])
def test_sizes_that_are_none_are_refused_with_any_budget(case: Case, n: int, d: int) -> None:
    """num_embeddings and embedding_dim are checked before anything is divided by them or allocated."""
    for num_bytes in (0, 1000, 2**80):
        with torch.device("meta"), pytest.raises(ConfigError):
            case.budgeted(n, d, num_bytes)


def test_a_huge_budget_stops_at_what_a_bucket_can_be() -> None:
    """More than 2^31 - 1 hash buckets do not exist, whatever the budget."""
    with torch.device("meta"):
        assert schemes.Hash.from_budget(2**40, 1, 2**50).config.num_buckets == MAX_BUCKETS


# ---- configs ----------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("bad", [0, -1, 1.0, 1.5, "8", None, True])
def test_a_size_that_is_none_is_refused_by_name(case: Case, bad: Any) -> None:
    """Sizes are whole numbers from 1; the message says which size is wrong and what it is."""
    config = case.build().config
    sizes = {"num_embeddings", "embedding_dim", "num_buckets"} & {f.name for f in fields(config)}
    for name in sizes:
        with pytest.raises(ConfigError, match=rf"^{name} must be .*got {re.escape(repr(bad))}$"):
            replace(config, **{name: bad})


@pytest.mark.parametrize("name", ["full", "hash"])
def test_more_ids_than_int64_has_are_refused(name: str) -> None:
    """num_embeddings is at most 2^63 - 1."""
    config = scheme_class(name).Config(
        num_embeddings=MAX_IDS, embedding_dim=3, **({"num_buckets": 2} if name == "hash" else {})
    )
    with pytest.raises(ConfigError, match="num_embeddings must be at least 1 and at most 9223372036854775807"):
        replace(config, num_embeddings=MAX_IDS + 1)


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("hash", {"num_buckets": MAX_BUCKETS + 1}, "num_buckets must be at least 1 and at most 2147483647"),
        ("hash", {"num_buckets": 3, "seed": -1}, "seed must be at least 0"),
        ("hash", {"num_buckets": 3, "seed": 2**63}, "seed must be at least 0 and at most"),
        ("hash", {"num_buckets": 3, "seed": 1.5}, "seed must be a whole number"),
        ("hash", {"num_buckets": 3, "seed": True}, "seed must be a whole number"),
        ("memcom", {"num_buckets": 3, "bias": 1}, "bias must be true or false, got 1"),
        ("memcom", {"num_buckets": 3, "offset": None}, "offset must be true or false"),
        ("full", {"embedding_dim": 65_537}, "embedding_dim must be at least 1 and at most 65536"),
        ("mixed_precision", {"num_hot": 3, "bits": 8.0}, "bits must be 8 or 4, got 8.0"),
        ("dhe", {"num_hashes": 4, "hidden": [2] * 65}, "hidden must be at most 64 layers, got 65"),
        (
            "masked",
            {"num_embeddings": 2000, "block_sizes": [1] * 2000, "block_widths": [1] * 2000},
            "there may be 1024 blocks at most, got 2000",
        ),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(name: str, wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        scheme_class(name).Config(**({"num_embeddings": 10, "embedding_dim": 4} | wrong))


def test_memcom_says_its_ceiling() -> None:
    """A ratio past what the ids' own numbers allow is refused with the ceiling."""
    with pytest.raises(
        ConfigError, match=r"the least is 4,064, because each id keeps a number of its own; .* below 16"
    ):
        schemes.MEmCom.from_budget(1000, 16, 1000)


def test_as_many_ids_as_int64_has() -> None:
    """The largest num_embeddings is 2^63 - 1: the last id is served, not wrapped."""
    module = schemes.Hash(MAX_IDS, 2, num_buckets=5, seed=1)
    last = torch.tensor([MAX_IDS - 1])
    assert same_bits(served(module, last), module(last))
    with pytest.raises(IdOutOfRange):
        module(torch.tensor([MAX_IDS]))
