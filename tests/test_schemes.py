"""The contract of every scheme: what was trained is what is stored is what is served.

A scheme takes part by standing in SCHEMES; its variants stand in VARIANTS, one line each.
"""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, M num_buckets.

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from embstore import open_store, schemes
from embstore.arrays import write_arrays
from embstore.errors import ConfigError, IdOutOfRange
from embstore.hashing import GAMMA, MAX_BUCKETS
from embstore.schemes import SCHEMES, scheme_class
from embstore.schemes.base import MAX_IDS, Scheme, SchemeConfig, target_std

N, D, M = 53, 19, 7  # sizes that divide nothing: the last bucket, cache line and quotient are incomplete


@dataclass(frozen=True)
class Variant:
    """How one kind of a scheme is built: `sized` has a field num_buckets, which `from_budget` chooses."""

    options: dict[str, Any] = field(default_factory=dict)
    sized: bool = True
    least_dim: int = 1


VARIANTS: dict[str, dict[str, Variant]] = {
    "full": {"plain": Variant(sized=False)},
    "hash": {"mod": Variant(), "seed-0": Variant({"seed": 0}), "seed-large": Variant({"seed": 2**63 - 1})},
    "qr": {"mult": Variant(), "add": Variant({"op": "add"}), "concat": Variant({"op": "concat"}, least_dim=2)},
    "memcom": {"scale": Variant(), "bias": Variant({"bias": True})},
}


@dataclass(frozen=True)
class Case:
    """One variant of one scheme."""

    name: str
    variant: Variant

    @property
    def cls(self) -> Any:
        return scheme_class(self.name)

    def sizes(self, num_buckets: int) -> dict[str, int]:
        return {"num_buckets": num_buckets} if self.variant.sized else {}

    def build(self, n: int = N, d: int = D, m: int = M, **options: Any) -> Any:
        """A module fresh from its constructor."""
        return self.cls(n, d, **self.sizes(m), **self.variant.options, **options)

    def filled(self, n: int = N, d: int = D, m: int = M, **options: Any) -> Any:
        """A module as if trained: every parameter moved off its start."""
        module = self.build(n, d, m, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-1, 1)
        return module

    def budgeted(self, n: int, d: int, num_bytes: int, **options: Any) -> Any:
        return self.cls.from_budget(n, d, num_bytes, **self.variant.options, **options)

    def num_bytes(self, n: int, d: int, m: int) -> int:
        """Bytes of a configuration, from its shapes alone."""
        config = self.cls.Config(num_embeddings=n, embedding_dim=d, **self.sizes(m), **self.variant.options)
        return sum(4 * int(np.prod(shape)) for shape in self.cls.shapes(config).values())


CASES = [
    pytest.param(Case(name, variant), id=f"{name}-{label}")
    for name in SCHEMES
    for label, variant in VARIANTS.get(name, {"default": Variant()}).items()
]
every_case = pytest.mark.parametrize("case", CASES)


def arrays_of(module: Any) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.cpu().numpy() for name, tensor in module.state_dict().items()}


def served(module: Any, ids: Tensor) -> NDArray[np.float32]:
    """What the compiled lookup returns, over read-only tensors and ids."""
    tensors, ids_B = arrays_of(module), ids.cpu().numpy().astype(np.int64)
    ids_B.flags.writeable = False
    for array in tensors.values():
        array.flags.writeable = False
    out = np.full((len(ids_B), module.embedding_dim), np.nan, np.float32)
    type(module).lookup(module.config, tensors, ids_B, out)
    return out


def looked_up(module: Any, ids: Tensor) -> Tensor:
    """What the torch lookup returns, on the module's device."""
    tensors = module.state_dict()
    device = next(iter(tensors.values())).device
    out = torch.full((len(ids), module.embedding_dim), float("nan"), device=device)
    type(module).lookup(module.config, tensors, ids.long().to(device), out)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu().view(torch.int32), b.detach().cpu().view(torch.int32))


