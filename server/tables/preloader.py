"""Read and digest the versions that will be served first, while the process is still importing what serves them."""

from __future__ import annotations

import threading
from pathlib import Path

from embstore.errors import EmbstoreError
from embstore.store.local import LATEST, FileStore, StoredVersion


class Preloader:
    """Versions already mapped and verified, each to be taken once; knows neither torch nor the schemes."""

    def __init__(self, store: Path) -> None:
        self._store = FileStore(store)
        self._ready: dict[tuple[str, int], StoredVersion] = {}
        self._thread = threading.Thread(target=self._read, name="preloader", daemon=True)
        self._thread.start()

    def take(self, table: str, version: int) -> StoredVersion | None:
        """A verified version, or None: then read it yourself, and hear what is wrong with it. Waits for the thread."""
        self._thread.join()
        return self._ready.pop((table, version), None)

    def _read(self) -> None:
        try:
            for table in self._store.tables():
                at = self._store.labels(table).get(LATEST)
                if at is not None:
                    self._ready[table, at.version] = self._store.read_version(table, at.version)
        except EmbstoreError:
            return  # whoever loads this version next meets the same error and reports it
