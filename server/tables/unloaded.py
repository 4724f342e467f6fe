"""Tables that were taken out of service, known to every process that serves together.

One small file in a folder of the group: a process that unloads a table writes it, the others read it at their next
look at the store. The folder begins empty with the group, so that a restart serves everything again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from embstore.common.atomic_files import make_folder, read_json, write_json
from embstore.common.locks import locked

_FILE = "unloaded.json"


class UnloadedTables:
    """Names of tables that are not to be served; with a folder, the same set in every process that has the folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._own = folder, frozenset[str]()
        self._turn = threading.Lock()

    def read(self) -> Set[str]:
        """The names as they are now; StoreError or VerificationFailed when the file cannot be read."""
        if self._folder is not None:
            self._own = frozenset((read_json(self._folder / _FILE) or {}).get("tables", ()))
        return self._own

    def add(self, name: str) -> None:
        """Serve this table no longer."""
        with self._changing():
            self._write(self.read() | {name})

    def discard(self, name: str) -> None:
        """Serve this table again."""
        with self._changing():
            self._write(self.read() - {name})

    def _write(self, names: Set[str]) -> None:
        if self._folder is not None:
            write_json(self._folder / _FILE, {"tables": sorted(names)}, replace=True)
        self._own = frozenset(names)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One thread and process at a time."""
        with self._turn:
            if self._folder is None:
                yield
                return
            make_folder(self._folder)
            with locked(self._folder):
                yield
