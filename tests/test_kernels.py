"""Every operation does what one line of arithmetic says, in every backend, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore import kernels
from embstore.hashing import bucket
from embstore.kernels import numba_cpu, numba_ids, reference

Floats = NDArray[np.float32]
SENTINEL = np.float32(-12345.5)
SEED = 2**62 + 5
BACKENDS = [reference, numba_cpu]

# op -> the vector of one id, from plain indexing; tables are float32 [rows, width].
DEFINITION: dict[str, Callable[[list[Floats], int], Floats]] = {
    "gather": lambda t, i: t[0][i],
    "gather_mod": lambda t, i: t[0][i % len(t[0])],
    "gather_hash": lambda t, i: t[0][int(bucket(np.array([i]), len(t[0]), SEED)[0])],
    "gather_pair_mul": lambda t, i: t[0][i // len(t[1])] * t[1][i % len(t[1])],
    "gather_pair_add": lambda t, i: t[0][i // len(t[1])] + t[1][i % len(t[1])],
    "gather_pair_concat": lambda t, i: np.concatenate([t[0][i // len(t[1])], t[1][i % len(t[1])]]),
    "gather_scaled": lambda t, i: t[0][i % len(t[0])] * t[1][i, 0],
    "gather_scaled_biased": lambda t, i: t[0][i % len(t[0])] * t[1][i, 0] + t[1][i, 1],
}
NUM_IDS = 60


def tables(op: str, width: int) -> list[Floats]:
    """Tables of `op` for 60 ids; sizes that do not divide each other."""
    shapes = {
        "gather": [(NUM_IDS, width)],
        "gather_mod": [(7, width)],
        "gather_hash": [(7, width)],
        "gather_pair_concat": [(9, width // 2), (7, width - width // 2)],
        "gather_scaled": [(7, width), (NUM_IDS, 1)],
        "gather_scaled_biased": [(7, width), (NUM_IDS, 2)],
    }.get(op, [(9, width), (7, width)])
    generator = np.random.default_rng(width)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def run(backend: ModuleType, op: str, tables_: list[Floats], ids: NDArray[np.int64], width: int) -> Floats:
    """The operation's output, over rows that hold the sentinel before."""
    out = np.full((len(ids), width), SENTINEL)
    seed = [SEED] if op == "gather_hash" else []
    if backend is reference:
        arrays = [torch.from_numpy(t.copy()) for t in tables_] + [torch.from_numpy(ids.copy())]
        result = torch.from_numpy(out)
        getattr(kernels, op)(*arrays, *seed, result)
    else:
        getattr(kernels, op)(*tables_, ids, *seed, out)
    return out


def same_bits(a: Floats, b: Floats) -> bool:
    """Equal shape and equal bits: NaN equals itself, -0.0 is not 0.0."""
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_backend_offers_every_operation(backend: ModuleType) -> None:
    """The dispatching function and each backend take the same arguments."""
    for op in kernels.OPS:
        number = len(inspect.signature(getattr(kernels, op)).parameters)
        function = getattr(backend, op)
        assert len(inspect.signature(getattr(function, "py_func", function)).parameters) == number


def test_every_operation_has_a_definition_here() -> None:
    """A new operation needs its one line of arithmetic above."""
    assert set(DEFINITION) == set(kernels.OPS)


def test_the_kind_of_out_chooses_the_backend() -> None:
    """numpy arrays run compiled loops, tensors plain torch."""
    assert kernels.backend(np.empty((1, 1), np.float32)) is numba_cpu
    assert kernels.backend(torch.empty(1, 1)) is reference


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 15, 16, 17, 64])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("op", DEFINITION)
def test_both_backends_are_the_definition(op: str, width: int, batch: int) -> None:
    """Around the pipeline's depth and the cache line's width, every row is the definition's, bit for bit."""
    if op == "gather_pair_concat" and width < 2:
        width = 3
    parts = tables(op, width)
    ids = np.random.default_rng(batch).integers(0, NUM_IDS, batch)
    if batch > 1:
        ids[[0, -1]] = 0, NUM_IDS - 1
    expected = np.array([DEFINITION[op](parts, int(i)) for i in ids], np.float32).reshape(batch, width)
    for backend in BACKENDS:
        assert same_bits(run(backend, op, parts, ids, width), expected)


