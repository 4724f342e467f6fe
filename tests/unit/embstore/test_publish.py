"""Publishing: what can become a version, what cannot, and what a reader gets back."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from embstore.errors import (
    ConfigError,
    Conflict,
    DataError,
    EmbstoreError,
    LabelNotFound,
    TableNotFound,
    VerificationFailed,
)
from embstore.ids import Dense
from embstore.publish import Publication, Store, open_store
from embstore.schemes import SCHEMES, MEmCom, scheme_class
from embstore.store.manifest import Manifest
from embstore.table import Table

ROWS, DIM = 30, 8
VECTORS = np.random.default_rng(7).normal(size=(ROWS, DIM)).astype(np.float32)
WORDS = [f"word {row} \u4e16" for row in range(ROWS)]
NUMBERS = [(-1) ** row * row**9 for row in range(ROWS)]
BUCKETS = {"num_embeddings": ROWS, "embedding_dim": DIM, "num_buckets": 5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that does not exist yet."""
    return open_store(tmp_path / "store")


def manifest(table: Table) -> Manifest:
    assert table.manifest is not None
    return table.manifest


def listing(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's name."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def refused(store: Store, kind: type[EmbstoreError], source: Any, **options: Any) -> str:
    """Publishing raises `kind`, in one readable line, and the store stays as it was, byte for byte."""
    before = listing(store.root)
    with pytest.raises(kind) as raised:
        store.publish("item", source, **options)
    assert type(raised.value) is kind
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    assert listing(store.root) == before
    assert store.root.exists() == bool(before)
    return message


# ---- sources ---------------------------------------------------------------------------------------------------------


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
            "table of these parameters is made of shared [5, 8], scale [30, 1], got shared [5, 8], scale [3, 1]",
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
        (MEmCom(ROWS, DIM, num_buckets=5), {"scheme": "memcom"}, "leave scheme and parameters out"),
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


# ---- ids -------------------------------------------------------------------------------------------------------------


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
        ([1, 1], "key 1 is in the vocabulary twice"),
        (["a", "b", "a"], "key 'a' is in the vocabulary twice"),
        ([1, "a"], "vocabulary keys must be all integers or all strings"),
        ([1.5], "vocabulary keys must be all integers or all strings"),
        ([2**63], "vocabulary keys must be all integers or all strings"),
        ([[1, 2]], "vocabulary keys must be all integers or all strings"),
        ([None], "vocabulary keys must be all integers or all strings"),
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


# ---- default vector, metrics -----------------------------------------------------------------------------------------


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


# ---- versions, labels, releases --------------------------------------------------------------------------------------


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


def test_versions_count_up_and_latest_follows(store: Store) -> None:
    """1, 2, 3, each a child of what was latest before it; without a label, or with another, latest stays."""
    assert store.publish("item", VECTORS) == 1
    assert store.publish("item", VECTORS, label=None) == 2
    assert store.publish("item", VECTORS, label="canary") == 3
    assert store.publish("item", VECTORS) == 4
    assert [manifest(store.load("item", version)).parent for version in (1, 2, 3, 4)] == [None, 1, 1, 1]
    assert {name: at.version for name, at in store.labels("item").items()} == {"latest": 4, "canary": 3}
    store.set_label("item", "latest", 3)
    assert store.publish("item", VECTORS) == 5
    assert manifest(store.load("item", 5)).parent == 3


def test_a_table_without_labels_is_reached_by_number(store: Store) -> None:
    """Publishing without a label makes no label, and says so to who asks for one."""
    store.publish("item", VECTORS, label=None)
    assert store.load("item", 1).version == 1
    with pytest.raises(LabelNotFound, match="table 'item' has no label 'latest'; it has none"):
        store.load("item")


def test_a_bad_label_publishes_nothing(store: Store) -> None:
    """A label that cannot be is found out before the version exists, alone or in a release."""
    for label in ("../x", "7", ""):
        assert "label" in refused(store, ConfigError, VECTORS, label=label)
        with pytest.raises(ConfigError, match="label"):
            store.publish_release({"item": Publication(VECTORS)}, label=label)
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (WORDS, NUMBERS, "points at version 1, whose ids are strings, and those of the new one are integers"),
        (WORDS, None, "points at version 1, whose ids are strings, and those of the new one are integers"),
        (NUMBERS, WORDS, "points at version 1, whose ids are integers, and those of the new one are strings"),
        (None, WORDS, "points at version 1, whose ids are integers, and those of the new one are strings"),
    ],
    ids=["string to int64", "string to dense", "int64 to string", "dense to string"],
)
def test_a_label_stays_with_the_type_of_its_ids(store: Store, before: Any, after: Any, says: str) -> None:
    """Nothing is published, alone or in a release, where the label's callers would get errors; unless asked for."""
    store.publish("item", VECTORS, ids=before)
    said = refused(store, Conflict, VECTORS, ids=after)
    assert said.startswith("table 'item': label 'latest' ")
    assert says in said
    held = listing(store.root)
    with pytest.raises(Conflict, match="table 'item'"):
        store.publish_release({"user": Publication(VECTORS, ids=after), "item": Publication(VECTORS, ids=after)})
    unchanged = listing(store.root)
    assert {path for path in unchanged if "user" not in path} == set(held)
    assert store.versions("user") == []
    assert store.publish("item", VECTORS, ids=after, label=None) == 2
    store.publish_release({"item": Publication(VECTORS, ids=after)}, label=None)
    assert store.publish("item", VECTORS, ids=after, label="canary") == 4
    assert store.resolve("item") == 1
    assert "label 'canary' points at version 4" in refused(store, Conflict, VECTORS, ids=before, label="canary")
    store.publish_release({"item": Publication(VECTORS, ids=after, new_id_type=True)})
    assert store.resolve("item") == 5
    assert store.publish("item", VECTORS, ids=before, new_id_type=True) == 6


