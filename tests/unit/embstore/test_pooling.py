"""Bags of ids become one vector each, as torch's EmbeddingBag has it, for every scheme."""

# Shapes: B ids, G bags, N ids of a table, D embedding_dim.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bag_cases import BAD
from support.scheme_cases import Case, every_case, every_dtype, stored_arrays, stored_tensors

from embstore import pooling as pooling_file
from embstore.errors import ConfigError, DataError, IdOutOfRange
from embstore.ids import Dense, Vocabulary
from embstore.pooling import CACHED_BYTES, Bags, chunk_ids
from embstore.quantize import for_kernels
from embstore.schemes import Full
from embstore.table import IDS_A_THREAD, Table

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
WAYS = [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)]
every_way = pytest.mark.parametrize(("pooling", "weighted"), WAYS)
every_place = pytest.mark.parametrize("place", ["cpu", "cpu:0"])  # "cpu:0" takes a GPU's way without needing one


def table_of(module: Any, dtype: str = "float32", place: str = "cpu", keys: Any = None, num_threads: int = 1) -> Table:
    """The module as a loaded table; its default vector is all -7."""
    if place == "cpu":
        tensors: Any = {name: for_kernels(array) for name, array in stored_arrays(module, dtype).items()}
    else:
        tensors = stored_tensors(module, dtype)
    ids = Dense(module.num_embeddings) if keys is None else Vocabulary.from_ids(keys)
    default = np.full(module.embedding_dim, -7, np.float32)
    config = module.export()[0]
    return Table("item", 1, type(module), config, tensors, ids, default, place, num_threads=num_threads)


def full(rows_ND: Any) -> Full:
    """A table of these rows."""
    weight = torch.as_tensor(rows_ND, dtype=torch.float32)
    module = Full(*weight.shape)
    module.load_state_dict({"weight": weight})
    return module


def one_by_one(rows_BD: Floats, offsets: Any, pooling: str, weights_B: Any = None, left_out_B: Any = None) -> Floats:
    """The definition, id after id in the dtype of the rows: float32 as the library has it, float64 as the truth."""
    number = rows_BD.dtype.type
    out_GD = np.zeros((len(offsets), rows_BD.shape[1]), number)
    ends = [*offsets, len(rows_BD)][1:]
    for g, (start, end) in enumerate(zip(offsets, ends, strict=True)):
        total, first = 0.0, True
        for i in range(start, end):
            if left_out_B is not None and left_out_B[i]:
                continue
            weight = number(1 if weights_B is None else weights_B[i])
            total += float(weight)
            if pooling == "max":
                out_GD[g] = rows_BD[i] if first else np.maximum(out_GD[g], rows_BD[i])
            else:
                out_GD[g] += rows_BD[i] * weight
            first = False
        if pooling == "mean" and total > 0:
            out_GD[g] /= number(np.float32(total))
    return out_GD


def torchs(rows_BD: Floats, offsets: Any, pooling: str, weights_B: Any = None) -> Floats:
    """F.embedding_bag of rows; a weighted mean, which torch does not have, is a sum with weights that add up to 1."""
    weights = None if weights_B is None else torch.tensor(weights_B, dtype=torch.float64)
    if weights is not None and pooling == "mean":
        for start, end in zip(offsets, [*offsets, len(rows_BD)][1:], strict=True):
            weights[start:end] /= weights[start:end].sum() or 1.0
        pooling = "sum"
    rows = torch.tensor(rows_BD, dtype=torch.float64)
    ids = torch.arange(len(rows_BD))
    pooled = F.embedding_bag(ids, rows, torch.tensor(offsets), mode=pooling, per_sample_weights=weights)
    return pooled.float().numpy()


def close(a: Floats, b: Any, rows_BD: Floats, *bags: Any) -> bool:
    """Within a millionth of what the numbers of each bag add up to without their signs."""
    sizes_GD = one_by_one(np.abs(rows_BD.astype(np.float64)), *bags)
    return a.dtype == np.float32 and a.shape == b.shape and bool((np.abs(a - b) <= 1e-6 * sizes_GD).all())


OFFSETS = [0, 0, 1, 1, 1, 40, 41, 120, 200]
"""Bags of 200 ids: an empty one at the start, two in the middle, one at the end; of one id; of many."""