def test_every_scheme_has_its_variants() -> None:
    """A new scheme says in VARIANTS which kinds of it there are."""
    assert set(VARIANTS) == set(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_found_by_its_name(name: str) -> None:
    """The name in SCHEMES, in manifests and on the class is one; the class also comes from the package."""
    cls = scheme_class(name)
    assert issubclass(cls, Scheme)
    assert cls.name == name
    assert issubclass(cls.Config, SchemeConfig)
    assert getattr(schemes, cls.__name__) is cls


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
    module = case.filled()
    ids = torch.randint(N, shape)
    vectors = module(ids)
    assert (vectors.shape, vectors.dtype) == ((*shape, D), torch.float32)
    flat = [module(torch.tensor(int(i))) for i in ids.reshape(-1)]
    assert same_bits(vectors.reshape(-1, D), torch.stack(flat) if flat else torch.empty(0, D))


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_ids_of_any_integer_type_are_the_same_ids(case: Case, dtype: torch.dtype) -> None:
    """Arithmetic on ids never happens in a narrow type: more buckets than 8 bits count make no difference."""
    n = min(1000, torch.iinfo(dtype).max + 1)
    module = case.filled(n=1000, m=256)
    ids = torch.tensor([0, 1, 100, n - 1])
    assert same_bits(module(ids.to(dtype)), module(ids))


@every_case
@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 17, N])
@pytest.mark.parametrize("d", [2, 15, 16, 17, D, 33, 64])
def test_what_was_trained_is_what_is_served(case: Case, d: int, batch: int) -> None:
    """`forward`, the torch lookup and the compiled lookup agree bit for bit."""
    module = case.filled(d=d)
    ids = torch.arange(N).flip(0)[:batch]
    expected = module(ids)
    assert not expected.isnan().any()
    assert same_bits(torch.from_numpy(served(module, ids)), expected)
    assert same_bits(looked_up(module, ids), expected)


@every_case
def test_every_device_serves_the_same_bits(case: Case, device: str) -> None:
    """Lookup on a device equals `forward` there and the compiled lookup here."""
    module = case.filled()
    ids = torch.randint(N, (100,))
    expected = torch.from_numpy(served(module, ids))
    module.to(device)
    assert same_bits(module(ids.to(device)), expected)
    assert same_bits(looked_up(module, ids), expected)


@every_case
def test_the_shortest_vectors_are_vectors(case: Case) -> None:
    """embedding_dim = 1 works, or 2 where a vector is made of two halves."""
    module = case.filled(d=case.variant.least_dim)
    ids = torch.arange(N)
    assert same_bits(torch.from_numpy(served(module, ids)), module(ids))


@every_case
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (2, 1), (5, 5), (5, 9), (50, 49), (49, 50)])
def test_the_smallest_and_oddest_sizes_work(case: Case, n: int, m: int) -> None:
    """One id, one bucket, more buckets than ids: every id still has its vector, the first and the last."""
    module = case.filled(n=n, m=m)
    ids = torch.arange(n)
    vectors = module(ids)
    assert vectors.shape == (n, D)
    assert same_bits(torch.from_numpy(served(module, ids)), vectors)
    assert same_bits(module(torch.tensor([0, n - 1])), vectors[[0, -1]])


@every_case
@given(ids=st.lists(st.integers(0, N - 1), max_size=40))
def test_a_vector_depends_on_its_id_alone(case: Case, ids: list[int]) -> None:
    """Order, repetition and company in the batch change nothing."""
    torch.manual_seed(0)
    module = case.filled()
    alone = module(torch.arange(N)).detach()
    batch = torch.tensor(ids, dtype=torch.int64)
    assert same_bits(torch.from_numpy(served(module, batch)), alone[batch])
    assert same_bits(looked_up(module, batch), alone[batch])
    assert same_bits(module(batch), alone[batch])


@every_case
def test_lookup_leaves_the_rows_of_negative_ids_alone(case: Case, device: str) -> None:
    """A missing id can never receive another id's vector: its row keeps what it held."""
    module = case.filled().to(device)
    ids = torch.tensor([-1, 3, -(2**63), N - 1, -7, -N])
    found = ids >= 0
    out = torch.full((len(ids), D), 0.125, device=device)
    case.cls.lookup(module.config, module.state_dict(), ids.to(device), out)
    compiled = np.full((len(ids), D), 0.125, np.float32)
    case.cls.lookup(module.config, arrays_of(module), ids.numpy(), compiled)
    for result in (out.cpu(), torch.from_numpy(compiled)):
        assert (result[~found] == 0.125).all()
        assert same_bits(result[found], module(ids[found].to(device)))