def test_integers_may_be_numbered_anew(store: Store) -> None:
    """Row numbers and a vocabulary of integers are asked for alike: a label moves between them."""
    store.publish("item", VECTORS)
    store.publish("item", VECTORS, ids=NUMBERS)
    assert store.publish("item", VECTORS) == store.resolve("item") == 3


def test_a_damaged_version_keeps_no_label(store: Store) -> None:
    """What cannot be read is replaced by whatever comes."""
    store.publish("item", VECTORS, ids=WORDS)
    (store.root / "tables/item/versions/1/manifest.json").write_text("{")
    assert store.publish("item", VECTORS) == store.resolve("item") == 2


def test_a_loaded_table_outlives_what_follows(store: Store) -> None:
    """A version in use does not change when others are published."""
    store.publish("item", VECTORS)
    loaded = store.load("item")
    store.publish("item", VECTORS * 2)
    np.testing.assert_array_equal(loaded.lookup(np.arange(ROWS)), VECTORS)
    np.testing.assert_array_equal(store.load("item").lookup(np.arange(ROWS)), VECTORS * 2)
    assert (loaded.version, store.load("item").version) == (1, 2)


def test_the_source_is_copied(store: Store) -> None:
    """What happens to the module after publishing does not reach the version."""
    module = embedding()
    store.publish("item", module)
    module.weight.data.zero_()
    np.testing.assert_array_equal(store.load("item").lookup(np.arange(ROWS)), VECTORS)


def test_a_release_is_published_together(store: Store) -> None:
    """Versions of several tables under one id, their labels moved with it."""
    store.publish("item", VECTORS)
    first = store.publish_release({"user": Publication(VECTORS), "item": Publication(VECTORS * 2)})
    second = store.publish_release({"user": Publication(VECTORS * 3), "item": Publication(VECTORS * 4)}, label=None)
    assert (first.id, first.tables) == ("1", {"user": 1, "item": 2})
    assert (second.id, second.tables) == ("2", {"user": 2, "item": 3})
    assert store.releases() == [first, second]
    assert store.release("2") == second
    for table, version in first.tables.items():
        at = store.labels(table)["latest"]
        assert (at.version, at.release) == (version, "1")
    store.publish("item", VECTORS)
    assert store.labels("item")["latest"].release is None


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (Publication(np.full((ROWS, DIM), np.nan)), VerificationFailed),
        (Publication(np.zeros(3)), DataError),
        (Publication(VECTORS, metrics={"auc": float("nan")}), DataError),
        (Publication(VECTORS, scheme="memcom"), ConfigError),
    ],
    ids=["nan", "shape", "metrics", "scheme"],
)
def test_a_release_with_one_bad_table_publishes_none(store: Store, bad: Publication, kind: type[EmbstoreError]) -> None:
    """What is wrong with the last table keeps the first from being seen."""
    store.publish_release({"user": Publication(VECTORS), "item": Publication(VECTORS)})
    before = listing(store.root)
    with pytest.raises(kind):
        store.publish_release({"user": Publication(VECTORS), "item": bad})
    assert listing(store.root) == before


