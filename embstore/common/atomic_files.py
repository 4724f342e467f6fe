"""Folders and small files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embstore.common.locks import release_lock, take_lock
from embstore.errors import StoreError, VerificationFailed

NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_STAGING = ".staging-"


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden, locked folder to write in, gone afterwards; first, what killed publishers left is removed."""
    make_folder(folder)
    _remove_abandoned(folder)
    path = folder / f"{_STAGING}{uuid.uuid4().hex}"
    lock = _make_locked(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        release_lock(lock)


def _make_locked(path: Path) -> int:
    """Create a folder and hold an exclusive lock on it; the lock ends with the process, however it ends."""
    while True:
        path.mkdir()
        with suppress(FileNotFoundError):
            lock = take_lock(path)
            if path.exists():  # nobody took it for abandoned between the calls
                return lock
            release_lock(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove staging folders whose publisher is gone: nobody holds their lock."""
    for name in entries(folder):
        if not name.startswith(_STAGING):
            continue
        with suppress(OSError):
            lock = take_lock(folder / name, wait=False)
            shutil.rmtree(folder / name, ignore_errors=True)
            release_lock(lock)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and sync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any], *, replace: bool) -> bool:
    """Write a small file atomically; False, and nothing done, when it is there and may not be replaced."""
    with storing(f"writing {path}"), staging(path.parent) as folder:
        temporary = folder / path.name
        write_bytes(temporary, json.dumps(value, sort_keys=True).encode() + b"\n")
        if replace:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        sync_folder(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is no file."""
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise store_error(error, f"reading {path}") from error
    return raw


def make_folder(path: Path) -> None:
    """Create a folder and those above it that are missing, each synced into the one above it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files behind them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise store_error(error, f"reading {folder}") from error


def numbered(folder: Path, suffix: str = "") -> list[int]:
    """The entries of a folder that are numbers before `suffix`, ascending."""
    names = [name.removesuffix(suffix) for name in entries(folder) if name.endswith(suffix)]
    return sorted(int(name) for name in names if NUMBER.fullmatch(name))


def store_error(error: OSError, doing: str) -> StoreError:
    """The readable form of an OSError."""
    return StoreError(f"{doing} failed: {error.strerror or error}")


@contextmanager
def storing(doing: str) -> Iterator[None]:
    """OSErrors become one readable StoreError."""
    try:
        yield
    except OSError as error:
        raise store_error(error, doing) from error
