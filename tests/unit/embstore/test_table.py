"""A loaded table answers any batch of keys, says what it did not find, and refuses what cannot be trusted."""

# Shapes: B keys in a batch, D embedding_dim.

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore import schemes
from embstore.errors import ConfigError, IdOutOfRange, VerificationFailed
from embstore.hashing import bucket
from embstore.ids import Dense, IdSpace, Vocabulary
from embstore.schemes.base import Scheme
from embstore.store.manifest import Golden, Manifest
from embstore.table import DEFAULT_VECTOR, ON_MISSING, Table, check_finite, check_golden, digest, make_table

N, D = 6, 3
WEIGHT = np.arange(N * D, dtype=np.float32).reshape(N, D) + 1
DEFAULT = np.array([-1.0, -2.0, -3.0], np.float32)
INT_KEYS = [50, -40, 30, 2**40, 0, 7]
STR_KEYS = ["a", "", "bb", "ключ", "a\0", "c"]
KINDS: dict[str, tuple[list[Any], list[Any]]] = {  # kind -> keys in row order, keys that are not there
    "dense": (list(range(N)), [-1, N, 2**40, -(2**63)]),
    "int64": (INT_KEYS, [1, -50, 2**63 - 1, -(2**63)]),
    "string": (STR_KEYS, ["b", "A", "a\0\0", "ключ "]),
}


def full() -> schemes.Full:
    module = schemes.Full(N, D)
    module.load_state_dict({"weight": torch.from_numpy(WEIGHT)})
    return module


def described(module: Scheme, ids: IdSpace | None = None) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """The manifest and arrays that publishing the module would leave."""
    ids = Dense(module.num_embeddings) if ids is None else ids
    manifest = Manifest(
        table="item",
        version=3,
        scheme=module.name,
        parameters=module.config.parameters(),
        num_embeddings=module.num_embeddings,
        embedding_dim=module.embedding_dim,
        dtype="float32",
        id_space=ids.kind,
        num_ids=ids.num_ids,
        files=[],
        golden=Golden(ids=[], sha256=digest(np.empty((0, module.embedding_dim), np.float32))),
        created="2026-01-01T00:00:00+00:00",
    )
    tensors = {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}
    default = np.resize(DEFAULT, module.embedding_dim)
    arrays = {**tensors, **ids.arrays(), DEFAULT_VECTOR: default}
    for array in arrays.values():
        array.flags.writeable = False
    return manifest, arrays


