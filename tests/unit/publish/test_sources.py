"""Publishing: what can become a table, what cannot, and what a reader gets back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from support.publishing import BUCKETS, DIM, NUMBERS, ROWS, VECTORS, WORDS, manifest, refused
from torch import nn

from embstore.errors import (
    ConfigError,
    DataError,
    VerificationFailed,
)
from embstore.publish.store import Store
from embstore.schemes import SCHEMES, MEmCom, scheme_class

pytestmark = pytest.mark.slow


def embedding() -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.from_numpy(VECTORS.copy()), freeze=False)


@pytest.mark.parametrize(
    "source",
    [
        VECTORS,
        VECTORS.astype(np.float64),
        np.asfortranarray(VECTORS),
        np.repeat(VECTORS, 2, axis=0)[::2],
        VECTORS.tolist(),
        torch.from_numpy(VECTORS.copy()),
        torch.from_numpy(VECTORS.astype(np.float64)),
        nn.Parameter(torch.from_numpy(VECTORS.copy())),
        embedding(),
        embedding().state_dict(),
        {"anything": VECTORS},
    ],
    ids=lambda source: type(source).__name__,
)
def test_vectors_in_any_form_become_a_full_table(store: Store, source: Any) -> None:
    """An array, tensor, list, `nn.Embedding` or its state dict is served exactly as it is."""
    assert store.publish("item", source) == 1
    loaded = store.load("item")
    assert manifest(loaded).scheme == "full"
    np.testing.assert_array_equal(loaded.lookup(np.arange(ROWS)), VECTORS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64], ids=str)
def test_numbers_of_every_kind_become_float32(store: Store, dtype: torch.dtype) -> None:
    """Half floats, brain floats and integers are stored as the float32 of the same value."""
    source = (torch.from_numpy(VECTORS).abs() * 10).to(dtype)
    store.publish("item", source)
    np.testing.assert_array_equal(store.load("item").lookup(np.arange(ROWS)), source.float().numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_served_as_it_was_trained(store: Store, scheme: str) -> None:
    """A module, and what it exports with scheme and parameters, are looked up as the module computes."""
    module = scheme_class(scheme).from_budget(ROWS, DIM, 12 * ROWS * DIM).eval()
    config, tensors = module.export()
    parameters = {"num_embeddings": ROWS, "embedding_dim": DIM, **config.parameters()}
    assert store.publish("item", module) == 1
    assert store.publish("item", tensors, scheme=scheme, parameters=parameters) == 2
    expected = module(torch.arange(ROWS)).detach().numpy()
    for version in (1, 2):
        loaded = store.load("item", version)
        assert manifest(loaded).scheme == scheme
        assert manifest(loaded).parameters == json.loads(json.dumps(config.parameters()))
        found = loaded.lookup(np.arange(ROWS))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * module.tolerance * np.abs(expected).max())
    assert manifest(store.load("item", 1)).files == manifest(store.load("item", 2)).files


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet", ".words.parquet"])
def test_files_of_vectors_are_read(store: Store, tmp_path: Path, suffix: str) -> None:
    """A path, as text or Path, is read as a file of vectors, and of keys where it has them."""
    path = tmp_path / f"vectors{suffix}"
    keys: Any = np.arange(ROWS)
    if suffix == ".npy":
        np.save(path, VECTORS)
    elif suffix == ".safetensors":
        save_file({"vectors": VECTORS}, path)
    else:
        keys = WORDS if "words" in suffix else NUMBERS
        pl.DataFrame({"id": keys, "vector": VECTORS.tolist()}).write_parquet(path)
    store.publish("item", path)
    store.publish("item", str(path))
    for version in (1, 2):
        np.testing.assert_array_equal(store.load("item", version).lookup(keys, on_missing="error"), VECTORS)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (np.empty((0, 4)), {}, "shape [ids, dims], got [0, 4]"),
        (np.empty((4, 0)), {}, "shape [ids, dims], got [4, 0]"),
        (np.empty(0), {}, "shape [ids, dims], got [0]"),
        ([], {}, "shape [ids, dims], got [0]"),
        (np.zeros(4), {}, "shape [ids, dims], got [4]"),
        (np.zeros((2, 2, 2)), {}, "shape [ids, dims], got [2, 2, 2]"),
        ([[1.0], [2.0, 3.0]], {}, "array 'weight': "),
        (np.zeros((2, 2), bool), {}, "array 'weight' holds bool, vectors are numbers"),
        (np.zeros((2, 2), complex), {}, "array 'weight' holds complex128, vectors are numbers"),
        (np.array([["a", "b"]]), {}, "vectors are numbers"),
        (None, {}, "array 'weight' holds object, vectors are numbers"),
        (nn.Linear(2, 2), {}, "array 'weight' holds object, vectors are numbers"),
        ("/no/such/file.npy", {}, "/no/such/file.npy: no such file"),
        ({"a": VECTORS[:5]}, {"scheme": "memcom", "parameters": BUCKETS}, "scale [30, 1], got a [5, 8]"),
        (
            {"shared": VECTORS[:5], "scale": np.ones((3, 1))},
            {"scheme": "memcom", "parameters": BUCKETS},
            "do not match scheme memcom: expected shared [5, 8], scale [30, 1], got shared [5, 8], scale [3, 1]",
        ),
        (VECTORS, {"scheme": "full", "parameters": {"num_embeddings": 5, "embedding_dim": 4}}, "weight [5, 4], got"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_table_of_vectors_is_refused(store: Store, source: Any, options: Any, says: str) -> None:
    """Nothing, ragged lists, text, other modules, arrays of other shapes: DataError says what came instead."""
    assert says in refused(store, DataError, source, **options)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ({"a": VECTORS, "b": VECTORS}, {}, "a state dict needs scheme and parameters"),
        ({}, {}, "a state dict needs scheme and parameters"),
        (VECTORS, {"scheme": "memcon"}, "did you mean 'memcom'?"),
        ({"shared": VECTORS}, {"scheme": "memcom", "parameters": {"buckets": 1}}, "parameters of memcom: "),
        ({"shared": VECTORS}, {"scheme": "memcom", "parameters": BUCKETS | {"num_buckets": 0}}, "num_buckets must be"),
        (MEmCom(ROWS, DIM, num_buckets=5), {"scheme": "memcom"}, "must not be given when the source is a Scheme"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_scheme_that_is_not_described_is_refused(store: Store, source: Any, options: Any, says: str) -> None:
    """A state dict alone does not say what it is; ConfigError says what is needed."""
    assert says in refused(store, ConfigError, source, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_is_never_published(store: Store, value: float) -> None:
    """A module, array or file with one NaN, infinity or number too large for float32 is refused, by row."""
    bad = VECTORS.astype(np.float64)
    bad[17, 3] = value
    module = MEmCom(ROWS, DIM, num_buckets=5)
    store.publish("item", VECTORS)
    assert "table 'item': array 'weight' holds NaN or infinity (first in row 17)" in refused(
        store, VerificationFailed, bad
    )
    module.scale.data[11] = torch.tensor(value)
    assert "array 'scale' holds NaN or infinity (first in row 11)" in refused(store, VerificationFailed, module)
    path = store.root.parent / "bad.npy"
    np.save(path, bad)
    assert "first in row 17" in refused(store, VerificationFailed, path)


def test_vectors_that_overflow_when_composed_are_never_published(store: Store) -> None:
    """Finite arrays whose product is infinite are refused, default vector given or not."""
    module = MEmCom(ROWS, DIM, num_buckets=5)
    module.shared.data[2] = 1e30
    module.scale.data[12] = 1e30
    for options in ({}, {"default_vector": np.zeros(DIM)}):
        message = refused(store, VerificationFailed, module, **options)
        assert message == "table 'item': vectors composed of its arrays hold NaN or infinity"


@pytest.mark.parametrize(
    ("row", "dtype"),
    [([3.4e38, 0, 0, 0], "bfloat16"), ([3.4e38, -3.4e38, 0, 0], "int8"), ([1e5, 0, 0, 0], "float16")],
)
def test_rows_that_overflow_their_dtype_are_refused_before_anything_is_written(
    store: Store, row: list[float], dtype: str
) -> None:
    """A finite number that is none as stored: the publisher is told the row, no version appears."""
    vectors = np.zeros((50, 4), np.float32)
    vectors[37] = row
    with pytest.raises(VerificationFailed, match="row 37"):
        store.publish("item", vectors, dtype=dtype)
    assert store.tables() == []


def test_the_source_is_copied(store: Store) -> None:
    """What happens to the module after publishing does not reach the version."""
    module = embedding()
    store.publish("item", module)
    module.weight.data.zero_()
    np.testing.assert_array_equal(store.load("item").lookup(np.arange(ROWS)), VECTORS)
