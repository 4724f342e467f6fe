"""The contract of every scheme: what was trained is what is stored is what is served.

A scheme takes part by standing in SCHEMES; its variants stand in `scheme_cases.VARIANTS`, one line each.
"""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M num_buckets.

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.derived import DERIVED, renewed
from support.integer_hashing import paper_bucket
from support.scheme_cases import (
    ALL,
    CASES,
    VARIANTS,
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
from torch import Tensor
from torch.func import functional_call

from embstore import open_store, schemes
from embstore.errors import ConfigError, IdOutOfRange
from embstore.hashing import MAX_BUCKETS
from embstore.kernels import SHARED
from embstore.quantize import DTYPES, for_kernels
from embstore.schemes import SCHEMES, scheme_class
from embstore.schemes.base import MAX_IDS, Scheme, SchemeConfig, target_std
from embstore.store.tensor_file import write_arrays

PACKAGE = "embstore.schemes."


def test_every_scheme_has_cases() -> None:
    """The contract tests walk through the kinds that VARIANTS of tests/support/scheme_cases.py has of each scheme."""
    missing, gone = set(SCHEMES) - set(VARIANTS), set(VARIANTS) - set(SCHEMES)
    assert not missing, f"say in VARIANTS of tests/support/scheme_cases.py which kinds there are of {sorted(missing)}"
    assert not gone, f"VARIANTS of tests/support/scheme_cases.py has {sorted(gone)}, which are no schemes"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_found_by_its_name(name: str) -> None:
    """The name in SCHEMES, in manifests, of the file and on the class is one; the class also comes from the package."""
    cls = scheme_class(name)
    assert issubclass(cls, Scheme)
    assert cls.name == name
    assert cls.__module__ == f"embstore.schemes.{name}"
    assert issubclass(cls.Config, SchemeConfig)
    assert getattr(schemes, cls.__name__) is cls


def test_every_file_of_schemes_is_registered() -> None:
    """A scheme's file has its line in SCHEMES: beside the schemes there are only the base class and the options."""
    files = {module.name for module in pkgutil.iter_modules(schemes.__path__)}
    assert files == {*SCHEMES, "base", "options", "parts"}


@pytest.mark.parametrize("path", DERIVED, ids=lambda path: path.name)
def test_texts_that_name_every_scheme_are_up_to_date(path: Path) -> None:
    """The imports for type checkers and the table of the docs are those of the schemes there are."""
    assert renewed(path) == path.read_text(), "run: python tests/support/derived.py"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_schemes_kernels_are_found_by_its_name(name: str) -> None:
    """The loops of a scheme are in files of its name, or in files that embstore.kernels.SHARED lists for it."""
    files = {Path(inspect.getfile(cls)) for cls in scheme_class(name).__mro__ if cls.__module__.startswith(PACKAGE)}
    named = {found for file in files for found in re.findall(r'Loops\("(\w+)\.(\w+)"\)', file.read_text())}
    own = {name} | {kernel for kernel, users in SHARED.items() if name in users}
    assert {kernel for _, kernel in named} <= own, f"name the file after {name}, or list it in embstore.kernels.SHARED"
    assert {"cpu", "cuda"} == {folder for folder, _ in named}
    for folder, kernel in named:
        assert importlib.util.find_spec(f"embstore.kernels.{folder}.{kernel}")


def test_shared_kernels_are_used_by_the_schemes_listed() -> None:
    """Every scheme that SHARED lists for a file of loops exists and names that file."""
    for kernel, users in SHARED.items():
        for name in users:
            source = Path(inspect.getfile(scheme_class(name))).read_text()
            assert f'Loops("cpu.{kernel}")' in source, f"{name} does not use {kernel}"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_constructors_signature_names_its_options(name: str) -> None:
    """`help` and `inspect.signature` show sizes, every field of Config and what all schemes take, each by its name."""
    parameters = inspect.signature(scheme_class(name)).parameters
    sizes = {field.name for field in fields(scheme_class(name).Config)}
    assert sizes | {"sparse", "init_std", "generator"} <= set(parameters)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_an_unknown_scheme_is_answered_with_the_nearest() -> None:
    """The error lists the schemes and guesses the one meant."""
    with pytest.raises(ConfigError, match=r"no scheme named 'memcon': .*full.*; did you mean 'memcom'\?"):
        scheme_class("memcon")
    with pytest.raises(AttributeError, match="Nothing"):
        schemes.__getattr__("Nothing")


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
    """Nothing is rounded into an id, in an empty batch either."""
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
    """m >= n: id x reads row x."""
    module = schemes.Hash(N, D, num_buckets=num_buckets)
    assert same_bits(module(torch.arange(N)), module.weight[:N])


def test_memcom_starts_as_the_hashing_trick() -> None:
    """Weights 1 and offsets 0: a fresh module gives the shared rows themselves."""
    ids = torch.arange(N)
    for bias in (False, True):
        module = schemes.MEmCom(N, D, num_buckets=M, bias=bias)
        assert same_bits(module(ids), module.shared[ids % M])


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


# ---- training ---------------------------------------------------------------------------------------------------

BATCH = torch.tensor([[0, 5, 5], [N - 1, 0, 12]])  # repeated ids and shared buckets: gradients must add up


@every_case
def test_gradients_are_the_numerical_ones(case: Case) -> None:
    """Every stored number's gradient equals the slope of the formula, in float64."""
    if case.variant.straight_through:
        pytest.skip("rounded numbers have no slope: the scheme's own test says what their gradients are")
    module = case.cls.from_tensors(*case.filled(d=3).export()).double().eval()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def vectors(*values: Tensor) -> Tensor:
        found: Tensor = functional_call(module, dict(zip(names, values, strict=True)), (BATCH,))
        return found

    assert torch.autograd.gradcheck(vectors, parameters)


@every_case
def test_all_that_is_stored_is_trained(case: Case) -> None:
    """What is stored as floats are parameters, and a batch of all ids gives each of them a gradient."""
    if case.variant.straight_through:
        pytest.skip("what is trained is not what is stored")
    module = case.cls.from_tensors(*case.filled().export())
    layout = case.cls.layout(module.export()[0])
    stored = {name for name, slot in layout.items() if slot.dtype == "float32"}
    assert stored == {name for name, _ in module.named_parameters()}
    (module(torch.arange(N)) * torch.randn(N, case.dim(D))).sum().backward()
    for parameter in module.parameters():
        assert (parameter.grad != 0).any()
        if case.variant.every_row_is_read and parameter.ndim > 1:
            assert (parameter.grad != 0).any(dim=1).all()


@every_case
def test_sparse_gradients_are_the_dense_ones(case: Case) -> None:
    """`sparse=True` changes how gradients are kept, not what they are."""
    dense, sparse = case.filled(), case.build(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    factor = torch.randn(*BATCH.shape, case.dim(D))
    for module in (dense, sparse):
        (module(BATCH) * factor).sum().backward()
    for name, parameter in dense.named_parameters():
        twin = sparse.get_parameter(name)
        assert not parameter.grad.is_sparse
        found = twin.grad.to_dense() if twin.grad.is_sparse else twin.grad
        torch.testing.assert_close(found, parameter.grad)


@every_case
def test_a_step_of_training_changes_what_is_served(case: Case) -> None:
    """The optimiser moves the very numbers that lookup reads."""
    module = case.cls.from_tensors(*case.filled().export())
    ids = torch.arange(N)
    before = served(module, ids)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(ids).square().sum().backward()
    optimiser.step()
    after = served(module, ids)
    assert (before != after).any(dim=1).all()
    assert same(after, module.eval()(ids), case.variant.rtol)


# ---- stored and read again --------------------------------------------------------------------------------------


@every_case
def test_config_and_tensors_are_the_whole_module(case: Case) -> None:
    """A module from the config and the tensors gives the same vectors; so does a deep copy, and a state round trip."""
    module = case.filled()
    config, tensors = module.export()
    parameters = json.loads(json.dumps(config.parameters()))
    again = case.cls.Config(num_embeddings=N, embedding_dim=case.dim(D), **parameters)
    assert again == config
    assert set(parameters) == {f.name for f in fields(config)} - {"num_embeddings", "embedding_dim"}
    ids = torch.arange(N)
    assert same(case.cls.from_tensors(again, tensors).eval()(ids), module(ids), case.variant.rtol)
    assert same_bits(copy.deepcopy(module)(ids), module(ids))
    twin = case.build()
    twin.load_state_dict(module.state_dict())
    assert same_bits(twin(ids), module(ids))


@every_case
def test_a_module_prints_its_sizes(case: Case) -> None:
    """print(module) shows the config and the bytes."""
    module = case.build()
    text = repr(module)
    assert all(f"{name}={value!r}" in text for name, value in asdict(module.config).items())
    assert f"num_bytes={module.num_bytes():,}" in text


READER = """
import sys
import numpy as np
from embstore import open_store
store = open_store(sys.argv[1])
vectors = {}
for name in store.tables():
    table = store.load(name)
    assert all(not tensor.flags.writeable for tensor in table.tensors.values())
    vectors[name] = table.lookup(np.arange(table.ids.num_ids))
np.savez(sys.argv[2], **vectors)
"""


def test_another_process_reads_the_same_vectors(tmp_path: Path) -> None:
    """Published in every dtype, mapped from disk elsewhere, looked up: what the compiled lookup gave here."""
    store, expected, rtol = open_store(tmp_path / "store"), {}, {}
    for label, case in ALL:
        module = case.filled(d=16)
        for dtype in DTYPES:
            try:
                expected[f"{label}-{dtype}"] = served(module, torch.arange(N), dtype)
            except ConfigError:
                continue
            rtol[f"{label}-{dtype}"] = case.variant.rtol
            store.publish(f"{label}-{dtype}", module, dtype=dtype)
    out = tmp_path / "vectors.npz"
    ran = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "store"), str(out)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = np.load(out)
    assert set(found) == set(expected)
    for name, vectors in expected.items():
        assert same(torch.from_numpy(found[name]), vectors, rtol[name]), name


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
