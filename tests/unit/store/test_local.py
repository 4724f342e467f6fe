"""The store on disk: what is written and when, what a reader trusts, and what the disk can do to both."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embstore.errors import (
    ConfigError,
    EmbstoreError,
    LabelNotFound,
    ReleaseNotFound,
    StoreError,
    TableNotFound,
    VerificationFailed,
    VersionNotFound,
)
from embstore.publish.publication import Publication
from embstore.publish.store import Store, open_store
from embstore.store import local as store_module
from embstore.store.local import FileStore

ROWS, DIM = 40, 8
FIRST = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
SECOND = np.random.default_rng(2).normal(size=(ROWS, DIM)).astype(np.float32)
KEYS = [f"key {row}" for row in range(ROWS)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with versions 1 and 2 of table `item`, label `latest` at 2."""
    root = tmp_path_factory.mktemp("published") / "store"
    for vectors in (FIRST, SECOND):
        open_store(root).publish("item", vectors)
    return root


@pytest.fixture
def store(published: Path, tmp_path: Path) -> Store:
    """A copy of it to do anything with."""
    return open_store(shutil.copytree(published, tmp_path / "store"))


def folder(store: FileStore, version: int = 2) -> Path:
    return store.root / "tables" / "item" / "versions" / str(version)


def listing(root: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's name."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON file with one change."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_arrays(store: FileStore, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the arrays of version 2 and make the manifest's size and digest fit them again."""
    from embstore.store.tensor_file import map_file, read_arrays, write_arrays

    path = folder(store) / "arrays.safetensors"
    arrays = {name: array.copy() for name, array in read_arrays(map_file(path), "").items()}
    change(arrays)
    with path.open("wb") as file:
        write_arrays(file, arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {"name": path.name, "num_bytes": path.stat().st_size, "sha256": digest}
    edit(folder(store) / "manifest.json", lambda m: m.update(files=[entry]))


def refused(store: Store, *says: str) -> str:
    """Version 2 is refused with one readable line that names it and `says`; version 1 is as it was."""
    with pytest.raises(VerificationFailed) as raised:
        store.load("item", 2)
    message = str(raised.value)
    for part in ("item", "version 2", *says):
        assert part in message
    assert "\n" not in message
    assert len(message) < 400
    np.testing.assert_array_equal(store.load("item", 1).lookup(np.arange(ROWS)), FIRST)
    return message


# ---- what is written, and in which order ----------------------------------------------------------------------------


def test_the_layout_is_the_contract(store: Store) -> None:
    """Manifest and arrays in numbered folders, a file per label and per release, nothing else."""
    store.write_release({"item": 2})
    assert list(listing(store.root)) == [
        "releases",
        "releases/1.json",
        "tables",
        "tables/item",
        "tables/item/labels",
        "tables/item/labels/latest.json",
        "tables/item/versions",
        "tables/item/versions/1",
        "tables/item/versions/1/arrays.safetensors",
        "tables/item/versions/1/manifest.json",
        "tables/item/versions/2",
        "tables/item/versions/2/arrays.safetensors",
        "tables/item/versions/2/manifest.json",
    ]


def test_the_manifest_states_size_and_sha256_of_each_file(store: Store) -> None:
    """`sha256sum` and `ls -l` say the same as the manifest."""
    (entry,) = json.loads((folder(store) / "manifest.json").read_bytes())["files"]
    data = (folder(store) / entry["name"]).read_bytes()
    assert entry == {
        "name": "arrays.safetensors",
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_any_safetensors_reader_opens_the_arrays(store: Store) -> None:
    """The reference implementation of the format reads what the store wrote."""
    from safetensors.numpy import load_file

    arrays = load_file(folder(store) / "arrays.safetensors")
    np.testing.assert_array_equal(arrays["weight"], SECOND)
    assert set(arrays) == {"weight", "default_vector", "golden_vectors"}


def test_everything_is_on_disk_before_it_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays, manifest and folder are synced before the rename; new folders and the rename are synced after."""
    events: list[tuple[str, str]] = []
    versions = tmp_path / "store/tables/item/versions"

    def shown(path: Any) -> str:
        return re.sub(r"\.staging-\w+", "STAGING", os.path.relpath(path, tmp_path))

    def record(name: str, path_of: Callable[..., Any]) -> None:
        plain = getattr(os, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync":  # what it was when the sync ended
                plain(*args)
            path = shown(path_of(*args))
            if name == "fsync" and path.endswith("manifest.json"):
                assert (versions / os.listdir(versions)[0] / "arrays.safetensors").stat().st_size > 4 * FIRST.size
            events.append((name, path))
            return None if name == "fsync" else plain(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    record("mkdir", lambda path, *_: path)
    record("rename", lambda _, target: target)
    record("replace", lambda _, target: target)
    open_store(tmp_path / "store").publish("item", FIRST)

    inside = "store/tables/item"
    made = ["store", "store/tables", inside, f"{inside}/versions"]
    wanted = [event for path in made for event in (("mkdir", path), ("fsync", os.path.dirname(path) or "."))]
    wanted += [
        ("mkdir", f"{inside}/versions/STAGING"),
        ("fsync", f"{inside}/versions/STAGING/arrays.safetensors"),
        ("fsync", f"{inside}/versions/STAGING/manifest.json"),
        ("fsync", f"{inside}/versions/STAGING"),
        ("rename", f"{inside}/versions/1"),
        ("fsync", f"{inside}/versions"),
        ("mkdir", f"{inside}/labels"),
        ("fsync", inside),
        ("mkdir", f"{inside}/labels/STAGING"),
        ("fsync", f"{inside}/labels/STAGING/latest.json"),
        ("replace", f"{inside}/labels/latest.json"),
        ("fsync", f"{inside}/labels"),
    ]
    assert events == wanted


def test_a_folder_without_a_manifest_is_no_version(store: Store) -> None:
    """The manifest makes the version: arrays alone are not listed, not loaded, and their number is not given again."""
    shutil.copytree(folder(store), folder(store, 3))
    (folder(store, 3) / "manifest.json").unlink()
    assert store.versions("item") == [1, 2]
    with pytest.raises(VersionNotFound, match="has no version 3; it has 1, 2"):
        store.load("item", 3)
    assert store.publish("item", FIRST) == 4


def test_what_other_programs_leave_in_a_store_is_overlooked(store: Store) -> None:
    """Hidden files, notes and odd folders are no tables, versions, labels or releases."""
    for name in (".DS_Store", "notes.txt", "tables/.DS_Store", "tables/notes.txt", "tables/item/.DS_Store"):
        (store.root / name).write_text("?")
    (store.root / "releases").mkdir()
    for name in ("versions/.DS_Store", "versions/007", "versions/notes", "versions/\u0665", "labels/._latest.json"):
        (store.root / "tables/item" / name).write_text("?")
    (store.root / "releases/notes.json").write_text("?")
    (store.root / "tables/lost+found").mkdir()
    assert store.tables() == ["item"]
    assert store.versions("item") == [1, 2]
    assert set(store.labels("item")) == {"latest"}
    assert store.releases() == []
    assert store.publish("item", FIRST) == 3
    assert store.write_release({"item": 3}).id == "1"


# ---- memory-mapped ---------------------------------------------------------------------------------------------------


def test_arrays_are_views_of_a_read_only_map(store: Store) -> None:
    """No array is a copy, and none can be written to."""
    for array in store.read_version("item", 2).arrays.values():
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview)
        assert isinstance(base.obj, mmap.mmap)
        assert base.readonly


READER = """
import sys
from embstore.store.local import FileStore
arrays = FileStore(sys.argv[1]).read_version("item", int(sys.argv[2])).arrays
total = sum(float(array.sum()) for array in arrays.values())
assert "torch" not in sys.modules
print("read", flush=True)
sys.stdin.read()
"""


def test_two_processes_share_one_copy_in_memory(store: Store) -> None:
    """The pages of a version that two processes read are the same pages, and neither has any of its own."""
    version = store.publish("item", np.ones((1 << 15, 64), np.float32))
    arrays = store.read_version("item", version).arrays
    assert float(arrays["weight"].sum()) == 1 << 21
    command = [sys.executable, "-c", READER, str(store.root), str(version)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "read\n"
        mine, theirs = (mapping(pid, folder(store, version) / "arrays.safetensors") for pid in (os.getpid(), other.pid))
        other.communicate("")
    for pages in (mine, theirs):
        assert pages["Rss"] >= 8 << 10
        assert pages["Private_Dirty"] == pages["Shared_Dirty"] == pages["Anonymous"] == 0
        assert pages["Shared_Clean"] >= 0.9 * pages["Rss"]
        assert pages["Pss"] <= 0.6 * pages["Rss"]


def mapping(pid: int, path: Path) -> dict[str, int]:
    """What /proc says about a process's map of a file, in kB."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and (size := re.match(r"(\w+): +(\d+) kB", line)):
            found[size[1]] = found.get(size[1], 0) + int(size[2])
    return found


# ---- what a reader does not trust ------------------------------------------------------------------------------------


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


# ---- labels and releases ---------------------------------------------------------------------------------------------


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


# ---- publishers beside each other ------------------------------------------------------------------------------------

HOLDER = """
import sys
import numpy as np
from dataclasses import replace
from embstore.store.local import FileStore
store = FileStore(sys.argv[1])
made = store.read_version("item", 1)
with store.stage(made.manifest, made.arrays) as staged:
    print(staged.path, flush=True)
    if sys.stdin.readline():
        print(staged.commit(), flush=True)
"""


@pytest.fixture
def holder(store: Store) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has written a version's arrays and holds them, until it is sent a line."""
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_live_publisher_is_left_alone(store: Store, holder: tuple[subprocess.Popen[str], Path]) -> None:
    """Publishing beside a slow publisher takes the next number and leaves what the slow one has written."""
    process, staging = holder
    assert staging.is_dir()
    assert [store.publish("item", FIRST) for _ in range(3)] == [3, 4, 5]
    assert (staging / "arrays.safetensors").is_file()
    assert process.communicate("go\n")[0] == "6\n"
    assert store.versions("item") == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(store.load("item", 6).lookup(np.arange(ROWS)), FIRST)


def test_a_dead_publishers_folder_is_removed(store: Store, holder: tuple[subprocess.Popen[str], Path]) -> None:
    """What a killed publisher had written is gone after the next publication."""
    process, staging = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert staging.is_dir()
    assert store.publish("item", FIRST) == 3
    assert os.listdir(store.root / "tables/item/versions") != []
    assert not [p for p in store.root.rglob("*") if p.name.startswith(".")]


def test_a_number_taken_meanwhile_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the turn's lock does not bind, a version in the way is not replaced: the next free number is taken."""
    before, made = listing(store.root / "tables/item/versions"), store.read_version("item", 1)
    with store.stage(made.manifest, made.arrays) as staged, monkeypatch.context() as patch:
        patch.setattr(store_module, "numbered", lambda *_: [])
        assert staged.commit() == 3
    assert listing(store.root / "tables/item/versions").items() > before.items()
    np.testing.assert_array_equal(store.load("item", 3).lookup(np.arange(ROWS)), FIRST)


def test_a_new_folder_taken_for_abandoned_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making its folder and locking it, a publisher may lose it to one who cleans up; it makes another."""
    plain, taken = os.open, []

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if ".staging-" in str(path) and not taken:
            taken.append(path)
            os.rmdir(path)
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    assert store.publish("item", FIRST) == 3
    assert len(taken) == 1


def test_leaving_without_commit_leaves_nothing(store: Store) -> None:
    """An error while a version is prepared leaves the store as it was, byte for byte."""
    before, made = listing(store.root), store.read_version("item", 1)
    with pytest.raises(RuntimeError, match="never mind"), store.stage(made.manifest, made.arrays):
        raise RuntimeError("never mind")
    assert listing(store.root) == before


# ---- what a disk can refuse ------------------------------------------------------------------------------------------


def in_child(action: Callable[[], None]) -> str:
    """Run `action` in a process of its own; what it raised, as text (empty: nothing)."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # newer Pythons warn that threads of libraries do not live on; none is needed
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        text = ""
        try:
            action()
        except EmbstoreError as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("room", [0, 100, 1000, 2000, 4000])
@pytest.mark.parametrize("job", ["publish", "release"])
def test_a_full_disk_refuses_in_one_line(store: Store, job: str, room: int) -> None:
    """Wherever space runs out, in the arrays or in the manifest: StoreError, and the store is as it was."""
    made = Publication(FIRST, metrics={"note": "x" * 4000})

    def publish() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        if job == "release":
            store.publish_release({"item": made})
        else:
            store.publish("item", made.source, metrics=made.metrics)

    assert 2000 < (folder(store) / "arrays.safetensors").stat().st_size < 4000  # so both files are cut somewhere
    before = listing(store.root)
    said = in_child(publish)
    assert said.startswith("StoreError: writing to")
    assert said.endswith("failed: File too large")
    assert "\n" not in said
    assert listing(store.root) == before
    assert store.publish("item", FIRST) == 3


def test_a_folder_without_permission_refuses_in_one_line(store: Store) -> None:
    """Who may read and not write can load, and gets StoreError for the rest; nothing is left half done."""

    def without_rights(action: Callable[[Store], Any]) -> str:
        def act() -> None:
            os.chdir(store.root)
            if os.geteuid() == 0:  # whom no permission binds
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            action(open_store("."))

        return in_child(act)

    folders = [store.root, *(path for path in store.root.rglob("*") if path.is_dir())]
    before = listing(store.root)
    for path in folders:
        path.chmod(0o555)
    try:
        assert without_rights(lambda theirs: theirs.load("item")) == ""
        for attempt in (
            lambda theirs: theirs.publish("item", FIRST),
            lambda theirs: theirs.publish("user", FIRST),
            lambda theirs: theirs.set_label("item", "stable", 1),
            lambda theirs: theirs.write_release({"item": 1}),
        ):
            said = without_rights(attempt)
            assert re.fullmatch("StoreError: writing .* failed: Permission denied", said)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert listing(store.root) == before


def test_a_store_that_cannot_be_a_folder_refuses_in_one_line(tmp_path: Path) -> None:
    """Below a file there is no store, to read or to write."""
    (tmp_path / "file").write_text("not a folder")
    store = open_store(tmp_path / "file" / "store")
    for attempt in (store.tables, lambda: store.load("item"), lambda: store.publish("item", FIRST)):
        with pytest.raises(StoreError, match="failed: Not a directory") as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "not a folder"


@given(name=st.text(max_size=20), ref=st.text(max_size=20))
def test_no_name_at_all_can_crash_a_reader(name: str, ref: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is asked for, the answer is one of our errors."""
    store = open_store(tmp_path_factory.getbasetemp())
    with pytest.raises((ConfigError, TableNotFound)):
        store.load(name, ref)
    with pytest.raises(ReleaseNotFound):
        store.release(ref)


def test_a_store_that_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    """A trainer asks first: below a file there is no store, and asking leaves nothing behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"writing to .*file/store failed: File exists"):
        Store(tmp_path / "file/store").check_writable()
    Store(tmp_path / "new/store").check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