@pytest.fixture(params=["cpu", "cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Where tables live; "cpu:0" takes the way of tensors without needing a GPU."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return name


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each id space in turn."""
    name: str = request.param
    return name


def table_of(kind: str, place: str = "cpu") -> Table:
    keys, _ = KINDS[kind]
    return make_table(*described(full(), None if kind == "dense" else Vocabulary.from_ids(keys)), place)


def test_keys_get_their_vectors_in_their_order(kind: str, place: str) -> None:
    """Any order, repeated, one or none: row i of the answer is the vector of key i, and all are found."""
    table, (keys, _) = table_of(kind, place), KINDS[kind]
    for rows in ([0, 1, 2, 3, 4, 5], [5, 0, 0, 3], [2], []):
        fetched = table.fetch([keys[row] for row in rows])
        assert fetched.vectors_BD.dtype == np.float32
        assert fetched.vectors_BD.shape == (len(rows), D)
        np.testing.assert_array_equal(fetched.vectors_BD, WEIGHT[rows])
        assert (fetched.found_B, fetched.missing) == (None, 0)


@pytest.mark.parametrize("on_missing", ["zero", "default", "hash"])
def test_a_missing_id_gets_what_the_policy_says(kind: str, place: str, on_missing: str) -> None:
    """Zeros, the default vector or the row of the hash; found ids beside it get their own vectors."""
    table, (keys, strangers) = table_of(kind, place), KINDS[kind]
    batch = [strangers[0], keys[4], *strangers[1:], keys[0], strangers[0]]
    found = [key in keys for key in batch]
    hashed = table.ids.hashed_rows(batch, N)
    instead = {"zero": np.zeros(D), "default": DEFAULT}
    expected = [
        WEIGHT[keys.index(key)] if here else WEIGHT[row] if on_missing == "hash" else instead[on_missing]
        for key, here, row in zip(batch, found, hashed, strict=True)
    ]
    fetched = table.fetch(batch, on_missing)
    np.testing.assert_array_equal(fetched.vectors_BD, np.array(expected, np.float32))
    assert fetched.found_B is not None
    assert (fetched.found_B.tolist(), fetched.missing) == (found, found.count(False))


def test_hash_is_the_bucket_among_the_ids() -> None:
    """Policy `hash` leads an integer to `bucket(id, num_ids)`: rows without an id are never served."""
    module = schemes.Full(50, D)
    table = make_table(*described(module, Vocabulary.from_ids(INT_KEYS)))
    strangers = np.arange(1000, 1100)
    vectors = table.lookup(strangers, on_missing="hash")
    np.testing.assert_array_equal(vectors, module.weight.detach().numpy()[bucket(strangers, N)])


def test_a_missing_id_is_an_error_where_it_should_be(kind: str, place: str) -> None:
    """Policy `error` names the table, the first missing ids and where ids are; found ids alone are no error."""
    table, (keys, strangers) = table_of(kind, place), KINDS[kind]
    np.testing.assert_array_equal(table.lookup(keys, on_missing="error"), WEIGHT)
    where = "[0, 6)" if kind == "dense" else "its vocabulary"
    shown = repr(strangers[0]) if kind == "string" else str(strangers[0])
    for batch in ([keys[0], strangers[0]], np.array([keys[0], strangers[0]])):
        with pytest.raises(IdOutOfRange) as raised:
            table.fetch(batch, "error")
        assert str(raised.value) == f"table 'item' does not have id {shown}: not in {where}"
        assert raised.value.facts == {"table": "item", "version": 3}
    with pytest.raises(IdOutOfRange, match=r" and 3 more: not in"):
        table.fetch([*strangers, *strangers], "error")


@pytest.mark.parametrize("on_missing", ["", "zeros", "ZERO", None, 0])
@pytest.mark.parametrize("missing", [True, False])
def test_an_unknown_policy_is_refused(kind: str, on_missing: Any, missing: bool) -> None:
    """ConfigError lists the policies, whether or not any id is missing."""
    keys, strangers = KINDS[kind]
    with pytest.raises(ConfigError, match=r"on_missing must be one of zero, default, error, hash, got"):
        table_of(kind).fetch(strangers if missing else keys, on_missing)


def test_lookup_says_what_it_found_when_asked(kind: str) -> None:
    """`return_found` adds bool [B], all true when nothing is missing."""
    table, (keys, strangers) = table_of(kind), KINDS[kind]
    vectors, found = table.lookup([keys[1], strangers[0]], return_found=True)
    np.testing.assert_array_equal(vectors, [WEIGHT[1], np.zeros(D)])
    assert found.dtype == np.bool_
    assert found.tolist() == [True, False]
    vectors, found = table.lookup(keys, return_found=True)
    np.testing.assert_array_equal(vectors, WEIGHT)
    assert found.dtype == np.bool_
    assert found.tolist() == [True] * N
    _, found = table.lookup([], return_found=True)
    assert found.dtype == np.bool_
    assert found.shape == (0,)


@pytest.mark.parametrize(
    "ids",
    [
        [4, 0, 7],
        (4, 0, 7),
        np.array([4, 0, 7]),
        np.array([4, 0, 7], np.uint8),
        np.array([4, 0, 7], ">i4"),
        np.array([4, 9, 0, 9, 7])[::2],
        torch.tensor([4, 0, 7]),
        torch.tensor([4, 0, 7], dtype=torch.int32),
        torch.tensor([4, 9, 0, 9, 7])[::2],
    ],
    ids=repr,
)
def test_ids_come_as_lists_arrays_and_tensors(ids: Any, place: str) -> None:
    """Any one-dimensional integers, of any width; the caller's own are not changed."""
    before = list(ids)
    vectors, found = table_of("dense", place).lookup(ids, return_found=True)
    np.testing.assert_array_equal(vectors, [WEIGHT[4], WEIGHT[0], np.zeros(D)])
    assert found.tolist() == [True, True, False]
    assert list(ids) == before


def test_ids_of_a_request_body_may_be_read_only(place: str) -> None:
    """Bytes read as int64 are looked up where they lie, aligned or not."""
    body = b"\x00" + np.array([4, 0], np.int64).tobytes()
    for ids in (np.frombuffer(body[1:], np.int64), np.frombuffer(body, np.int64, 2, 1)):
        np.testing.assert_array_equal(table_of("dense", place).lookup(ids), WEIGHT[[4, 0]])


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("dense", ["1"]),
        ("int64", ["1"]),
        ("int64", np.array(["50"])),
        ("string", [1]),
        ("string", np.array([1])),
        ("string", torch.tensor([1])),
        ("string", "bb"),
        ("dense", [1.0]),
        ("dense", torch.tensor([1.0])),
        ("dense", torch.tensor([True])),
        ("dense", torch.tensor([[1]])),
        ("dense", torch.tensor(1)),
        ("dense", [[1]]),
        ("dense", 1),
        ("dense", [2**63]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("on_missing", ON_MISSING)
def test_keys_of_another_kind_are_a_type_error(kind: str, ids: Any, on_missing: str) -> None:
    """Strings to an integer table, integers to a string table, floats to any: never guessed, whatever the policy."""
    with pytest.raises(TypeError, match="ids must"):
        table_of(kind).lookup(ids, on_missing=on_missing)


@given(keys=st.lists(st.integers(-2, N + 1) | st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_lookup_is_indexing_with_zeros_outside(keys: list[int]) -> None:
    """For any int64 ids the answer is the table's row, or zeros."""
    expected = [WEIGHT[key] if 0 <= key < N else np.zeros(D) for key in keys]
    for place in ("cpu", "cpu:0"):
        found = table_of("dense", place).lookup(keys)
        np.testing.assert_array_equal(found, np.array(expected, np.float32).reshape(len(keys), D))


@pytest.mark.parametrize("place", ["cpu", "cpu:0"])
def test_vectors_are_the_callers_own(place: str) -> None:
    """Writing into an answer changes neither the table nor the next answer."""
    table = table_of("dense", place)
    table.lookup([0, 1])[:] = 99.0
    np.testing.assert_array_equal(table.lookup([0, 1]), WEIGHT[:2])


def test_many_threads_read_one_table() -> None:
    """Lookups let each other run and do not disturb each other."""
    module = schemes.QR(10_000, 32, num_buckets=100)
    table = make_table(*described(module))
    expected = module(torch.arange(10_000)).detach().numpy()

    def check(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(-5, 10_000, 3000)
        return np.array_equal(table.lookup(ids), np.where((ids >= 0)[:, None], expected[ids], 0))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(64)))


def test_bytes_are_all_that_is_held(kind: str) -> None:
    """num_bytes counts tensors, id space and default vector."""
    _, arrays = described(full(), None if kind == "dense" else Vocabulary.from_ids(KINDS[kind][0]))
    assert table_of(kind).num_bytes == sum(array.nbytes for array in arrays.values())


# ---- what a reader refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight": None}, "array 'weight' is missing"),
        ({DEFAULT_VECTOR: None}, "array 'default_vector' is missing"),
        ({"weight": WEIGHT[:-1]}, r"array 'weight' is float32 \(5, 3\), full needs float32 \(6, 3\)"),
        ({"weight": WEIGHT.T}, "array 'weight' is float32"),
        ({"weight": WEIGHT.reshape(-1)}, "array 'weight' is float32"),
        ({"weight": WEIGHT.astype(np.float64)}, "array 'weight' is float64"),
        ({"weight": WEIGHT.astype(np.float16)}, "array 'weight' is float16"),
        ({"weight": WEIGHT.astype(np.int32)}, "array 'weight' is int32"),
        ({DEFAULT_VECTOR: DEFAULT[:2]}, "array 'default_vector' is float32"),
        ({DEFAULT_VECTOR: DEFAULT.astype(np.float64)}, "array 'default_vector' is float64"),
        ({"extra": WEIGHT}, r"unknown arrays \['extra'\]"),
    ],
)
def test_arrays_that_are_not_the_schemes_are_refused(changes: dict[str, Any], named: str) -> None:
    """A missing, misshapen, mistyped or unknown array: VerificationFailed says which, and of what version."""
    manifest, arrays = described(full())
    changed = {name: array for name, array in (arrays | changes).items() if array is not None}
    with pytest.raises(VerificationFailed, match=f"^table 'item' version 3: {named}"):
        make_table(manifest, changed)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheme": "fulll"}, "no scheme named 'fulll'.*did you mean 'full'"),
        ({"scheme": "hash"}, "num_buckets"),
        ({"scheme": "qr", "parameters": {"num_buckets": 2}}, "array 'weight' is float32"),
        ({"scheme": "hash", "parameters": {"num_buckets": 0}}, "num_buckets must be at least 1"),
        ({"scheme": "hash", "parameters": {"num_buckets": 5}}, "array 'weight' is float32"),
        ({"parameters": {"colour": "red"}}, "colour"),
        ({"parameters": {"num_embeddings": 6}}, "num_embeddings"),
        ({"num_embeddings": 0}, "num_embeddings must be at least 1"),
        ({"num_embeddings": 2**70}, "num_embeddings must be at least 1 and at most"),
        ({"num_embeddings": 7}, "array 'weight' is float32"),
        ({"embedding_dim": 2}, "array 'weight' is float32"),
        ({"num_ids": 7}, "more ids than rows"),
    ],
)
def test_a_manifest_that_does_not_fit_its_arrays_is_refused(changes: dict[str, Any], named: str) -> None:
    """Scheme, parameters and sizes are checked against the arrays before anything is served."""
    manifest, arrays = described(full())
    with pytest.raises(VerificationFailed, match=f"^table 'item' version 3: .*{named}"):
        make_table(replace(manifest, **changes), arrays)


