"""Regions of shared memory that clients on this machine register, for tensors of their requests and replies.

A region is a range of bytes of a shared memory object (`server.api.shared_objects`) under a name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

import msgspec

from embstore.common.atomic_files import entries, make_folder
from embstore.common.locks import locked
from embstore.errors import BadRequest, BodyTooLarge, Conflict, Forbidden, NotFound, Unprocessable
from server.api.places import Place
from server.api.shared_objects import SharedObject, Window
from server.http.auth import ApiKeys
from server.http.problems import clip

MAX_REGIONS = 256
"""Each is an open file in every worker that uses it."""
MAX_NAME_BYTES = 80


class Region(msgspec.Struct, frozen=True):
    """A registered region: `byte_size` bytes from `offset` on of the object `key`, which has this device and inode."""

    key: str
    offset: int
    byte_size: int
    identity: tuple[int, int]


class _Records(Protocol):
    """Regions by name, each as the text of its record."""

    def get(self, name: str) -> str | None:
        """The record of this name."""

    def add(self, name: str, record: str) -> bool:
        """Keep a record; False, and nothing done, where there is one of this name."""

    def remove(self, name: str) -> None:
        """Forget a record, if it is there."""

    def names(self) -> list[str]:
        """Names of all records."""

    def turn(self) -> AbstractContextManager[object]:
        """Held by one at a time, while it adds a record that depends on what others there are."""


class _OwnRecords(dict[str, str]):
    """Records of a process that serves alone."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = threading.Lock()

    def add(self, name: str, record: str) -> bool:
        if name in self:
            return False
        self[name] = record
        return True

    def remove(self, name: str) -> None:
        self.pop(name, None)

    def names(self) -> list[str]:
        return list(self)

    def turn(self) -> AbstractContextManager[object]:
        return self._turn


