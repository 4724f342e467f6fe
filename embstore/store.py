"""The store on local disk: immutable numbered versions, labels that move, releases that name versions together.

    <store>/tables/<table>/versions/<n>/manifest.json, arrays.safetensors
                          /labels/<label>.json
           /releases/<id>.json

A version is written into a hidden folder, synced file by file, the manifest last, and then renamed to its number:
readers see all of it or nothing. Two publishers who want the same number cannot both rename to it; the second takes
the next. A publisher holds a lock on its hidden folder, so what a killed one left behind is recognised and removed.
This file knows bytes, digests and names; it imports neither torch nor the schemes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from embstore.arrays import map_file, read_arrays, write_arrays
from embstore.errors import (
    ConfigError,
    LabelNotFound,
    ReleaseNotFound,
    StoreError,
    TableNotFound,
    VerificationFailed,
    VersionNotFound,
)
from embstore.manifest import FileEntry, Manifest

LATEST = "latest"
ARRAYS_FILE = "arrays.safetensors"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_STAGING = ".staging-"


@dataclass(frozen=True)
class Label:
    """Where a label points, and the release it was moved with (None: it was moved alone)."""

    version: int
    release: str | None
    moved: str


@dataclass(frozen=True)
class Release:
    """Versions of several tables that belong together."""

    id: str
    tables: dict[str, int]
    created: str


@dataclass(frozen=True)
class StoredVersion:
    """A version's manifest and its arrays, mapped from disk."""

    manifest: Manifest
    arrays: dict[str, NDArray[Any]]


