"""The contract of every scheme: what was trained is what is served."""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M num_buckets.

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.integer_hashing import paper_bucket
from support.scheme_cases import (
    Case,
    D,
    M,
    N,
    all_paths,
    every_case,
    every_dtype,
    looked_up,
    same,
    same_bits,
    served,
    stored_arrays,
    stored_tensors,
)

from embstore import schemes
from embstore.errors import ConfigError, IdOutOfRange
from embstore.quantize import for_kernels

# ---- ids in, vectors out ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (2, 3), (2, 0), (2, 1, 4)], ids=str)
def test_ids_of_any_shape_give_vectors_of_that_shape(case: Case, shape: tuple[int, ...]) -> None:
    """`(*ids.shape, embedding_dim)` float32, each vector that of its id."""
    module, d = case.filled(), case.dim(D)
    ids = torch.randint(N, shape)
    vectors = module(ids)
    assert (vectors.shape, vectors.dtype) == ((*shape, d), torch.float32)
    flat = [module(torch.tensor(int(i))) for i in ids.reshape(-1)]
    assert same(vectors.reshape(-1, d), torch.stack(flat) if flat else torch.empty(0, d), case.variant.rtol)


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]
)
def test_ids_of_any_integer_type_are_the_same_ids(case: Case, dtype: torch.dtype) -> None:
    """Arithmetic on ids never happens in a narrow type: more buckets than 8 bits count make no difference."""
    n = min(1000, torch.iinfo(dtype).max + 1)
    module = case.filled(n=1000, m=256)
    ids = torch.tensor([0, 1, 100, n - 1])
    assert same_bits(module(ids.to(dtype)), module(ids))


@every_case
@pytest.mark.parametrize("batch", [0, 1, 9, N])
@pytest.mark.parametrize("d", [2, 15, 16, 17, 33, 64])
def test_what_was_trained_is_what_is_served(case: Case, d: int, batch: int) -> None:
    """`forward`, the torch lookup and the compiled lookup agree: bit for bit where the arithmetic is the same."""
    module = case.filled(d=d)
    ids = torch.arange(N).flip(0)[:batch]
    expected = module(ids)
    assert not expected.isnan().any()
    assert same(served(module, ids), expected, case.variant.rtol)
    assert same(looked_up(module, ids), expected, case.variant.rtol)


@every_case
@every_dtype
def test_rows_of_any_dtype_are_served(case: Case, dtype: str) -> None:
    """Packed rows: the compiled lookup equals torch's, both are near the float32 vectors, bytes are the stated ones."""
    module = case.filled(d=16)
    layout = case.cls.layout(module.export()[0])
    if dtype != "float32" and not any(slot.rows for slot in layout.values()):
        with pytest.raises(ConfigError, match=f"no tensor here gets smaller as {dtype}"):
            stored_arrays(module, dtype)
        return
    ids = torch.randint(N, (40,))
    ids[[3, 17]] = torch.tensor([0, N - 1])
    found = served(module, ids, dtype)
    assert same(found, looked_up(module, ids, dtype), case.variant.rtol)
    exact = module(ids).detach()
    error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error <= {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2, "int8": 5e-2, "int4": 0.7}[dtype]
    assert module.num_bytes(dtype) == sum(array.nbytes for array in stored_arrays(module, dtype).values())


@every_case
@every_dtype
def test_every_device_serves_the_same_vectors(case: Case, dtype: str, device: str) -> None:
    """Lookup on a device equals the compiled lookup here: a GPU may fuse multiplications and additions."""
    module = case.filled(d=16)
    ids = torch.randint(N, (100,))
    if device == "cpu":
        assert same(module(ids), served(module, ids), case.variant.rtol)
        return
    try:
        expected = served(module, ids, dtype)
    except ConfigError:
        pytest.skip(f"nothing here is stored as {dtype}")
    assert same(looked_up(module, ids, dtype, device), expected, max(case.variant.rtol, 1e-5))
    if dtype == "float32":
        assert same(module.to(device)(ids.to(device)), expected, max(case.variant.rtol, 1e-5))


@every_case
def test_the_shortest_vectors_are_vectors(case: Case) -> None:
    """embedding_dim = 1 works, or the least that the variant can have."""
    module = case.filled(d=1)
    ids = torch.arange(N)
    assert same(served(module, ids), module(ids), case.variant.rtol)


@every_case
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (2, 1), (5, 5), (5, 9), (50, 49), (49, 50)])
def test_the_smallest_and_oddest_sizes_work(case: Case, n: int, m: int) -> None:
    """One id, one bucket, more buckets than ids: every id still has its vector, the first and the last."""
    module = case.filled(n=n, m=m)
    ids = torch.arange(n)
    vectors = module(ids)
    assert vectors.shape == (n, case.dim(D))
    assert same(served(module, ids), vectors, case.variant.rtol)
    assert same(module(torch.tensor([0, n - 1])), vectors[[0, -1]], case.variant.rtol)


@every_case
@settings(max_examples=25)
@given(ids=st.lists(st.integers(0, N - 1), max_size=40))
def test_a_vector_depends_on_its_id_alone(case: Case, ids: list[int]) -> None:
    """Order, repetition and company in the batch change nothing."""
    torch.manual_seed(0)
    module = case.filled()
    alone = module(torch.arange(N)).detach()
    batch = torch.tensor(ids, dtype=torch.int64)
    assert same(served(module, batch), alone[batch], case.variant.rtol)
    assert same(looked_up(module, batch), alone[batch], case.variant.rtol)
    assert same(module(batch), alone[batch], case.variant.rtol)


