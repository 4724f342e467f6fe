"""A damaged version is refused with one readable line, and nothing wrong is ever served."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import DIM, FIRST, KEYS, ROWS, edit, folder, refused, rewrite_arrays

from embstore.errors import (
    VerificationFailed,
)
from embstore.publish.store import Store, open_store

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["files"][0].update(sha256="0" * 64), "arrays.safetensors does not have the SHA-256"),
        (lambda m: m["files"][0].update(num_bytes=17), "the manifest says 17"),
        (lambda m: m["files"][0].update(num_bytes="17"), "no size and digest"),
        (lambda m: m["files"][0].update(name="other.safetensors"), "other.safetensors: No such file"),
        (lambda m: m["files"][0].update(name="../1/arrays.safetensors"), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name="/etc/passwd"), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name=".."), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name=""), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name="a\0b"), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name="\ud800"), "leaves the version's folder"),
        (lambda m: m["files"][0].update(name=7), "not a valid manifest"),
        (lambda m: m["files"][0].update(extra=1), "extra"),
        (lambda m: m.update(files=[]), "array 'weight' is missing"),
        (lambda m: m.update(files={}), "files is not a list"),
        (lambda m: m.update(format_version=2), "format version 2; this release reads up to 1"),
        (lambda m: m.update(format_version=True), "format version True"),
        (lambda m: m.update(table="user"), "manifest says 'user'"),
        (lambda m: m.update(version=1), "manifest says 'item' version 1"),
        (lambda m: m.pop("golden"), "golden"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(scheme="qrr"), "no scheme named 'qrr'"),
        (lambda m: m.update(scheme="hash"), "num_buckets"),
        (lambda m: m.update(parameters={"num_buckets": 3}), "num_buckets"),
        (lambda m: m.update(num_embeddings=ROWS - 1), "array 'weight' is float32 (40, 8)"),
        (lambda m: m.update(num_ids=ROWS + 1), "more ids than rows"),
        (lambda m: m.update(num_ids=ROWS - 1), "golden ids"),
        (lambda m: m.update(embedding_dim=DIM - 1), "full needs float32"),
        (lambda m: m.update(embedding_dim=0), "embedding_dim is 0"),
        (lambda m: m.update(dtype="float16"), "needs float16"),
        (lambda m: m["golden"].update(sha256="0" * 64), "golden ids' vectors are not the ones"),
        (lambda m: m["golden"].update(ids=[]), "golden"),
        (lambda m: m["golden"].update(ids=[1, 2]), "golden ids' vectors are not the ones"),
        (lambda m: m["golden"].update(ids=[ROWS]), "golden ids"),
        (lambda m: m["golden"].update(ids=[1 << 70]), "golden ids"),
        (lambda m: m["golden"].update(ids=["a"]), "golden ids"),
        (lambda m: m["golden"].update(ids="abc"), "golden"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(store: Store, change: Callable[[Any], Any], says: str) -> None:
    """Each thing a manifest can get wrong is named, and the version before it still loads."""
    edit(folder(store) / "manifest.json", change)
    refused(store, says)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 1}', b"\0" * 2000]
)
def test_a_manifest_that_is_not_one_is_refused(store: Store, text: bytes) -> None:
    """Whatever stands in the file, a reader gets one line and no traceback."""
    (folder(store) / "manifest.json").write_bytes(text)
    refused(store, "not a valid manifest")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weight", "default_vector"])
def test_nan_in_the_arrays_is_refused(store: Store, name: str, value: float) -> None:
    """A NaN whose digests are right, in a row that no golden id sees, is found by looking at every number."""
    rewrite_arrays(store, lambda arrays: arrays[name].__setitem__(1, value))
    refused(store, f"array '{name}' holds NaN or infinity", "row 1" if name == "weight" else "NaN")


def test_other_vectors_under_right_digests_are_refused(store: Store) -> None:
    """Golden ids notice arrays that are whole but not the ones that were published."""
    rewrite_arrays(store, lambda arrays: arrays["weight"].__imul__(2))
    refused(store, "the golden ids' vectors are not the ones it was published with")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("weight"), "array 'weight' is missing"),
        (lambda a: a.pop("default_vector"), "array 'default_vector' is missing"),
        (lambda a: a.update(more=a["weight"]), "unknown arrays ['more']"),
        (lambda a: a.update(weight=a["weight"][1:]), "array 'weight' is float32 (39, 8)"),
        (lambda a: a.update(weight=a["weight"].astype(np.float16)), "array 'weight' is float16"),
        (lambda a: a.update(weight=a["weight"].view(np.int32)), "array 'weight' is int32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(store: Store, change: Callable[[Any], Any], says: str) -> None:
    """Missing, added, misshapen and mistyped arrays are refused by name though their digests are right."""
    rewrite_arrays(store, change)
    refused(store, says)


def test_missing_arrays_are_refused(store: Store) -> None:
    """A version whose file is gone says which file."""
    (folder(store) / "arrays.safetensors").unlink()
    refused(store, "arrays.safetensors: No such file or directory")


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_never_loads(store: Store, verify: bool) -> None:
    """Cut at any length at all, verifying or not, the version is refused."""
    path = folder(store) / "arrays.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole) - 1, -1, -7):
        os.truncate(path, length)
        with pytest.raises(VerificationFailed, match=r"table 'item' version 2: arrays\.safetensors has"):
            store.load("item", 2, verify=verify)
    path.write_bytes(whole + b"\0")
    with pytest.raises(VerificationFailed, match="the manifest says"):
        store.load("item", 2, verify=verify)


def test_no_flipped_bit_in_the_arrays_is_served(store: Store) -> None:
    """Every byte of the file is under the digest: header, padding and numbers alike."""
    path = folder(store) / "arrays.safetensors"
    whole, chosen = bytearray(path.read_bytes()), random.Random(3)
    for position in range(0, len(whole), 3):
        bit = 1 << chosen.randrange(8)
        whole[position] ^= bit
        path.write_bytes(whole)
        with pytest.raises(VerificationFailed, match="does not have the SHA-256"):
            store.load("item", 2)
        whole[position] ^= bit


@pytest.mark.parametrize("ids", [None, KEYS, list(range(100, 100 + ROWS))], ids=["dense", "strings", "integers"])
def test_a_flipped_bit_in_the_manifest_never_changes_a_vector(tmp_path: Path, ids: Any) -> None:
    """Each bit flip is refused, or lies in what describes and does not define: date, metrics, parent, hot ids."""
    store = open_store(tmp_path)
    for _ in range(2):
        store.publish("item", FIRST, ids=ids, hot_ids=(ids or range(ROWS))[:3], metrics={"auc": 0.75})
    keys = list(range(ROWS)) if ids is None else ids
    path = folder(store) / "manifest.json"
    whole, chosen, good, harmless = bytearray(path.read_bytes()), random.Random(4), json.loads(path.read_bytes()), set()
    for position in range(len(whole)):
        bit = 1 << chosen.randrange(8)
        whole[position] ^= bit
        path.write_bytes(whole)
        with suppress(VerificationFailed):
            loaded = store.load("item", 2)
            assert loaded.ids.num_ids == ROWS
            np.testing.assert_array_equal(loaded.lookup(keys, on_missing="error"), FIRST)
            changed = json.loads(whole)
            harmless |= {name for name in good if changed[name] != good[name]}
        whole[position] ^= bit
    assert harmless <= {"created", "metrics", "parent", "hot_ids"}
    assert "created" in harmless