def check_name(kind: str, name: str) -> str:
    """`name` if it can be a table's or label's name; ConfigError says what can."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is not allowed: up to 128 letters, digits, '_', '.' and '-', "
            "beginning with a letter or digit"
        )
    return name


def now() -> str:
    """This moment in UTC, as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class FileStore:
    """A store in a folder of the local disk."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if "://" in os.fspath(root):
            raise ConfigError(f"{os.fspath(root)!r}: object storage is not supported yet, give a folder")
        self.root = Path(root).expanduser()

    # ---- reading ----------------------------------------------------------------------------------------------

    def tables(self) -> list[str]:
        """Names of the tables that have at least one version."""
        return [name for name in _names(self.root / "tables") if self.versions(name)]

    def versions(self, table: str) -> list[int]:
        """Numbers of the complete versions of a table, ascending; empty for an unknown table."""
        folder = self._versions(table)
        numbers = [int(name) for name in _names(folder) if name.isdecimal()]
        return sorted(n for n in numbers if (folder / str(n) / MANIFEST_FILE).is_file())

    def labels(self, table: str) -> dict[str, Label]:
        """Every label of a table."""
        folder = self.root / "tables" / check_name("table", table) / "labels"
        files = [name for name in _names(folder) if name.endswith(".json")]
        return {name.removesuffix(".json"): self._label(folder / name) for name in files}

    def resolve(self, table: str, ref: int | str = LATEST) -> int:
        """The version a number or label means; VersionNotFound, LabelNotFound or TableNotFound otherwise."""
        versions = self.versions(table)
        if not versions:
            raise TableNotFound(table)
        if isinstance(ref, int) or ref.isdecimal():
            if int(ref) not in versions:
                raise VersionNotFound(table, int(ref), f"; it has {_listed(versions)}")
            return int(ref)
        labels = self.labels(table)
        if ref not in labels:
            raise LabelNotFound(table, ref, f"; it has {_listed(sorted(labels))}")
        return labels[ref].version

    def manifest(self, table: str, version: int) -> Manifest:
        """The manifest of a version; VersionNotFound, or VerificationFailed when it cannot be trusted."""
        path = self._versions(table) / str(version) / MANIFEST_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise VersionNotFound(table, version) from None
        except OSError as error:
            raise _store_error(error, f"reading {path}") from error
        manifest = Manifest.from_json(data, f"table {table!r} version {version}")
        if (manifest.table, manifest.version) != (table, version):
            raise VerificationFailed(
                f"the manifest of {table!r} version {version} speaks of {manifest.table!r} version {manifest.version}"
            )
        return manifest

    def read_version(self, table: str, version: int, *, verify: bool = True) -> StoredVersion:
        """Map a version's arrays; VerificationFailed when a file is missing, short or has another digest."""
        manifest = self.manifest(table, version)
        folder = self._versions(table) / str(version)
        arrays: dict[str, NDArray[Any]] = {}
        for entry in manifest.files:
            source = f"table {table!r} version {version}: {entry.name}"
            try:
                data = map_file(folder / entry.name)
            except OSError as error:
                raise VerificationFailed(f"{source}: {error.strerror}") from error
            if len(data) != entry.num_bytes:
                raise VerificationFailed(f"{source} has {len(data):,} bytes, the manifest says {entry.num_bytes:,}")
            if verify and hashlib.sha256(data).hexdigest() != entry.sha256:
                raise VerificationFailed(f"{source} does not have the SHA-256 that the manifest states")
            arrays |= read_arrays(data, source)
        return StoredVersion(manifest, arrays)

    def releases(self) -> list[Release]:
        """Every release, oldest first."""
        names = [name.removesuffix(".json") for name in _names(self.root / "releases") if name.endswith(".json")]
        return [self.release(name) for name in sorted((n for n in names if n.isdecimal()), key=int)]

    def release(self, release: str) -> Release:
        """A release by its id."""
        if not release.isdecimal():
            raise ReleaseNotFound(release)
        raw = _read_json(self.root / "releases" / f"{release}.json", ReleaseNotFound(release))
        return Release(release, {str(t): int(v) for t, v in raw["tables"].items()}, str(raw["created"]))

    # ---- writing ----------------------------------------------------------------------------------------------

    def stage(self, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> StagedVersion:
        """Write and sync a version's arrays where no reader looks; `commit` makes it a version."""
        return StagedVersion(self._versions(manifest.table), manifest, arrays)

    def set_label(self, table: str, label: str, version: int, *, release: str | None = None) -> None:
        """Point a label at an existing version, atomically."""
        check_name("label", label)
        if label.isdecimal():
            raise ConfigError(f"a label cannot be a number, got {label!r}")
        if version not in (versions := self.versions(table)):
            if not versions:
                raise TableNotFound(table)
            raise VersionNotFound(table, version, f"; it has {_listed(versions)}")
        folder = self.root / "tables" / table / "labels"
        _write_json(folder / f"{label}.json", {"version": version, "release": release, "moved": now()}, replace=True)

    def write_release(self, tables: Mapping[str, int]) -> Release:
        """Record that these versions belong together; ids count up from 1."""
        for table, version in tables.items():
            self.manifest(table, version)
        created, number = now(), max([int(r.id) for r in self.releases()], default=0) + 1
        while True:
            path = self.root / "releases" / f"{number}.json"
            if _write_json(path, {"tables": dict(tables), "created": created}, replace=False):
                return Release(str(number), dict(tables), created)
            number += 1

    # ---- helpers ----------------------------------------------------------------------------------------------

    def _versions(self, table: str) -> Path:
        return self.root / "tables" / check_name("table", table) / "versions"

    @staticmethod
    def _label(path: Path) -> Label:
        raw = _read_json(path, StoreError(f"label file {path} vanished"))
        try:
            return Label(int(raw["version"]), raw.get("release"), str(raw.get("moved", "")))
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationFailed(f"{path}: not a valid label file") from error


class StagedVersion:
    """A version on its way: complete on disk except for its manifest and its number. A context manager.

    Leaving the context without `commit` removes every trace; after a kill, the next publisher does.
    """

    def __init__(self, folder: Path, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.folder, self.draft = folder, manifest
        self.path = folder / f"{_STAGING}{uuid.uuid4().hex}"
        with _storing(f"writing to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            self._lock = _make_locked(self.path)
        try:
            with _storing(f"writing to {self.path.parent}"):
                self.files = [_write_file(self.path / ARRAYS_FILE, arrays)]
        except BaseException:
            self.discard()
            raise

    def commit(self) -> int:
        """Give the version its number and make it visible, by one rename; returns the number."""
        with _storing(f"writing to {self.folder}"):
            number = max((int(n) for n in _names(self.folder) if n.isdecimal()), default=0)
            while True:
                number += 1
                manifest = replace(self.draft, version=number, files=self.files)
                _write_bytes(self.path / MANIFEST_FILE, manifest.to_json())
                _sync_folder(self.path)
                try:
                    self.path.rename(self.folder / str(number))
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            _sync_folder(self.folder)
            os.close(self._lock)
        return number

    def discard(self) -> None:
        """Remove what was written; nothing to do after `commit`."""
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _make_locked(path: Path) -> int:
    """Create a folder and hold an exclusive lock on it; the lock ends with the process, however it ends."""
    while True:
        path.mkdir()
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # nobody took it for abandoned between the two calls
            return lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove staging folders whose publisher is gone: nobody holds their lock."""
    for name in _names(folder):
        if not name.startswith(_STAGING):
            continue
        with suppress(OSError):
            lock = os.open(folder / name, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder / name, ignore_errors=True)
            finally:
                os.close(lock)


class _Digesting:
    """A binary file that keeps the SHA-256 and the size of what is written to it."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return int(self.file.write(data))


def _write_file(path: Path, arrays: Mapping[str, NDArray[Any]]) -> FileEntry:
    with path.open("xb") as file:
        digesting = _Digesting(file)
        write_arrays(digesting, arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(name=path.name, num_bytes=digesting.num_bytes, sha256=digesting.sha256.hexdigest())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any], *, replace: bool) -> bool:
    """Write a small file atomically; False, and nothing done, when it is there and may not be replaced."""
    with _storing(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            _write_bytes(temporary, json.dumps(value, sort_keys=True).encode() + b"\n")
            if replace:
                temporary.replace(path)
            else:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _read_json(path: Path, missing: Exception) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise missing from None
    except ValueError as error:
        raise VerificationFailed(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise _store_error(error, f"reading {path}") from error
    return raw


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _store_error(error, f"reading {folder}") from error


def _listed(values: list[Any]) -> str:
    text = ", ".join(str(value) for value in values[-8:])
    return f"..., {text}" if len(values) > 8 else text or "none"


def _store_error(error: OSError, doing: str) -> StoreError:
    return StoreError(f"{doing} failed: {error.strerror or error}")


@contextmanager
def _storing(doing: str) -> Iterator[None]:
    """OSErrors become one readable StoreError."""
    try:
        yield
    except OSError as error:
        raise _store_error(error, doing) from error