@pytest.mark.parametrize("op", DEFINITION)
@given(ids=st.lists(st.integers(-3, NUM_IDS - 1) | st.just(-(1 << 63)), max_size=40))
def test_a_negative_id_leaves_its_row_untouched(op: str, ids: list[int]) -> None:
    """Wherever negative ids stand in the batch, their rows keep what they held and the others are right."""
    parts, width = tables(op, 5), 5
    untouched = np.full(width, SENTINEL)
    rows = [DEFINITION[op](parts, i) if i >= 0 else untouched for i in ids]
    expected = np.array(rows, np.float32).reshape(len(ids), width)
    for backend in BACKENDS:
        assert same_bits(run(backend, op, parts, np.array(ids, np.int64), width), expected)


@pytest.mark.parametrize("op", DEFINITION)
def test_read_only_and_unaligned_ids_are_taken(op: str) -> None:
    """Tables mapped from files and ids in a request body are read-only; the body may start anywhere."""
    parts = tables(op, 6)
    ids = np.arange(NUM_IDS)
    expected = run(reference, op, parts, ids, 6)
    body = b"\x00" + ids.tobytes()
    unaligned = np.frombuffer(body, np.int64, NUM_IDS, 1)
    for part in parts:
        part.flags.writeable = False
    assert same_bits(run(numba_cpu, op, parts, unaligned, 6), expected)


@pytest.mark.parametrize("op", DEFINITION)
def test_special_values_pass_through_alike(op: str) -> None:
    """Zeros of either sign, the smallest and largest numbers, infinities: both backends agree on every bit."""
    values = np.array([0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, 1.0, -1.5], np.float32)
    generator = np.random.default_rng(0)
    parts = [generator.choice(values, part.shape) for part in tables(op, 8)]
    ids = np.arange(NUM_IDS)
    numba_out, torch_out = run(numba_cpu, op, parts, ids, 8), run(reference, op, parts, ids, 8)
    numba_out[np.isnan(numba_out)] = torch_out[np.isnan(torch_out)] = np.nan  # inf * 0: which NaN is the machine's
    assert same_bits(numba_out, torch_out)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_products_are_rounded_before_the_sum(backend: ModuleType) -> None:
    """No fused multiply-add: (1 + 2^-12)^2 rounds to 1 + 2^-11, so the sum is exactly 0 and not 2^-24."""
    x = np.float32(1 + 2**-12)
    shared, scale_bias = np.full((1, 32), x), np.array([[x, -(1 + 2**-11)]], np.float32)
    out = run(backend, "gather_scaled_biased", [shared, scale_bias], np.zeros(9, np.int64), 32)
    assert (out == 0.0).all()


BIG = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**40 - 1, 2**53 + 1, 2**62, 2**63 - 1]


@pytest.mark.parametrize("op", ["gather_mod", "gather_hash"])
@pytest.mark.parametrize("num_rows", [1, 7, 4096, 65_537])
def test_folded_ids_are_exact_over_all_of_int64(op: str, num_rows: int) -> None:
    """An id past 2^24, 2^31 or 2^53 reads the row that integer maths says: row i holds the number i."""
    weight = np.arange(num_rows, dtype=np.float32)[:, None]
    fold: dict[str, Any] = {
        "gather_mod": [i % num_rows for i in BIG],
        "gather_hash": bucket(np.array(BIG), num_rows, SEED).tolist(),
    }
    for backend in BACKENDS:
        assert run(backend, op, [weight], np.array(BIG), 1)[:, 0].tolist() == fold[op]


