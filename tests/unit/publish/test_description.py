"""Publishing: what is kept beside the vectors, which ids, which default vector, which figures."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch
from support.publishing import DIM, NUMBERS, ROWS, VECTORS, WORDS, manifest, refused
from torch import nn

from embstore.errors import (
    DataError,
)
from embstore.ids import Dense
from embstore.publish.store import Store
from embstore.schemes import MEmCom


@pytest.mark.parametrize("keys", [WORDS, NUMBERS, np.array(WORDS), np.array(NUMBERS), [""], [-(2**63)], [2**63 - 1]])
def test_a_vocabulary_is_given_as_keys(store: Store, keys: Any) -> None:
    """Integers or strings in row order find their rows; any other key is missing."""
    num = len(keys)
    store.publish("item", VECTORS[:num], ids=keys)
    loaded = store.load("item")
    vectors, found = loaded.lookup(keys, return_found=True)
    np.testing.assert_array_equal(vectors, VECTORS[:num])
    assert found.all()
    other = ["word"] if isinstance(keys[0], str) else [12345]
    vectors, found = loaded.lookup(other, return_found=True)
    assert not found.any()
    assert not vectors.any()


def test_ids_may_be_fewer_than_rows(store: Store) -> None:
    """An IdSpace, or keys, for the first rows: the rest is not served."""
    store.publish("item", VECTORS, ids=Dense(10))
    store.publish("item", VECTORS, ids=WORDS[:10], label="words")
    for version, keys in ((1, [9, 10]), (2, [WORDS[9], WORDS[10]])):
        vectors, found = store.load("item", version).lookup(keys, return_found=True)
        assert found.tolist() == [True, False]
        np.testing.assert_array_equal(vectors, [VECTORS[9], np.zeros(DIM)])


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "0 ids do not fit a table of 30 rows"),
        (list(range(31)), "31 ids do not fit a table of 30 rows"),
        (Dense(31), "31 ids do not fit a table of 30 rows"),
        ([1, 1], "id 1 is in the vocabulary twice"),
        (["a", "b", "a"], "id 'a' is in the vocabulary twice"),
        ([1, "a"], "vocabulary ids must be all integers or all strings"),
        ([1.5], "vocabulary ids must be all integers or all strings"),
        ([2**63], "vocabulary ids must be all integers or all strings"),
        ([[1, 2]], "vocabulary ids must be all integers or all strings"),
        ([None], "vocabulary ids must be all integers or all strings"),
    ],
    ids=repr,
)
def test_keys_that_cannot_be_a_vocabulary_are_refused(store: Store, ids: Any, says: str) -> None:
    """Too many, none, twice, or neither integers nor strings: DataError names it."""
    assert says in refused(store, DataError, VECTORS, ids=ids)


@pytest.mark.parametrize(
    "hot",
    [[3, 1], (3, 1), np.array([3, 1]), np.array([3, 1], np.int32), list(np.array([3, 1])), torch.tensor([3, 1])],
    ids=lambda hot: type(hot).__name__,
)
def test_hot_ids_are_kept_in_order(store: Store, hot: Any) -> None:
    """The hottest ids are in the manifest, hottest first, whatever container they came in."""
    store.publish("item", VECTORS, hot_ids=hot)
    assert manifest(store.load("item")).hot_ids == [3, 1]


def test_hot_keys_are_strings_where_keys_are(store: Store) -> None:
    """A string table's hot ids are its keys."""
    store.publish("item", VECTORS, ids=WORDS, hot_ids=np.array(WORDS[4:2:-1]))
    assert manifest(store.load("item")).hot_ids == [WORDS[4], WORDS[3]]


@pytest.mark.parametrize(
    ("hot", "says"),
    [
        ([1, ROWS], "hot id 30 is not among the table's ids"),
        ([-1], "hot id -1 is not"),
        (["a"], "hot_ids: ids must be"),
    ],
)
def test_hot_ids_must_be_ids(store: Store, hot: Any, says: str) -> None:
    """A hot id the table does not have is a mistake, told before anything is written."""
    assert says in refused(store, DataError, VECTORS, hot_ids=hot)