@every_place
@every_case
def test_every_scheme_pools_vectors_and_not_factors(case: Case, place: str) -> None:
    """Any scheme, any pooling: float32 additions of its composed vectors in the order of the ids, and torch agrees."""
    table = table_of(case.filled(), place=place)
    ids = np.random.default_rng(1).integers(0, table.ids.num_ids, 200)  # of 53: most of them more than once
    rows_BD = table.lookup(ids)
    for pooling, weighted in WAYS:
        weights = np.random.default_rng(2).random(200, np.float32) if weighted else None
        bags = (OFFSETS, pooling, weights)
        pooled = table.lookup(ids, offsets=OFFSETS, pooling=pooling, weights=weights)
        if place == "cpu":
            np.testing.assert_array_equal(pooled, one_by_one(rows_BD, *bags))
        assert close(pooled, one_by_one(rows_BD.astype(np.float64), *bags), rows_BD, *bags)
        assert close(pooled, torchs(rows_BD, *bags), rows_BD, *bags)
        assert not pooled[[0, 2, 3, 8]].any()


@every_dtype
@every_way
def test_every_storage_dtype_is_pooled(dtype: str, pooling: Any, weighted: bool) -> None:
    """Rows are read back first, in whatever type they are stored."""
    table = table_of(full(np.random.default_rng(0).standard_normal((30, 8))), dtype)
    ids, weights = np.arange(60) % 30, np.linspace(0, 2, 60) if weighted else None
    pooled = table.lookup(ids, offsets=[0, 13, 44], pooling=pooling, weights=weights)
    np.testing.assert_array_equal(pooled, one_by_one(table.lookup(ids), [0, 13, 44], pooling, weights))


@every_place
@every_way
def test_more_ids_than_a_chunk(monkeypatch: pytest.MonkeyPatch, pooling: Any, weighted: bool, place: str) -> None:
    """A bag that goes on from one chunk to the next, and bags that end with one, are as if there were no chunks."""
    dim = 4096
    monkeypatch.setattr(pooling_file, "DEVICE_BYTES", CACHED_BYTES)
    size = chunk_ids(dim, CACHED_BYTES)
    table = table_of(full(np.random.default_rng(0).standard_normal((50, dim))), place=place)
    ids = np.random.default_rng(1).integers(-1, 50, 5 * size + 7)
    offsets = [0, size - 1, size, size, 2 * size, 2 * size, 2 * size + 1, 5 * size + 7]
    weights = np.random.default_rng(2).random(len(ids), np.float32) if weighted else None
    rows_BD = table.lookup(ids)
    pooled = table.lookup(ids, offsets=offsets, pooling=pooling, weights=weights)
    bags = (offsets, pooling, weights, ids < 0)
    if place == "cpu":
        np.testing.assert_array_equal(pooled, one_by_one(rows_BD, *bags))
    assert close(pooled, one_by_one(rows_BD.astype(np.float64), *bags), rows_BD, *bags)


@every_way
@pytest.mark.parametrize("shape", ["many bags", "one bag", "a huge bag in the middle"])
def test_threads_do_not_change_a_bit(pooling: Any, weighted: bool, shape: str) -> None:
    """Each bag is one thread's: the answer does not depend on how many there are."""
    module = full(np.random.default_rng(0).standard_normal((500, 5)))
    ids = np.random.default_rng(1).integers(0, 500, 4 * IDS_A_THREAD)
    middle = [0, 10, 20, len(ids) - 10, len(ids)]
    many = np.sort(np.random.default_rng(2).integers(0, len(ids), 900))
    many[0] = 0
    offsets = {"many bags": many, "one bag": [0], "a huge bag in the middle": middle}[shape]
    weights = np.random.default_rng(3).random(len(ids), np.float32) if weighted else None
    answers = [
        table_of(module, num_threads=threads).lookup(ids, offsets=offsets, pooling=pooling, weights=weights)
        for threads in (1, 3, 4)
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


N, D = 6, 3


WEIGHT = np.arange(N * D, dtype=np.float32).reshape(N, D) - 5


@given(
    bags=st.lists(st.lists(st.integers(-2, N + 1), max_size=6), max_size=6),
    way=st.sampled_from(WAYS),
    on_missing=st.sampled_from(["zero", "default", "hash"]),
    data=st.data(),
)
def test_ragged_bags_of_any_shape(bags: list[list[int]], way: tuple[Any, bool], on_missing: str, data: Any) -> None:
    """Any bags, with ids that are not there, under any policy: what the definition says, and found is one per id."""
    pooling, weighted = way
    ids = [i for bag in bags for i in bag]
    offsets = np.cumsum([0, *map(len, bags)])[:-1].tolist()
    some = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(ids), max_size=len(ids))
    weights = data.draw(some) if weighted else None
    missing = np.array([not 0 <= i < N for i in ids], bool)
    for place in ("cpu", "cpu:0"):
        table = table_of(full(WEIGHT), place=place)
        rows_BD = table.lookup(ids, on_missing=on_missing)
        pooled, found = table.lookup(
            ids, offsets=offsets, pooling=pooling, weights=weights, on_missing=on_missing, return_found=True
        )
        left_out = missing if on_missing == "zero" else None
        expected = one_by_one(rows_BD, offsets, pooling, weights, left_out)
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)
        assert pooled.shape == (len(bags), D)
        assert (found.dtype, found.tolist()) == (np.bool_, (~missing).tolist())