def test_an_id_space_that_does_not_fit_is_refused() -> None:
    """Another kind of ids than the arrays hold, or another number of them."""
    manifest, arrays = described(full(), Vocabulary.from_ids(INT_KEYS))
    for changes in ({"id_space": "string"}, {"id_space": "uuid"}, {"num_ids": 5}):
        with pytest.raises(VerificationFailed, match="id space"):
            make_table(replace(manifest, **changes), arrays)
    assert make_table(manifest, arrays).ids.num_ids == N


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["shared", "scale_bias", DEFAULT_VECTOR])
def test_a_value_that_is_no_number_is_found_wherever_it_is(name: str, bad: float) -> None:
    """NaN or infinity in the first or last or any element of any array is refused, with array and row."""
    _, arrays = described(schemes.MEmCom(40, 5, num_buckets=7, bias=True))
    check_finite(arrays, "here")
    size, width = arrays[name].size, arrays[name].size // len(arrays[name])
    for position in (0, 1, size // 2, size - 1):
        damaged = arrays[name].copy()
        damaged.reshape(-1)[position] = bad
        row = position // width
        with pytest.raises(
            VerificationFailed, match=rf"^here: array '{name}' holds NaN or infinity \(first in row {row}\)$"
        ):
            check_finite(arrays | {name: damaged}, "here")


def test_checking_numbers_takes_any_array() -> None:
    """Nothing, one number, other types, other orders: only float32 values that are no numbers are refused."""
    largest = np.finfo(np.float32).max
    fine = {
        "none": np.empty((0, 4), np.float32),
        "one": np.array(largest),
        "low": np.array([-largest, 1e-45, -0.0], np.float32),
        "ids": np.array([2**63 - 1]),
        "turned": np.ones((3, 4), np.float32).T,
    }
    check_finite(fine, "here")
    turned = np.ones((3, 4), np.float32)
    turned[2, 1] = np.nan
    for name, bad in {"one": np.array(np.nan, np.float32), "turned": turned.T}.items():
        with pytest.raises(VerificationFailed, match=f"array '{name}'.*first in row {1 if name == 'turned' else 0}"):
            check_finite(fine | {name: bad}, "here")


def test_the_digest_is_sha256_of_little_endian_rows() -> None:
    """A golden value: other languages must be able to compute it."""
    vectors = np.array([[1.0, -2.0], [0.5, 3.25]], np.float32)
    data = bytes.fromhex("0000803f000000c00000003f00005040")
    assert digest(vectors) == hashlib.sha256(data).hexdigest()
    assert digest(np.asfortranarray(vectors)) == digest(vectors.astype(">f4")) == digest(vectors)


def test_golden_ids_must_give_their_vectors(kind: str, place: str) -> None:
    """The vectors of the golden ids, looked up on the device, are compared bit for bit with the publisher's."""
    keys, strangers = KINDS[kind]
    table = table_of(kind, place)
    assert table.manifest is not None

    def with_golden(ids: Any, sha256: str) -> Table:
        assert table.manifest is not None
        return replace(table, manifest=replace(table.manifest, golden=Golden(ids=ids, sha256=sha256)))

    check_golden(with_golden([keys[5], keys[0]], digest(WEIGHT[[5, 0]])))
    nearly = WEIGHT[[5, 0]].copy()
    nearly[1, 2] = np.nextafter(nearly[1, 2], np.float32(0))
    with pytest.raises(VerificationFailed, match="the golden ids' vectors are not the ones"):
        check_golden(with_golden([keys[5], keys[0]], digest(nearly)))
    for ids in ([strangers[0]], [1.5], [None]):
        with pytest.raises(VerificationFailed, match="table 'item' version 3: golden ids: "):
            check_golden(with_golden(ids, digest(WEIGHT[[0]])))
