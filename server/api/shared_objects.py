"""POSIX shared memory objects of clients, read and written by calls that cannot kill the server.

On Linux such an object is a file directly in /dev/shm. It is never mapped: its owner may truncate it at any moment, and
touching a mapping behind the end kills a process (SIGBUS). `os.pread` and `os.pwrite` say how much there was.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from embstore.errors import BadRequest, EmbstoreError, NotFound, Unprocessable
from server.api.places import BYTE_SIZE
from server.http.messages import Buffer
from server.http.problems import clip

FOLDER = Path("/dev/shm")
MAX_KEY_BYTES = 255
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SharedObject:
    """An open shared memory object, closed when nothing refers to it: regions and requests under way do."""

    __slots__ = ("fd", "identity", "num_bytes")

    def __init__(self, key: str) -> None:
        """NotFound, BadRequest or Unprocessable when there is no such object that can be read and written."""
        self.fd = -1
        name = key.lstrip("/")  # as shm_open does
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise BadRequest(f"key {clip(key)} names no shared memory object: it is one name, with or without a slash")
        try:
            if len(os.fsencode(key)) > MAX_KEY_BYTES:
                raise BadRequest(f"key {clip(key)} has more than {MAX_KEY_BYTES} bytes")
            self.fd = os.open(FOLDER / name, _FLAGS)
        except FileNotFoundError as error:
            raise NotFound(f"there is no shared memory object {clip(key)} on this machine") from error
        except (OSError, UnicodeEncodeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise Unprocessable(f"shared memory object {clip(key)} cannot be opened: {reason}") from error
        about = os.fstat(self.fd)
        if not stat.S_ISREG(about.st_mode):
            raise Unprocessable(f"{clip(key)} is not a shared memory object")
        self.identity, self.num_bytes = (about.st_dev, about.st_ino), about.st_size

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Window(NamedTuple):
    """A range of bytes of an open object, for one tensor of one request."""

    what: str
    object: SharedObject
    start: int
    num_bytes: int

    def read(self) -> bytes:
        """A copy of all of it, aligned; Unprocessable when the object ends earlier by now."""
        data = os.pread(self.object.fd, self.num_bytes, self.start)
        if len(data) < self.num_bytes:
            raise self._truncated()
        return data

    def check_room(self, num_bytes: int) -> None:
        """Unprocessable unless so many bytes can be written."""
        if num_bytes > self.num_bytes:
            raise Unprocessable(f"{self.what} takes {num_bytes:,} bytes; {BYTE_SIZE} is {self.num_bytes:,}")
        if num_bytes and not os.pread(self.object.fd, 1, self.start + num_bytes - 1):  # writing would lengthen it
            raise self._truncated()

    def write(self, data: Buffer) -> None:
        """Put a tensor at the start."""
        left, at = memoryview(data), self.start
        try:
            while left:
                num_written = os.pwrite(self.object.fd, left, at)
                left, at = left[num_written:], at + num_written
        except OSError as error:
            raise Unprocessable(f"{self.what} cannot be written to shared memory: {error.strerror}") from error

    def _truncated(self) -> EmbstoreError:
        return Unprocessable(f"{self.what}: its shared memory object was truncated since it was registered")


def write_all(tensors: Iterable[tuple[Window, Buffer]]) -> None:
    """Write outputs, none of them when one does not fit."""
    tensors = list(tensors)
    for window, data in tensors:
        window.check_room(len(data))
    for window, data in tensors:
        window.write(data)


def check_apart(windows: Iterable[Window]) -> None:
    """BadRequest when outputs would overwrite each other."""
    placed = sorted((w.object.identity, w.start, w.start + w.num_bytes, w.what) for w in windows if w.num_bytes)
    for (identity, _, end, what), (other, start, _, another) in pairwise(placed):
        if identity == other and start < end:
            raise BadRequest(f"{what} and {another} overlap in shared memory")