@pytest.mark.parametrize("op", ["gather_pair_mul", "gather_pair_add", "gather_pair_concat"])
def test_quotients_and_remainders_are_exact_past_2_to_24_and_2_to_31(op: str) -> None:
    """Division is in integers: the quotient of a large id is never the neighbour's."""
    m = 2**17 - 1
    ids = [i for i in BIG if i < 2**33] + [2**33, 123 * m - 1, 123 * m, 65_000 * m - 1, 65_000 * m, 65_000 * m + 1]
    quotient = np.arange(2**33 // m + 1, dtype=np.float32)[:, None]
    remainder = np.arange(m, dtype=np.float32)[:, None]
    compose: dict[str, Callable[[int, int], list[Any]]] = {
        "gather_pair_mul": lambda q, r: [np.float32(q) * np.float32(r)],
        "gather_pair_add": lambda q, r: [q + r],
        "gather_pair_concat": lambda q, r: [q, r],
    }
    expected = np.array([compose[op](*divmod(i, m)) for i in ids], np.float32)
    for backend in BACKENDS:
        assert same_bits(run(backend, op, [quotient, remainder], np.array(ids), expected.shape[1]), expected)


@pytest.mark.parametrize("op", ["gather", "gather_scaled", "gather_scaled_biased"])
def test_rows_past_2_to_31_are_reached(op: str, tmp_path: Path) -> None:
    """A table of more rows than 32 bits count: each backend reads the row asked for, at the far end too."""
    num_rows, columns = 2**31 + 5, 2 if op == "gather_scaled_biased" else 1
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * num_rows * columns)  # a file of holes: it takes no room
    big: Floats = np.memmap(path, np.float32, "r+", shape=(num_rows, columns))
    ids = np.array([0, 2**24 + 1, 2**31 - 1, 2**31, num_rows - 1])
    for number, row in enumerate(ids):
        big[row] = np.arange(1, columns + 1) + 10 * number
    values = (np.arange(1, columns + 1) + 10 * np.arange(len(ids))[:, None]).astype(np.float32)
    if op == "gather":
        parts, expected = [big], values
    else:
        shared = np.arange(1, 4, dtype=np.float32)[:, None]
        parts = [shared, big]
        expected = shared[ids % 3] * values[:, :1] + (values[:, 1:] if columns == 2 else 0)
    out = np.empty((len(ids), 1), np.float32)
    getattr(kernels, op)(*parts, ids, out)
    assert same_bits(out, expected)
    result = torch.empty(len(ids), 1)
    getattr(kernels, op)(*map(torch.from_numpy, parts), torch.from_numpy(ids), result)
    assert same_bits(result.numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("op", DEFINITION)
def test_the_gpu_computes_the_same_bits(op: str) -> None:
    """Tensors on a GPU give the bits that the CPU gives, negative ids included."""
    parts = tables(op, 17)
    ids = np.concatenate([[-1], np.arange(NUM_IDS), [-5]])
    seed = [SEED] if op == "gather_hash" else []
    out = torch.full((len(ids), 17), float(SENTINEL), device="cuda")
    getattr(kernels, op)(*[torch.from_numpy(t).cuda() for t in parts], torch.from_numpy(ids).cuda(), *seed, out)
    assert same_bits(out.cpu().numpy(), run(numba_cpu, op, parts, ids, 17))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_all_finite_is_numpys_word_on_any_bits(bits: list[int]) -> None:
    """Every float32 there is, by its bits: finite or not as numpy has it."""
    array = np.array(bits, np.uint32)
    assert bool(numba_cpu.all_finite(array)) == bool(np.isfinite(array.view(np.float32)).all())


@given(
    ids=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 12), max_size=30),
    num_ids=st.integers(1, 10) | st.integers(1, (1 << 63) - 1),
)
def test_count_outside_counts_what_is_not_in_range(ids: list[int], num_ids: int) -> None:
    """The range check that precedes every lookup, over all of int64."""
    assert numba_ids.count_outside(np.array(ids, np.int64), num_ids) == sum(not 0 <= i < num_ids for i in ids)