@every_case
@pytest.mark.parametrize("bad", [-1, -(2**63), N, N + 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_an_id_out_of_range_is_refused_by_name(case: Case, bad: int, shape: tuple[int, ...]) -> None:
    """IdOutOfRange, with the id, before any row is read; never row 0, never a crash."""
    ids = torch.ones(shape, dtype=torch.int64)
    ids.reshape(-1)[-1] = bad
    with pytest.raises(IdOutOfRange, match=re.escape(f"id {bad} is outside [0, {N})")) as raised:
        case.build()(ids)
    assert raised.value.facts == {"id": bad}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_are_a_type_error(case: Case, dtype: torch.dtype) -> None:
    """Nothing is rounded into an id, in an empty batch either."""
    for ids in (torch.ones(2, dtype=dtype), torch.ones(0, dtype=dtype)):
        with pytest.raises(TypeError, match=str(dtype)):
            case.build()(ids)


# ---- where ids lead ---------------------------------------------------------------------------------------------

HUGE = [0, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**33 - 1]


def paper_bucket(key: int, num_buckets: int, seed: int) -> int:
    """The hash's high half into range, in integers without limits."""
    z = (key + (seed + 1) * GAMMA) % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return ((z ^ (z >> 31)) >> 32) * num_buckets >> 32


def all_paths(module: Any, ids: list[int]) -> list[list[list[float]]]:
    """The vectors of ids by forward, by the torch lookup and by the compiled one."""
    tensor = torch.tensor(ids)
    return [module(tensor).tolist(), looked_up(module, tensor).tolist(), served(module, tensor).tolist()]


@pytest.mark.parametrize("seed", [None, 0, 5, 2**63 - 1])
@pytest.mark.parametrize("num_buckets", [1, 7, 1000])
def test_hash_reads_the_bucket_of_integer_maths(seed: int | None, num_buckets: int) -> None:
    """Ids up to 2^40 and beyond lead to `x mod m`, or to the hash's bucket, exactly."""
    ids = [*HUGE, 2**40, 2**53 + 1, 2**62 - 1]
    module = schemes.Hash(2**62, 1, num_buckets=num_buckets, seed=seed)
    module.weight.data = torch.arange(num_buckets, dtype=torch.float32)[:, None]
    expected = [i % num_buckets if seed is None else paper_bucket(i, num_buckets, seed) for i in ids]
    for vectors in all_paths(module, ids):
        assert vectors == [[float(b)] for b in expected]


@pytest.mark.parametrize("op", ["mult", "add", "concat"])
@pytest.mark.parametrize("m", [2**17, 2**17 - 1])
def test_qr_divides_in_integers(op: str, m: int) -> None:
    """The quotient and remainder of ids past 2^24 and 2^31 are exact; a float division would be off by one."""
    ids = [*HUGE, 1000 * m - 1, 1000 * m, 65_000 * m - 1, 65_000 * m, 65_000 * m + 1]
    module = schemes.QR(2**33, 2, num_buckets=m, op=op)
    for name in ("quotient", "remainder"):
        weight = getattr(module, name)
        weight.data = torch.arange(len(weight), dtype=torch.float32)[:, None].repeat(1, weight.shape[1])
    compose: dict[str, Callable[[int, int], list[float]]] = {
        "mult": lambda q, r: [float(np.float32(q) * np.float32(r))] * 2,
        "add": lambda q, r: [float(q + r)] * 2,
        "concat": lambda q, r: [float(q), float(r)],
    }
    for vectors in all_paths(module, ids):
        assert vectors == [compose[op](*divmod(i, m)) for i in ids]


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
        assert vectors == expected


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (100, 10), (101, 10), (99, 10), (100, 7), (100, 100), (100, 130), (97, 1)]
)
def test_qr_gives_no_two_ids_the_same_pair(n: int, m: int) -> None:
    """The pairs (quotient, remainder) of all ids are all different, so with concat no two ids share a vector."""
    module = schemes.QR(n, 2, num_buckets=m, op="concat")
    for name in ("quotient", "remainder"):
        weight = getattr(module, name)
        weight.data = torch.arange(len(weight), dtype=torch.float32)[:, None]
    pairs = [tuple(pair) for pair in module(torch.arange(n)).tolist()]
    assert len(set(pairs)) == n
    assert {q for q, _ in pairs} == set(range(module.config.num_quotients))


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