def test_a_release_needs_a_table(store: Store) -> None:
    """Nothing is not a release."""
    with pytest.raises(ConfigError, match="a release needs at least one table"):
        store.publish_release({})


def test_reading_a_store_that_does_not_exist_makes_none(store: Store) -> None:
    """Only publishing creates a store."""
    assert (store.tables(), store.versions("item"), store.labels("item"), store.releases()) == ([], [], {}, [])
    with pytest.raises(TableNotFound):
        store.load("item")
    assert not store.root.exists()


# ---- publishers at once ----------------------------------------------------------------------------------------------

RACE = """
import json, os, sys
import numpy as np
from embstore.publish import Publication, Store

store, warm, publishers, times = Store(sys.argv[1]), Store(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def vectors(publisher, time):
    return np.full((30, 8), 100 * publisher + time, np.float32)

def publish(store, publisher):
    made = []
    for time in range(times):
        one = store.publish("item", vectors(publisher, time))
        both = store.publish_release({t: Publication(vectors(publisher, time)) for t in ("user", "pair")})
        made.append([publisher, time, one, both.id, both.tables])
    return made

publish(warm, 0)
pipes = []
go = os.pipe()
for publisher in range(publishers):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(go[1])
        os.read(go[0], 1)
        os.write(writer, json.dumps(publish(store, publisher)).encode())
        os._exit(0)
    os.close(writer)
    pipes.append(reader)
os.close(go[1])
print(json.dumps([made for reader in pipes for made in json.load(os.fdopen(reader))]))
"""


def test_publishers_at_once_all_succeed(store: Store, tmp_path: Path) -> None:
    """Four processes, five times each: every version gets its own number, no release is torn, latest is the last."""
    publishers, times = 4, 5
    command = [sys.executable, "-W", "error", "-c", RACE, str(store.root), str(tmp_path / "warm")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    said = subprocess.run(
        [*command, str(publishers), str(times)], env=env, stdout=subprocess.PIPE, check=True, timeout=120
    ).stdout
    made = json.loads(said)
    everything = list(range(1, publishers * times + 1))
    assert sorted(one for _, _, one, _, _ in made) == store.versions("item") == everything
    assert sorted(int(release) for _, _, _, release, _ in made) == everything
    for publisher, time, one, release, tables in made:
        assert store.release(release).tables == tables
        for table, version in (("item", one), *tables.items()):
            loaded = store.load(table, version, verify=True)
            assert (loaded.lookup(np.arange(ROWS)) == 100 * publisher + time).all()
    assert store.versions("user") == store.versions("pair") == everything
    assert [release.tables for release in store.releases()] == [{"user": n, "pair": n} for n in everything]
    assert {store.resolve(table) for table in ("item", "user", "pair")} == {everything[-1]}
    assert {store.labels(table)["latest"].release for table in ("user", "pair")} == {str(everything[-1])}
    assert not [path for path in store.root.rglob("*") if path.name.startswith(".")]


def test_a_publisher_waits_for_its_turn(store: Store) -> None:
    """Numbers are given and labels moved in one turn, which a second publisher cannot get in between."""
    attempts = []
    plain: Callable[..., None] = store.set_label

    def set_label(*args: Any, **options: Any) -> None:
        lock = os.open(store.root, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        attempts.append(args)
        plain(*args, **options)

    store.set_label = set_label  # type: ignore[method-assign]
    store.publish("item", VECTORS)
    store.publish_release({"item": Publication(VECTORS), "user": Publication(VECTORS)})
    assert attempts == [("item", "latest", 1), ("item", "latest", 2), ("user", "latest", 1)]


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