@every_place
def test_a_missing_id_is_left_out_unless_it_has_a_vector(place: str) -> None:
    """`zero` does not lower a mean or stand in a maximum; `default` and `hash` count; `error` is an error."""
    table = table_of(full([[-4.0], [-2.0]]), place=place)

    def bags(pooling: Any, on_missing: str = "zero", weights: Any = None) -> list[float]:
        ids, offsets = [0, 9, 1, 9], [0, 3]
        pooled = table.lookup(ids, offsets=offsets, pooling=pooling, weights=weights, on_missing=on_missing)
        return pooled[:, 0].tolist()

    assert bags("sum") == [-6.0, 0.0]
    assert bags("mean") == [-3.0, 0.0]
    assert bags("max") == [-2.0, 0.0]
    assert bags("mean", weights=[1, 100, 3, 100]) == [-2.5, 0.0]
    assert bags("sum", "default") == [-13.0, -7.0]
    assert bags("mean", "default", [1, 2, 1, 2]) == [-5.0, -7.0]
    assert bags("max", "default") == [-2.0, -7.0]
    hashed = table.lookup([9], on_missing="hash")[0, 0]
    assert bags("sum", "hash") == [-6.0 + hashed, hashed]
    with pytest.raises(IdOutOfRange, match="does not have id 9, 9: not in"):
        bags("sum", "error")
    with pytest.raises(ConfigError, match="on_missing must be one of"):
        bags("sum", "guess")
    with pytest.raises(ConfigError, match="on_missing must be one of"):
        table.lookup([0], offsets=[0], pooling="sum", on_missing="guess")


@every_place
@every_way
def test_as_little_as_there_can_be(pooling: Any, weighted: bool, place: str) -> None:
    """No ids and no bags, no ids in two bags, one id, and one bag are all pooled."""
    table = table_of(full(WEIGHT), place=place)

    def pooled(ids: Any, offsets: Any) -> Floats:
        weights = [2.0] * len(ids) if weighted else None
        return table.lookup(ids, offsets=offsets, pooling=pooling, weights=weights)

    assert pooled([], []).shape == (0, D)
    np.testing.assert_array_equal(pooled([], [0, 0]), np.zeros((2, D)))
    factor = 2 if weighted and pooling == "sum" else 1
    np.testing.assert_array_equal(pooled([4], [0]), WEIGHT[[4]] * factor)
    one = {"sum": WEIGHT.sum(axis=0) * factor, "mean": WEIGHT.mean(axis=0), "max": WEIGHT.max(axis=0)}
    np.testing.assert_array_equal(pooled(range(N), [0]), [one[pooling]])
    np.testing.assert_array_equal(pooled(range(N), [0, N]), [one[pooling], np.zeros(D)])


def test_string_ids_are_pooled() -> None:
    """String ids are pooled, with one that is not there."""
    table = table_of(full(WEIGHT), keys=["a", "b", "", "d", "e", "f"])
    pooled, found = table.lookup(["", "a", "nobody", "f"], offsets=[0, 2], pooling="mean", return_found=True)
    np.testing.assert_array_equal(pooled, [(WEIGHT[2] + WEIGHT[0]) / 2, WEIGHT[5]])
    assert found.tolist() == [True, True, False, True]