@pytest.mark.parametrize("num_buckets", [N, N + 1, 3 * N])
@pytest.mark.parametrize("op", ["mult", "add"])
def test_qr_with_a_remainder_per_id_is_the_full_table_and_one_row(num_buckets: int, op: str) -> None:
    """m >= n: there is one quotient row; where it is the operation's neutral element, the remainders are the table."""
    module = schemes.QR(N, D, num_buckets=num_buckets, op=op)
    assert module.quotient.shape == (1, D)
    module.quotient.data.fill_(1.0 if op == "mult" else 0.0)
    assert same_bits(module(torch.arange(N)), module.remainder[:N])


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
    n, m = 2**14, 2**7
    module = case.build(n=n, d=d, m=m) if init_std is None else case.build(n=n, d=d, m=m, init_std=init_std)
    expected = d**-0.5 if init_std is None else init_std
    vectors = module(torch.arange(n)).detach().double()
    independent = min(p.numel() for p in module.parameters() if p.shape[1] > 2)  # a number per id starts as 1 or 0
    assert abs(float(vectors.std()) / expected - 1) < 5 * (2 * independent) ** -0.5
    assert abs(float(vectors.mean())) < 5 * expected * independent**-0.5


@pytest.mark.parametrize("op", ["mult", "add", "concat"])
def test_qr_starts_at_the_scale_to_a_thousandth(op: str) -> None:
    """Two million independent products or sums: the spread of the remainder factor is accounted for."""
    m, d = 4096, 512
    module = schemes.QR(m * m, d, num_buckets=m, op=op, init_std=1.0)
    vectors = module(torch.arange(m) * (m + 1)).detach()  # every row of both tables once
    assert abs(float(vectors.double().std()) - 1) < 0.0025


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
    """num_bytes() is the file's size less its header, and `shapes` says what is in it without building it."""
    module = case.build(n=n, d=d, m=m)
    file = io.BytesIO()
    write_arrays(file, arrays_of(module))
    data = file.getvalue()
    assert module.num_bytes() == len(data) - 8 - int.from_bytes(data[:8], "little") == case.num_bytes(n, d, m)
    state = module.state_dict()
    assert case.cls.shapes(module.config) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


