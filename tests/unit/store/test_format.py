"""The store on disk: its layout, what is synced before it can be seen, how it is mapped."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import FIRST, SECOND, folder, listing

from embstore.errors import (
    VersionNotFound,
)
from embstore.publish.store import Store, open_store


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
