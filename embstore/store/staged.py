"""A version on its way: written and synced where no reader looks, and made visible by one rename."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from embstore.common.atomic_files import numbered, staging, storing, sync_folder, write_bytes
from embstore.store.manifest import FileEntry, Manifest
from embstore.store.tensor_file import write_arrays

ARRAYS_FILE = "arrays.safetensors"
MANIFEST_FILE = "manifest.json"


class StagedVersion:
    """A version on its way: complete on disk except for its manifest and its number. A context manager.

    Leaving the context without `commit` removes every trace; after a kill, the next publisher does.
    """

    def __init__(self, folder: Path, manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.folder, self.draft = folder, manifest
        with storing(f"writing to {folder}"), ExitStack() as stack:
            self.path = stack.enter_context(staging(folder))
            self.files = [_write_file(self.path / ARRAYS_FILE, arrays)]
            self._stack = stack.pop_all()

    def commit(self) -> int:
        """Give the version its number and make it visible, by one rename; returns the number."""
        with storing(f"writing to {self.folder}"):
            number = max(numbered(self.folder), default=0)
            while True:
                number += 1
                manifest = replace(self.draft, version=number, files=self.files)
                write_bytes(self.path / MANIFEST_FILE, manifest.to_json())
                sync_folder(self.path)
                try:
                    self.path.rename(self.folder / str(number))
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            sync_folder(self.folder)
        return number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


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