STATED: dict[str, Callable[[int, int, int], int]] = {
    "full-plain": lambda n, d, _: 4 * n * d,
    "hash-mod": lambda _, d, m: 4 * m * d,
    "qr-mult": lambda n, d, m: 4 * d * (m + -(-n // m)),
    "qr-concat": lambda n, d, m: 4 * ((d - d // 2) * m + d // 2 * -(-n // m)),
    "memcom-scale": lambda n, d, m: 4 * m * d + 4 * n,
    "memcom-bias": lambda n, d, m: 4 * m * d + 8 * n,
}


@pytest.mark.parametrize("case", [case for case in CASES if case.id in STATED])
def test_bytes_are_the_formula_of_the_docstring(case: Case, request: pytest.FixtureRequest) -> None:
    """The bytes that each scheme's file promises."""
    formula = STATED[request.node.callspec.id]
    for n, d, m in [(N, D, M), (100, 16, 10), (7, 2, 7)]:
        assert case.num_bytes(n, d, m) == formula(n, d, m)


@every_case
@pytest.mark.parametrize(("n", "d"), [(1, 2), (8, 2), (N, 3), (N, D), (120, 5), (121, 4)])
def test_a_budget_is_kept_and_used(case: Case, n: int, d: int) -> None:
    """Of all configurations up to one bucket per id, the largest m that fits; ConfigError where none does."""
    sizes = {m: case.num_bytes(n, d, m) for m in range(1, n + 1)}
    least, most = min(sizes.values()), max(sizes.values())
    budgets = {1, least - 1, least, least + 1, most - 1, most, most + 1, 10 * most, *range(least, most, most // 40 + 1)}
    for num_bytes in sorted(budgets):
        if num_bytes < least:
            with pytest.raises(ConfigError) as raised:
                case.budgeted(n, d, num_bytes)
            assert re.search(rf"(?<![\d,]){least:,}(?![\d,])", str(raised.value))
            continue
        module = case.budgeted(n, d, num_bytes)
        assert module.num_bytes() <= num_bytes
        assert (module.num_embeddings, module.embedding_dim) == (n, d)
        if case.variant.sized:
            assert module.config.num_buckets == max(m for m, size in sizes.items() if size <= num_bytes)
        for name, value in case.variant.options.items():
            assert getattr(module.config, name) == value


@pytest.mark.parametrize("n", [9_973, 99_999, 1_000_000])
@pytest.mark.parametrize("d", [3, 5, 16])
@pytest.mark.parametrize("op", ["mult", "concat"])
def test_qr_finds_the_least_and_the_largest_at_full_size(n: int, d: int, op: str) -> None:
    """Halves of odd vectors differ in width, so the least is not at the square root: all m are compared."""
    width_q, width_r = (d // 2, d - d // 2) if op == "concat" else (d, d)
    m = np.arange(1, n + 1)
    sizes = 4 * (width_r * m + width_q * -(-n // m))
    least = int(sizes.min())
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=rf"the least is {least:,} "):
            schemes.QR.from_budget(n, d, least - 1, op=op)
        for num_bytes in (least, least + 4, least + 100, 2 * least, int(sizes.max()) - 4):
            module = schemes.QR.from_budget(n, d, num_bytes, op=op)
            assert module.config.num_buckets == int(m[sizes <= num_bytes].max())


@every_case
def test_a_budget_passes_its_options_on(case: Case) -> None:
    """sparse, init_std and generator reach the module; a size beside a budget is refused."""
    module = case.budgeted(N, D, 10**6, sparse=True, init_std=1e-9)
    assert module.sparse
    assert float(module(torch.arange(N)).detach().abs().max()) < 1e-6
    if case.variant.sized:
        with pytest.raises(ConfigError, match="either a budget or num_buckets"):
            case.budgeted(N, D, 10**6, num_buckets=3)


@every_case
@pytest.mark.parametrize(("n", "d"), [(0, 4), (-5, 4), (10, 0), (10, -1), (2**63, 4)])
def test_sizes_that_are_none_are_refused_with_any_budget(case: Case, n: int, d: int) -> None:
    """num_embeddings and embedding_dim are checked before anything is divided by them."""
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
    module = case.filled(d=3).double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def vectors(*values: Tensor) -> Tensor:
        found: Tensor = functional_call(module, dict(zip(names, values, strict=True)), (BATCH,))
        return found

    assert torch.autograd.gradcheck(vectors, parameters)


@every_case
def test_all_that_is_stored_is_trained(case: Case) -> None:
    """The state is the parameters, and a batch of all ids gives each of them a gradient."""
    module = case.filled()
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    (module(torch.arange(N)) * torch.randn(N, D)).sum().backward()
    for parameter in module.parameters():
        assert (parameter.grad != 0).any(dim=1).all()


@every_case
def test_sparse_gradients_are_the_dense_ones(case: Case) -> None:
    """`sparse=True` changes how gradients are kept, not what they are."""
    dense, sparse = case.filled(), case.build(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    factor = torch.randn(*BATCH.shape, D)
    for module in (dense, sparse):
        (module(BATCH) * factor).sum().backward()
    for name, parameter in dense.named_parameters():
        twin = sparse.get_parameter(name)
        assert not parameter.grad.is_sparse
        assert twin.grad.is_sparse
        torch.testing.assert_close(twin.grad.to_dense(), parameter.grad)


@every_case
def test_a_step_of_training_changes_what_is_served(case: Case) -> None:
    """The optimiser moves the very tensors that lookup reads."""
    module = case.filled()
    ids = torch.arange(N)
    before = served(module, ids)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(ids).square().sum().backward()
    optimiser.step()
    after = served(module, ids)
    assert (before != after).any(axis=1).all()
    assert same_bits(torch.from_numpy(after), module(ids))


# ---- stored and read again --------------------------------------------------------------------------------------


@every_case
def test_config_and_state_are_the_whole_module(case: Case) -> None:
    """A module from the config, filled with the state, gives the same vectors; so does a deep copy."""
    module = case.filled()
    parameters = json.loads(json.dumps(module.config.parameters()))
    config = case.cls.Config(num_embeddings=N, embedding_dim=D, **parameters)
    assert config == module.config
    assert set(parameters) == {f.name for f in fields(config)} - {"num_embeddings", "embedding_dim"}
    twin = case.cls.from_config(config)
    twin.load_state_dict(module.state_dict())
    ids = torch.arange(N)
    assert same_bits(twin(ids), module(ids))
    assert same_bits(copy.deepcopy(module)(ids), module(ids))


@every_case
def test_a_module_prints_its_sizes(case: Case) -> None:
    """print(module) shows the config and the bytes."""
    module = case.build()
    text = repr(module)
    assert all(f"{name}={value!r}" in text for name, value in asdict(module.config).items())
    assert f"num_bytes={module.num_bytes():,}" in text


READER = """
import hashlib, json, sys
import numpy as np
from embstore import open_store
store = open_store(sys.argv[1])
digests = {}
for name in store.tables():
    table = store.load(name)
    assert all(not tensor.flags.writeable for tensor in table.tensors.values())
    digests[name] = hashlib.sha256(table.lookup(np.arange(table.ids.num_ids)).tobytes()).hexdigest()
print(json.dumps(digests))
"""


def test_another_process_reads_the_same_vectors(tmp_path: Path) -> None:
    """Published, mapped from disk elsewhere, looked up: every scheme's vectors are those that `forward` gave here."""
    store, expected = open_store(tmp_path), {}
    for parameter in CASES:
        case: Any = parameter.values[0]
        module = case.filled()
        store.publish(str(parameter.id), module)
        expected[parameter.id] = hashlib.sha256(module(torch.arange(N)).detach().numpy().tobytes()).hexdigest()
    ran = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected


# ---- configs ----------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("bad", [0, -1, 1.0, 1.5, "8", None, True])
def test_a_size_that_is_none_is_refused_by_name(case: Case, bad: Any) -> None:
    """Sizes are whole numbers from 1; the message says which size is wrong and what it is."""
    config = case.build().config
    for name in ("num_embeddings", "embedding_dim", *case.sizes(M)):
        with pytest.raises(ConfigError, match=rf"^{name} must be .*got {re.escape(repr(bad))}$"):
            replace(config, **{name: bad})


@every_case
def test_more_ids_than_int64_has_are_refused(case: Case) -> None:
    """num_embeddings is at most 2^63 - 1."""
    config = case.build().config
    assert replace(config, num_embeddings=MAX_IDS).num_embeddings == MAX_IDS
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
        ("qr", {"num_buckets": 3, "op": "max"}, "op must be one of mult, add, concat, got 'max'"),
        ("qr", {"num_buckets": 3, "op": None}, "op must be one of"),
        ("qr", {"num_buckets": 3, "op": "concat", "embedding_dim": 1}, "embedding_dim of at least 2"),
        ("memcom", {"num_buckets": 3, "bias": 1}, "bias must be true or false, got 1"),
        ("memcom", {"num_buckets": 3, "bias": None}, "bias must be true or false"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(name: str, wrong: dict[str, Any], named: str) -> None:
    """ConfigError names the parameter and what it may be."""
    with pytest.raises(ConfigError, match=named):
        scheme_class(name).Config(**({"num_embeddings": 10, "embedding_dim": 4} | wrong))


def test_as_many_ids_as_int64_has() -> None:
    """The largest num_embeddings is 2^63 - 1: the last id is served, not wrapped."""
    module = schemes.Hash(MAX_IDS, 2, num_buckets=5, seed=1)
    last = torch.tensor([MAX_IDS - 1])
    assert same_bits(torch.from_numpy(served(module, last)), module(last))
    with pytest.raises(IdOutOfRange):
        module(torch.tensor([MAX_IDS]))
