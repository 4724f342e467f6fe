"""Publishing: versions, labels and releases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.publishing import DIM, NUMBERS, ROWS, VECTORS, WORDS, listing, manifest, refused

from embstore.errors import (
    ConfigError,
    Conflict,
    DataError,
    EmbstoreError,
    LabelNotFound,
    TableNotFound,
    VerificationFailed,
)
from embstore.publish.publication import Publication
from embstore.publish.store import Store


def test_versions_count_up_and_latest_follows(store: Store) -> None:
    """Versions count 1, 2, 3, each a child of the latest before; without a label, or with another, latest stays."""
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
