"""Labels, releases and names: what moves, what is refused, what a reader is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stores import FIRST, SECOND, folder, listing

from embstore.errors import (
    ConfigError,
    EmbstoreError,
    LabelNotFound,
    ReleaseNotFound,
    TableNotFound,
    VerificationFailed,
    VersionNotFound,
)
from embstore.publish.publication import Publication
from embstore.publish.store import Store, open_store
from embstore.store.local import Release


def test_labels_move_freely(store: Store) -> None:
    """A label can go forward, back, and live beside others; a version answers to its number and to each."""
    store.set_label("item", "stable", 1)
    assert {name: at.version for name, at in store.labels("item").items()} == {"latest": 2, "stable": 1}
    store.set_label("item", "latest", 1)
    store.set_label("item", "stable", 2)
    assert [store.resolve("item", ref) for ref in ("latest", "stable", "1", "2", 1, 2)] == [1, 2, 1, 2, 1, 2]
    assert [store.load("item", ref).version for ref in ("latest", "stable", 1)] == [1, 2, 1]


def test_a_label_keeps_its_place_when_it_cannot_move(store: Store) -> None:
    """A label never points at a version that is not there."""
    before = listing(store.root)
    with pytest.raises(VersionNotFound, match="table 'item' has no version 7; it has 1, 2"):
        store.set_label("item", "latest", 7)
    with pytest.raises(TableNotFound, match="no table named 'itme' in the store /"):
        store.set_label("itme", "latest", 1)
    assert listing(store.root) == before


def test_what_is_not_there_is_answered_with_what_is(store: Store) -> None:
    """Unknown tables, versions, labels and releases are told apart, and the message lists the known ones."""
    store.set_label("item", "stable", 1)
    store.write_release({"item": 1})
    cases: list[tuple[type[EmbstoreError], Callable[[], Any], str]] = [
        (TableNotFound, lambda: store.load("user"), f"no table named 'user' in the store {store.root}; it has item"),
        (VersionNotFound, lambda: store.load("item", 9), "table 'item' has no version 9; it has 1, 2"),
        (VersionNotFound, lambda: store.load("item", "9"), "table 'item' has no version 9; it has 1, 2"),
        (VersionNotFound, lambda: store.load("item", -1), "table 'item' has no version -1; it has 1, 2"),
        (LabelNotFound, lambda: store.load("item", "gold"), "table 'item' has no label 'gold'; it has latest, stable"),
        (LabelNotFound, lambda: store.load("item", "../x"), "table 'item' has no label '../x'; it has latest, stable"),
        (LabelNotFound, lambda: store.load("item", "9" * 5000), "; it has latest, stable"),
        (LabelNotFound, lambda: store.load("item", ""), "has no label ''"),
        (ReleaseNotFound, lambda: store.release("2"), "no release '2'; there are 1"),
        (ReleaseNotFound, lambda: store.release("../1"), "no release '../1'; there are 1"),
        (
            TableNotFound,
            lambda: open_store(store.root / "no").load("item"),
            f"store {store.root}/no; it has none",
        ),
    ]
    for kind, ask, says in cases:
        with pytest.raises(kind) as raised:
            ask()
        assert says in str(raised.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", ".hidden", "-a", "a b", "a\n", "\u00e9", "x" * 200]
)
def test_names_that_could_leave_the_store_are_refused(store: Store, name: str) -> None:
    """Tables and labels have plain names; every other is refused before anything is read or written."""
    before = listing(store.root.parent)
    for attempt in (
        lambda: store.publish(name, FIRST),
        lambda: store.load(name),
        lambda: store.versions(name),
        lambda: store.set_label("item", name, 1),
        lambda: store.publish("item", FIRST, label=name),
    ):
        with pytest.raises(ConfigError, match="is not allowed: up to 128 letters"):
            attempt()
    assert listing(store.root.parent) == before


def test_a_label_cannot_look_like_a_version(store: Store) -> None:
    """Numbers are versions, so no label is one."""
    for attempt in (lambda: store.set_label("item", "7", 1), lambda: store.publish("item", FIRST, label="7")):
        with pytest.raises(ConfigError, match="a label cannot be a number, got '7'"):
            attempt()
    assert store.versions("item") == [1, 2]


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://b", "az://b/c", "https://h/x", "file:///tmp/x"])
def test_object_storage_is_refused_and_never_becomes_a_folder(url: str, tmp_path: Path) -> None:
    """A bucket's address is not taken for a folder's name, as text or as a Path."""
    for root in (url, Path(url)):
        with pytest.raises(ConfigError, match="object storage is not supported yet, give a folder"):
            open_store(root)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"version": "x"}', b"[" * 100_000, b'{"version": -1}'])
def test_a_damaged_label_is_refused_and_repaired_by_the_next_move(store: Store, text: bytes) -> None:
    """A label that cannot be read names its file; versions, other labels and publishing do not depend on it."""
    path = store.root / "tables/item/labels/latest.json"
    store.set_label("item", "stable", 1)
    path.write_bytes(text)
    with pytest.raises(VerificationFailed, match=re.escape(str(path))):
        store.load("item")
    assert store.resolve("item", "stable") == 1
    assert store.publish("item", FIRST) == 3
    assert store.resolve("item") == 3


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"tables": 7, "created": ""}', b'{"tables": {"a": null}}'])
def test_a_damaged_release_is_refused_and_does_not_stop_the_next(store: Store, text: bytes) -> None:
    """A release that cannot be read names its file; the next one gets the next number."""
    store.write_release({"item": 1})
    path = store.root / "releases/1.json"
    path.write_bytes(text)
    with pytest.raises(VerificationFailed, match=re.escape(str(path))):
        store.release("1")
    assert store.write_release({"item": 2}).id == "2"
    assert store.release("2").tables == {"item": 2}


def test_a_release_names_only_versions_that_are_there(store: Store) -> None:
    """A release of a version that does not exist, or cannot be trusted, is refused."""
    before = listing(store.root)
    with pytest.raises(VersionNotFound, match="table 'item' has no version 3"):
        store.write_release({"item": 3})
    with pytest.raises(VersionNotFound, match="table 'user' has no version 1"):
        store.write_release({"item": 1, "user": 1})
    (folder(store) / "manifest.json").write_text("{")
    with pytest.raises(VerificationFailed):
        store.write_release({"item": 2})
    (folder(store) / "manifest.json").write_bytes(before["tables/item/versions/2/manifest.json"] or b"")
    assert listing(store.root) == before


def test_labels_of_a_release_move_together(store: Store) -> None:
    """While some tables of a release still carry the label's older release, every reader gets the older one's."""
    store.publish("user", FIRST)
    store.publish("user", SECOND)
    for release, version in (("1", 1), ("2", 2)):
        assert store.write_release({"item": version, "user": version}).id == release
    seen = []
    for table, version, release in [("item", 1, "1"), ("user", 1, "1"), ("user", 2, "2"), ("item", 2, "2")]:
        store.set_label(table, "canary", version, release=release)
        if "canary" in store.labels("user"):
            seen.append([store.resolve(name, "canary") for name in ("item", "user")])
            assert seen[-1] == [store.labels(name)["canary"].version for name in ("item", "user")]
    assert seen == [[1, 1], [1, 1], [2, 2]]
    store.set_label("user", "canary", 1)  # moved by hand: where a person puts it, it stays
    assert [store.resolve(name, "canary") for name in ("item", "user")] == [2, 1]
    by_hand = store.labels("user")["canary"]
    assert (by_hand.version, by_hand.release) == (1, None)


@given(name=st.text(max_size=20), ref=st.text(max_size=20))
def test_no_name_at_all_can_crash_a_reader(name: str, ref: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is asked for, the answer is one of our errors."""
    store = open_store(tmp_path_factory.getbasetemp())
    with pytest.raises((ConfigError, TableNotFound)):
        store.load(name, ref)
    with pytest.raises(ReleaseNotFound):
        store.release(ref)


def test_a_release_published_during_a_survey_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    """Labels that a survey found belong to releases that it found too, whatever is published while it looks."""
    both = {name: Publication(np.zeros((3, 2), np.float32)) for name in ("item", "user")}
    writer = open_store(tmp_path / "store")
    writer.publish_release(both)

    class Interrupted(Store):
        """A reader in whose survey another release is published."""

        published = False

        def release(self, release_id: str) -> Release:
            """Read it, and then publish the next one."""
            found = super().release(release_id)
            if not self.published:
                self.published = True
                writer.publish_release(both)
            return found

    survey = Interrupted(tmp_path / "store").survey()
    assert {label.release for label in survey.labels.values()} <= survey.releases.keys()
