"""The store on local disk: immutable numbered versions, labels that move, releases that name versions together.

    <store>/tables/<table>/versions/<n>/manifest.json, arrays.safetensors
                          /labels/<label>.json
           /releases/<id>.json

A version is written into a hidden folder, synced file by file, the manifest last, and then renamed to its number:
readers see all of it or nothing. A publisher holds a lock on its hidden folder, so what a killed one left behind is
recognised and removed. Numbers are given and labels moved in turns (a lock on the store's folder, held for moments),
so both only grow; where that lock does not bind, two publishers still cannot both rename to one number.
This file knows bytes, digests and names; it imports neither torch nor the schemes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from embstore.common.atomic_files import (
    NUMBER,
    entries,
    make_folder,
    numbered,
    read_json,
    staging,
    store_error,
    storing,
    write_json,
)
from embstore.common.locks import locked
from embstore.errors import (
    ConfigError,
    LabelNotFound,
    NotFound,
    ReleaseNotFound,
    TableNotFound,
    VerificationFailed,
    VersionNotFound,
)
from embstore.store.labels import Label, in_effect, positive
from embstore.store.manifest import Manifest
from embstore.store.staged import MANIFEST_FILE, StagedVersion
from embstore.store.tensor_file import map_file, read_arrays

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_OBJECT_STORAGE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path has already joined the two


@dataclass(frozen=True)
class Release:
    """Versions of several tables that belong together."""

    id: str
    tables: dict[str, int]
    created: str


@dataclass(frozen=True)
class Survey:
    """A store at one look: versions and labels of every table, releases, and what could not be read.

    unread: labels that are there but damaged. damaged: one line for each damaged file.
    """

    versions: dict[str, list[int]]
    labels: dict[tuple[str, str], Label]
    releases: dict[str, Release]
    unread: set[tuple[str, str]]
    damaged: list[str]


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


def check_label(label: str) -> str:
    """`label` if it can be a label's name, which no number can; ConfigError otherwise."""
    if check_name("label", label).isdecimal():
        raise ConfigError(f"a label cannot be a number, got {label!r}")
    return label


def now(precision: str = "milliseconds") -> str:
    """This moment in UTC, as manifests and labels write it."""
    return datetime.now(UTC).isoformat(timespec=precision)