@every_case
@every_dtype
def test_lookup_leaves_the_rows_of_negative_ids_alone(case: Case, dtype: str) -> None:
    """A missing id can never receive another id's vector: its row keeps what it held."""
    module, d = case.filled(d=16), case.dim(16)
    ids = torch.tensor([-1, 3, -(2**63), N - 1, -7, -N])
    found = ids >= 0
    config = module.export()[0]
    try:
        arrays = {name: for_kernels(array) for name, array in stored_arrays(module, dtype).items()}
    except ConfigError:
        return  # nothing here is stored as this dtype, which another test asserts
    out = torch.full((len(ids), d), 0.125)
    case.cls.lookup(config, stored_tensors(module, dtype), ids, out)
    compiled = np.full((len(ids), d), 0.125, np.float32)
    case.cls.lookup(config, arrays, ids.numpy(), compiled)
    for result in (out, torch.from_numpy(compiled)):
        assert (result[~found] == 0.125).all()
        assert same(result[found], served(module, ids[found], dtype), case.variant.rtol)


@every_case
@pytest.mark.parametrize("bad", [-1, -(2**63), N, N + 1, 2**31, 2**63 - 1])
def test_an_id_out_of_range_is_refused_by_name(case: Case, bad: int) -> None:
    """IdOutOfRange, with the id, before any row is read; never row 0, never a crash."""
    module = case.build()
    for shape in ((), (3,), (2, 2)):
        ids = torch.ones(shape, dtype=torch.int64)
        ids.reshape(-1)[-1] = bad
        with pytest.raises(IdOutOfRange, match=re.escape(f"id {bad} is outside [0, {N})")) as raised:
            module(ids)
        assert raised.value.facts == {"id": bad}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_are_a_type_error(case: Case, dtype: torch.dtype) -> None:
    """Floats and booleans are never rounded into ids, in an empty batch either."""
    for ids in (torch.ones(2, dtype=dtype), torch.ones(0, dtype=dtype)):
        with pytest.raises(TypeError, match=str(dtype)):
            case.build()(ids)


# ---- where ids lead ---------------------------------------------------------------------------------------------


HUGE = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**33 - 1]


@pytest.mark.parametrize("seed", [None, 0, 5, 2**63 - 1])
@pytest.mark.parametrize("num_buckets", [1, 7, 1000])
def test_hash_reads_the_bucket_of_integer_maths(seed: int | None, num_buckets: int) -> None:
    """Ids up to 2^40 and beyond lead to `x mod m`, or to the hash's bucket, exactly."""
    ids = [*HUGE, 2**40, 2**53 + 1, 2**62 - 1]
    module = schemes.Hash(2**62, 1, num_buckets=num_buckets, seed=seed)
    module.weight.data = torch.arange(num_buckets, dtype=torch.float32)[:, None]
    expected = [i % num_buckets if seed is None else paper_bucket(i, num_buckets, seed) for i in ids]
    for vectors in all_paths(module, ids):
        assert vectors.tolist() == [[float(b)] for b in expected]


@pytest.mark.parametrize("bias", [False, True])
def test_memcom_reads_its_own_number_past_2_to_24(bias: bool) -> None:
    """Each id's weight is its own, also where a float could not tell it from its neighbour's."""
    n, m = 2**24 + 4, 5
    ids = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, n - 1]
    with torch.device("meta"):
        module = schemes.MEmCom(n, 1, num_buckets=m, bias=bias)
    own = torch.zeros(n, 2 if bias else 1)
    own[ids] = torch.arange(1.0, 1.0 + len(ids) * own.shape[1]).reshape(len(ids), -1)
    shared = torch.arange(10.0, 10.0 + m)[:, None]
    module.load_state_dict({"shared": shared, "scale_bias" if bias else "scale": own}, assign=True)
    expected = [[float(shared[i % m, 0] * own[i, 0] + (own[i, 1] if bias else 0))] for i in ids]
    for vectors in all_paths(module, ids):
        assert vectors.tolist() == expected


# ---- special cases that are the full table ----------------------------------------------------------------------


def test_memcom_with_a_row_per_id_is_the_full_table() -> None:
    """m = n and every weight 1, every offset 0: the shared table is the table."""
    ids = torch.arange(N)
    for bias in (False, True):
        module = schemes.MEmCom(N, D, num_buckets=N, bias=bias)
        full = schemes.Full(N, D)
        full.load_state_dict({"weight": module.shared.detach()})
        assert same_bits(module(ids), full(ids))


@pytest.mark.parametrize("num_buckets", [N, N + 1, 3 * N])
def test_hash_with_a_bucket_per_id_is_the_full_table(num_buckets: int) -> None:
    """With m >= n id x reads row x."""
    module = schemes.Hash(N, D, num_buckets=num_buckets)
    assert same_bits(module(torch.arange(N)), module.weight[:N])


def test_memcom_starts_as_the_hashing_trick() -> None:
    """Weights 1 and offsets 0: a fresh module gives the shared rows themselves."""
    ids = torch.arange(N)
    for bias in (False, True):
        module = schemes.MEmCom(N, D, num_buckets=M, bias=bias)
        assert same_bits(module(ids), module.shared[ids % M])
