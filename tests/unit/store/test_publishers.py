"""Publishers beside each other, killed, without space and without permission."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import FIRST, ROWS, folder, listing

from embstore.errors import (
    EmbstoreError,
    StoreError,
)
from embstore.publish.publication import Publication
from embstore.publish.store import Store, open_store
from embstore.store import staged as staged_module

pytestmark = pytest.mark.slow

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
        patch.setattr(staged_module, "numbered", lambda *_: [])
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
    """A disk that fills up, in the arrays or in the manifest, is a StoreError, and the store is as it was."""
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


def test_a_store_that_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    """A trainer asks first: below a file there is no store, and asking leaves nothing behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"writing to .*file/store failed: File exists"):
        Store(tmp_path / "file/store").check_writable()
    Store(tmp_path / "new/store").check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