class FileStore:
    """A store in a folder of the local disk."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if _OBJECT_STORAGE.match(os.fspath(root)):
            raise ConfigError(f"{os.fspath(root)!r}: object storage is not supported yet, give a folder")
        self.root = Path(root).expanduser()
        self._releases: dict[str, Release] = {}  # immutable once written, so each is read once

    # ---- reading ----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the folder is there; StoreError when the disk does not say."""
        with storing(f"reading {self.root}"):
            try:
                self.root.stat()
            except FileNotFoundError:
                return False
        return True

    def tables(self) -> list[str]:
        """Names of the tables that have at least one version."""
        folder = self.root / "tables"
        names = [name for name in entries(folder) if _NAME.fullmatch(name) and (folder / name).is_dir()]
        return [name for name in names if self.versions(name)]

    def versions(self, table: str) -> list[int]:
        """Numbers of the complete versions of a table, ascending; empty for an unknown table."""
        folder = self._versions(table)
        return [number for number in numbered(folder) if (folder / str(number) / MANIFEST_FILE).is_file()]

    def labels(self, table: str) -> dict[str, Label]:
        """Every label of a table. Labels that a release moves stay where they were until the last of them has moved."""
        return {name: label for name in self._label_names(table) if (label := self._label_in_effect(table, name))}

    def survey(self) -> Survey:
        """Everything but the manifests, each file read once; damaged ones are told apart, not raised."""
        versions = {table: self.versions(table) for table in self.tables()}
        damaged: list[str] = []
        raw: dict[tuple[str, str], Label | None] = {}
        unread: set[tuple[str, str]] = set()
        for table in versions:
            for label in self._label_names(table):
                try:
                    raw[table, label] = self._label(table, label)
                except VerificationFailed as error:
                    unread.add((table, label))
                    damaged.append(str(error))
        releases: dict[str, Release] = {}
        for number in numbered(self.root / "releases", ".json"):  # after the labels, which are written after them
            try:
                releases[str(number)] = self.release(str(number))
            except (VerificationFailed, ReleaseNotFound) as error:
                damaged.append(str(error))
        labels = {}
        for (table, label), at in raw.items():
            peers = releases[at.release].tables if at and at.release in releases else ()
            if at and (effective := in_effect(at, [raw.get((peer, label)) for peer in peers])):
                labels[table, label] = effective
        return Survey(versions, labels, releases, unread, damaged)

    def resolve(self, table: str, ref: int | str = LATEST) -> int:
        """The version a number or label means; VersionNotFound, LabelNotFound or TableNotFound otherwise."""
        versions = self._known(table)
        if not isinstance(ref, str) or NUMBER.fullmatch(ref):
            if int(ref) not in versions:
                raise VersionNotFound(table, int(ref), f"; it has {_listed(versions)}")
            return int(ref)
        label = self._label_in_effect(table, ref) if _NAME.fullmatch(ref) else None
        if label is None:
            raise LabelNotFound(table, ref, f"; it has {_listed(sorted(self.labels(table)))}")
        return label.version

    def labelled(self, table: str, label: str) -> Manifest | None:
        """The manifest of the version that a label points at; None where there is none, or none that can be read."""
        try:
            return self.manifest(table, self.resolve(table, label))
        except (NotFound, VerificationFailed):
            return None

    def manifest(self, table: str, version: int) -> Manifest:
        """The manifest of a version; VersionNotFound, or VerificationFailed when it cannot be trusted."""
        path = self._versions(table) / str(version) / MANIFEST_FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise VersionNotFound(table, version) from None
        except OSError as error:
            raise store_error(error, f"reading {path}") from error
        manifest = Manifest.from_json(data, f"table {table!r} version {version}")
        if (manifest.table, manifest.version) != (table, version):
            raise VerificationFailed(
                f"manifest mismatch: directory is {table!r} version {version}, "
                f"manifest says {manifest.table!r} version {manifest.version}"
            )
        return manifest

    def read_version(self, table: str, version: int, *, verify: bool = True) -> StoredVersion:
        """Map a version's arrays; VerificationFailed when a file is missing, short or has another digest.

        StoreError when a file is there and the disk does not give it: that may pass.
        """
        manifest = self.manifest(table, version)
        folder = self._versions(table) / str(version)
        arrays: dict[str, NDArray[Any]] = {}
        for entry in manifest.files:
            source = f"table {table!r} version {version}: {entry.name}"
            try:
                data = map_file(folder / entry.name)
            except FileNotFoundError as error:
                raise VerificationFailed(f"{source}: {error.strerror}") from error
            except OSError as error:
                raise store_error(error, f"reading {source}") from error
            if len(data) != entry.num_bytes:
                raise VerificationFailed(f"{source} has {len(data):,} bytes, the manifest says {entry.num_bytes:,}")
            if verify and hashlib.sha256(data).hexdigest() != entry.sha256:
                raise VerificationFailed(f"{source} does not have the SHA-256 that the manifest states")
            arrays |= read_arrays(data, source)
        return StoredVersion(manifest, arrays)

    def releases(self) -> list[Release]:
        """Every release, oldest first."""
        return [self.release(str(number)) for number in numbered(self.root / "releases", ".json")]

    def release(self, release: str) -> Release:
        """A release by its id."""
        found = self._release(release) if NUMBER.fullmatch(release) else None
        if found is None:
            raise ReleaseNotFound(release, f"; there are {_listed(numbered(self.root / 'releases', '.json'))}")
        return found

    # ---- writing ----------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """StoreError unless a store can be written here: for asking before long work. Leaves nothing behind."""
        with storing(f"writing to {self.root}"):
            folder = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
            with staging(folder):
                pass

    def stage(self, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> StagedVersion:
        """Write and sync a version's arrays where no reader looks; `commit` makes it a version."""
        return StagedVersion(self._versions(manifest.table), manifest, arrays)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for, and hold, the right to give numbers and move labels; it ends with the process, however it ends."""
        with storing(f"writing to {self.root}"):
            make_folder(self.root)
        with locked(self.root):
            yield

    def set_label(self, table: str, label: str, version: int, *, release: str | None = None) -> None:
        """Point a label at an existing version, atomically."""
        check_label(label)
        if version not in (versions := self._known(table)):
            raise VersionNotFound(table, version, f"; it has {_listed(versions)}")
        try:
            before = self._label_in_effect(table, label)
        except VerificationFailed:  # damaged: about to be replaced
            before = None
        moved = now("microseconds")
        at = before.to(version, release, moved) if before else Label(version, release, moved)
        write_json(self._labels(table) / f"{label}.json", at.to_json(), replace=True)

    def write_release(self, tables: Mapping[str, int]) -> Release:
        """Record that these versions belong together; ids count up from 1."""
        for table, version in tables.items():
            self.manifest(table, version)
        created, number = now(), max(numbered(self.root / "releases", ".json"), default=0) + 1
        while True:
            path = self.root / "releases" / f"{number}.json"
            if write_json(path, {"tables": dict(tables), "created": created}, replace=False):
                return Release(str(number), dict(tables), created)
            number += 1

    # ---- helpers ----------------------------------------------------------------------------------------------

    def _versions(self, table: str) -> Path:
        return self.root / "tables" / check_name("table", table) / "versions"

    def _labels(self, table: str) -> Path:
        return self.root / "tables" / check_name("table", table) / "labels"

    def _label_names(self, table: str) -> list[str]:
        names = [name.removesuffix(".json") for name in entries(self._labels(table)) if name.endswith(".json")]
        return [name for name in names if _NAME.fullmatch(name)]

    def _known(self, table: str) -> list[int]:
        """The versions of a table that has some; TableNotFound lists the tables there are."""
        versions = self.versions(table)
        if not versions:
            raise TableNotFound(table, f"in the store {self.root.absolute()}; it has {_listed(self.tables())}")
        return versions

    def _release(self, release: str) -> Release | None:
        if release in self._releases:
            return self._releases[release]
        path = self.root / "releases" / f"{release}.json"
        if (raw := read_json(path)) is None:
            return None
        try:
            tables = {table: positive(version) for table, version in raw["tables"].items()}
            return self._releases.setdefault(release, Release(release, tables, str(raw["created"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise VerificationFailed(f"{path}: not a valid release file") from error

    def _label(self, table: str, label: str) -> Label | None:
        """A label as its file has it."""
        path = self._labels(table) / f"{label}.json"
        if (raw := read_json(path)) is None:
            return None
        try:
            return Label.from_json(raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VerificationFailed(f"{path}: not a valid label file") from error

    def _label_in_effect(self, table: str, label: str) -> Label | None:
        """Where a label counts as pointing."""
        at = self._label(table, label)
        release = self._release(at.release) if at and at.release else None
        return in_effect(at, [self._label(peer, label) for peer in release.tables]) if at and release else at


def _listed(values: list[Any]) -> str:
    text = ", ".join(str(value) for value in values[-8:])
    return f"..., {text}" if len(values) > 8 else text or "none"