def test_the_default_vector_is_the_mean_unless_given(store: Store) -> None:
    """`on_missing=default` answers with the mean of all vectors, or with what was published for it."""
    store.publish("item", VECTORS)
    np.testing.assert_allclose(store.load("item").lookup([99], on_missing="default")[0], VECTORS.mean(0), atol=1e-7)
    given = np.arange(DIM)
    for vector in (given, given.tolist(), nn.Parameter(torch.from_numpy(given).float())):
        store.publish("item", VECTORS, default_vector=vector)
        np.testing.assert_array_equal(store.load("item").lookup([99], on_missing="default")[0], given)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(DIM - 1), np.zeros((1, DIM)), [np.nan] * DIM, [1e300] * DIM, 1.0, "zero", [[1], [2, 3]]],
    ids=repr,
)
def test_a_default_vector_that_does_not_fit_is_refused(store: Store, vector: Any) -> None:
    """It has one finite number per dimension."""
    assert "default_vector" in refused(store, DataError, VECTORS, default_vector=vector)


def test_metrics_are_kept_as_plain_values(store: Store) -> None:
    """Numbers of numpy and torch come back as numbers, arrays and tuples as lists, nested as they were."""
    metrics = {
        "auc": np.float32(0.5),
        "steps": np.int64(7),
        "loss": torch.tensor(0.25),
        "curve": np.array([1.0, 2.0]),
        "recall": {"10": (np.float64(0.1), None), 20: True},
        "note": "second try",
    }
    store.publish("item", VECTORS, metrics=metrics)
    kept = manifest(store.load("item")).metrics
    assert kept == {
        "auc": 0.5,
        "steps": 7,
        "loss": 0.25,
        "curve": [1.0, 2.0],
        "recall": {"10": [0.1, None], "20": True},
        "note": "second try",
    }
    assert [type(kept[name]) for name in ("auc", "steps", "loss")] == [float, int, float]


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"auc": float("nan")}, "metrics['auc'] is nan: metrics are finite, leave it out or give None"),
        ({"auc": np.float32("inf")}, "metrics['auc'] is inf"),
        ({"a": {"b": [1.0, float("-inf")]}}, "metrics['a']['b'][1] is -inf"),
        ({"a": object()}, "metrics['a'] is of type object: metrics are numbers, strings, lists and mappings"),
        ({"a": {1, 2}}, "metrics['a'] is of type set"),
        ({"a": 1j}, "metrics['a'] is of type complex"),
    ],
)
def test_metrics_that_json_does_not_have_are_refused(store: Store, metrics: Any, says: str) -> None:
    """NaN, infinity and objects are named and refused before anything is written."""
    assert says in refused(store, DataError, VECTORS, metrics=metrics)


def test_the_manifest_tells_the_whole_story(store: Store) -> None:
    """Scheme, sizes, ids, files, golden ids with the digest of their vectors, parent, date and metrics are in it."""
    module = MEmCom(ROWS, DIM, num_buckets=5)
    store.publish("item", VECTORS)
    store.publish("item", module, ids=NUMBERS, hot_ids=NUMBERS[:2], metrics={"auc": 0.75})
    raw = json.loads((store.root / "tables/item/versions/2/manifest.json").read_bytes())
    age = datetime.now().astimezone() - datetime.fromisoformat(raw.pop("created"))
    assert timedelta(0) <= age + timedelta(milliseconds=1) < timedelta(minutes=5)
    (file,), golden = raw.pop("files"), raw.pop("golden")
    data = (store.root / "tables/item/versions/2" / file["name"]).read_bytes()
    assert (file["num_bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    rows = [NUMBERS.index(key) for key in golden["ids"]]
    assert (len(rows), min(rows), max(rows)) == (16, 0, ROWS - 1)
    vectors = module(torch.tensor(rows)).detach().numpy()
    assert golden["sha256"] == hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()
    assert raw == {
        "table": "item",
        "version": 2,
        "format_version": 1,
        "scheme": "memcom",
        "parameters": {"num_buckets": 5, "bias": False, "offset": False},
        "num_embeddings": ROWS,
        "embedding_dim": DIM,
        "dtype": "float32",
        "id_space": "int64",
        "num_ids": ROWS,
        "hot_ids": NUMBERS[:2],
        "parent": 1,
        "metrics": {"auc": 0.75},
    }
