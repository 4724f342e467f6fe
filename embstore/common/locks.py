"""Exclusive locks between processes: `flock` on a file or folder, which ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embstore.errors import StoreError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock on a file or folder that exists, and hold it; StoreError when the disk gives none."""
    try:
        lock = take_lock(path)
    except OSError as error:
        raise StoreError(f"locking {path} failed: {error.strerror or error}") from error
    try:
        yield
    finally:
        release_lock(lock)


def take_lock(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, wait: bool = True) -> int:
    """Open a file or folder and lock it; the descriptor is for `release_lock`.

    OSError when it cannot be opened or locked; BlockingIOError when another holds the lock and `wait` is False.
    """
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def release_lock(descriptor: int) -> None:
    """Unlock and close; closing alone would not do: a process forked meanwhile has the file open too."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