@pytest.mark.parametrize("take", [list, tuple, np.array, torch.tensor], ids=lambda take: take.__name__)
@pytest.mark.parametrize(("ids_as", "offsets_as"), [("int64", "int32"), ("int32", "uint64"), ("uint8", "int64")])
def test_offsets_and_weights_come_as_lists_arrays_and_tensors(take: Any, ids_as: str, offsets_as: str) -> None:
    """Integers of any width, numbers of any kind; the caller's own are not changed."""
    ids, offsets = np.array([1, 2, 5], ids_as), np.array([0, 2], offsets_as)
    weights = take(np.array([0.5, 1.0, 2.0], np.float16).tolist())
    if take in (np.array, torch.tensor):
        ids, offsets = take(ids), take(offsets)
    pooled = table_of(full(WEIGHT)).lookup(ids, offsets=offsets, pooling="sum", weights=weights)
    np.testing.assert_array_equal(pooled, [WEIGHT[1] * 0.5 + WEIGHT[2], WEIGHT[5] * 2])
    assert (list(map(int, offsets)), list(map(float, weights))) == ([0, 2], [0.5, 1.0, 2.0])


def test_negative_weights_are_a_sums_business() -> None:
    """Negative weights are for sums, which take any finite weights as torch's do."""
    pooled = table_of(full(WEIGHT)).lookup([3, 2], offsets=[0], pooling="sum", weights=[1, -1])
    np.testing.assert_array_equal(pooled, [[3, 3, 3]])


def test_weights_that_are_all_zero_make_a_mean_of_nothing() -> None:
    """A mean whose weights are all zero is zeros, as an empty bag is: never 0 / 0."""
    pooled = table_of(full(WEIGHT)).lookup([3, 2, 1], offsets=[0, 2], pooling="mean", weights=[0, 0, 1])
    np.testing.assert_array_equal(pooled, [np.zeros(D), WEIGHT[1]])


@every_place
@pytest.mark.parametrize("case", BAD)
def test_bad_bags_are_refused(case: str, place: str) -> None:
    """A bad bag is refused with what is wrong, its value, and what would be right."""
    options, kind, text = BAD[case]
    with pytest.raises(kind) as raised:
        table_of(full(WEIGHT), place=place).lookup([5, 4, 5], **options)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"offsets": [0.0, 1.0]}, "offsets must be 64-bit integers, got float64"),
        ({"offsets": [False, True]}, "offsets must be 64-bit integers, got bool"),
        ({"offsets": [0, 2**70]}, "offsets must be 64-bit integers, got object"),
        ({"offsets": np.array([0, 2**63], np.uint64)}, r"offsets\[1\] is 9223372036854775808, past the end of 3 ids"),
        ({"offsets": [[0], [1]]}, r"offsets must be one-dimensional, got shape \(2, 1\)"),
        ({"offsets": 0}, r"offsets must be one-dimensional, got shape \(\)"),
        ({"offsets": [[0], [1, 2]]}, "offsets must be a flat list of numbers"),
        ({"offsets": [0], "weights": ["1", "1", "1"]}, "weights must be numbers, got <U1"),
        ({"offsets": [0], "weights": [1, None, 1]}, "weights must be numbers, got object"),
        (
            {"offsets": [0], "weights": [1, float("nan"), 1]},
            r"weights\[1\] is nan: a weight is a finite",
        ),
        ({"offsets": [0], "weights": [1, 1, float("inf")]}, r"weights\[2\] is inf: a weight is a finite"),
        ({"offsets": [0], "weights": [[1, 1, 1]]}, "weights must be one-dimensional"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(options: dict[str, Any], text: str) -> None:
    """What is no flat list of numbers is refused, never rounded, guessed or broadcast."""
    with pytest.raises(DataError, match=text):
        table_of(full(WEIGHT)).lookup([5, 4, 5], pooling="sum", **options)


def test_bags_of_other_ids_are_refused() -> None:
    """Bags that were made for another number of ids do not read past the end."""
    with pytest.raises(DataError, match="the bags are of 4 ids, but there are 2"):
        table_of(full(WEIGHT)).fetch_bags([1, 2], Bags.of(4, [0], "sum"))