class _SharedRecords:
    """Records of processes that serve together: symbolic links in a folder of theirs, whose targets are the records.

    A link is made, read and removed in one call of the system, whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._prefix = f"{folder}/region-"  # so that no name is . or ..
        self._folder = folder

    def get(self, name: str) -> str | None:
        try:
            return os.readlink(self._prefix + quote(name, safe=""))
        except OSError:
            return None

    def add(self, name: str, record: str) -> bool:
        try:
            os.symlink(record, self._prefix + quote(name, safe=""))
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        Path(self._prefix + quote(name, safe="")).unlink(missing_ok=True)

    def names(self) -> list[str]:
        return [unquote(link.removeprefix("region-")) for link in entries(self._folder)]

    def turn(self) -> AbstractContextManager[object]:
        return locked(self._folder)


class Regions:
    """The regions that clients have registered; with a folder, the same in every process that has the folder."""

    def __init__(self, keys: ApiKeys, max_bytes: int, folder: Path | None = None) -> None:
        """max_bytes: of all regions together; 0: there is no shared memory here."""
        self._keys, self.max_bytes = keys, max_bytes
        self._records: _Records = _OwnRecords() if folder is None else _SharedRecords(folder / "shared_memory")
        self._open: dict[str, tuple[Region, SharedObject]] = {}
        """Regions that this process has used, by their records."""

    def check_caller(self, headers: Mapping[bytes, bytes]) -> None:
        """Forbidden unless shared memory is on and the call is from a program on this machine."""
        if not self.max_bytes:
            raise Forbidden("shared memory is off on this server (max_shared_memory_bytes is 0)")
        self._keys.check_local(headers)

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Name a range of bytes of a shared memory object; Conflict when the name is taken or there are too many."""
        if not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES or not name.isprintable():
            raise BadRequest(f"the name of a region has 1 to {MAX_NAME_BYTES} printable bytes, got {clip(name)}")
        if offset < 0 or byte_size < 1:
            given = clip(f"{offset} and {byte_size}")
            raise BadRequest(f"a region has an offset of 0 or more and 1 byte or more, got {given}")
        opened = SharedObject(key)
        if offset + byte_size > opened.num_bytes:
            raise Unprocessable(
                f"shared memory object {clip(key)} has {opened.num_bytes:,} bytes; the region ends at "
                + clip(f"{offset + byte_size:,}").strip("'")
            )
        region = Region(key, offset, byte_size, opened.identity)
        record = msgspec.json.encode(region).decode()
        with self._records.turn():
            self._check_room(byte_size)
            if not self._records.add(name, record):
                raise Conflict(f"shared memory region {clip(name)} is registered already: unregister it first")
            self._open[record] = region, opened

    def unregister(self, name: str | None = None) -> None:
        """Forget a region, where there is one of this name; None: all of them."""
        for one in [name] if name is not None else self._records.names():
            self._records.remove(one)
        self.sweep()

    def registered(self) -> dict[str, Region]:
        """Every region by its name."""
        records = [(name, self._records.get(name)) for name in self._records.names()]
        return {name: msgspec.json.decode(record, type=Region) for name, record in records if record is not None}

    def find(self, place: Place, what: str) -> Window:
        """Where a tensor is; NotFound or BadRequest when its region is unknown or ends earlier."""
        record = self._records.get(place.region)
        if record is None:
            raise NotFound(f"{what}: no shared memory region named {clip(place.region)}")
        region, opened = self._open.get(record) or self._reopen(record)
        if place.offset + place.num_bytes > region.byte_size:
            raise BadRequest(
                f"{what}: bytes {place.offset:,} to {place.offset + place.num_bytes:,} are outside region "
                f"{clip(place.region)}, which has {region.byte_size:,}"
            )
        return Window(what, opened, region.offset + place.offset, place.num_bytes)

    def sweep(self) -> None:
        """Let go of what is registered no longer, by whichever process that was ended."""
        used = set(self._open)  # first, since what is being registered gets its record before it is used
        if used:
            for record in used - {self._records.get(name) for name in self._records.names()}:
                self._open.pop(record, None)

    def _reopen(self, record: str) -> tuple[Region, SharedObject]:
        """Open a region that another process has registered."""
        region = msgspec.json.decode(record, type=Region)
        opened = SharedObject(region.key)
        if opened.identity != region.identity:
            raise Conflict(f"shared memory object {clip(region.key)} is another than when it was registered")
        return self._open.setdefault(record, (region, opened))

    def _check_room(self, byte_size: int) -> None:
        """Conflict when there are as many regions or bytes as there may be."""
        regions = self.registered().values()
        if len(regions) >= MAX_REGIONS:
            raise Conflict(f"{MAX_REGIONS} shared memory regions are registered, which is the limit")
        num_bytes = sum(region.byte_size for region in regions) + byte_size
        if num_bytes > self.max_bytes:
            raise Conflict(
                f"shared memory regions would have {num_bytes:,} bytes together; the limit is {self.max_bytes:,} "
                "(max_shared_memory_bytes)"
            )


class Access:
    """What one request does with shared memory: its caller is checked, and how much it reads."""

    def __init__(self, regions: Regions, headers: Mapping[bytes, bytes], max_bytes: int) -> None:
        """max_bytes: that its inputs may have together."""
        self._regions, self._headers, self._max_bytes = regions, headers, max_bytes
        self._num_left, self._checked = max_bytes, False

    def read(self, place: Place, what: str) -> bytes:
        """The bytes of an input."""
        window = self.find(place, what)
        self._num_left -= place.num_bytes
        if self._num_left < 0:
            limit = self._max_bytes
            raise BodyTooLarge(f"the inputs have more than {limit:,} bytes; that is the limit of a body", limit=limit)
        return window.read()

    def find(self, place: Place, what: str) -> Window:
        """Where an output goes."""
        if not self._checked:
            self._regions.check_caller(self._headers)
            self._checked = True
        return self._regions.find(place, what)
