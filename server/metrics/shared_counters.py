"""Numbers that one process adds to and its siblings read: float64 cells in memory that outlives whoever writes it.

The memory is an anonymous shared mapping, made before the processes that use it are forked. Each process writes to
cells of its own and reads everybody's, so counting takes no lock and no system call, and a process killed in the
middle of anything leaves its counts behind for the one that takes its place.

    bytes used | record, record, ...          a record: key bytes, numbers | key, padded to 8 | numbers

Records are only ever appended. The bytes used are written last: a reader sees a record whole or not at all, and half
a record that a killed writer left is written over by the next.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Collection

import structlog

log = structlog.get_logger()
Key = tuple[str, tuple[str, ...]]
NUM_BYTES = 8 << 20
"""Room for about ten thousand tables; pages that nothing was written to take no memory."""
_START = 8
_HEAD = 8


class SharedCounters:
    """Numbers of one process that its siblings can read."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = mmap.mmap(-1, NUM_BYTES) if memory is None else memory
        self._bytes = memoryview(self._memory)
        whole = self._bytes[: len(self._bytes) // 8 * 8]
        self._used, self._sizes, self._numbers = whole.cast("Q"), whole.cast("I"), whole.cast("d")
        self._views: dict[Key, memoryview[float]] = {}
        self._spilled: dict[Key, memoryview[float]] = {}
        self._seen = _START
        self._lock = threading.Lock()

    def numbers(self, name: str, labels: tuple[str, ...] = (), size: int = 1) -> memoryview[float]:
        """The `size` numbers of a key, to read and to write; the same key has the same numbers, at first all zero.

        For the owner only. When the memory is full the numbers are this process's own and its siblings do not see them.
        """
        key = name, labels
        with self._lock:
            self._catch_up()
            view = self._views.get(key) or self._spilled.get(key) or self._append(key, size)
        if len(view) != size:
            raise ValueError(f"{name}{labels} has {len(view)} numbers, not {size}")
        return view

    def read(self) -> dict[Key, list[float]]:
        """Every key's numbers as they are now; for the owner and its siblings."""
        with self._lock:
            self._catch_up()
            return {key: list(view) for key, view in [*self._views.items(), *self._spilled.items()]}

    def reset(self, names: Collection[str]) -> None:
        """Set every number of these names to zero: gauges of a process that is gone.

        For the owner, or for whoever knows that there is none.
        """
        with self._lock:
            self._catch_up()
            for (name, _), view in [*self._views.items(), *self._spilled.items()]:
                if name in names:
                    view[:] = memoryview(bytes(view.nbytes)).cast("d")

    def _catch_up(self) -> None:
        """Know the records that were appended since the last look, by whoever owned the memory."""
        used = self._used[0]
        while self._seen < used:
            key_bytes, size = self._sizes[self._seen // 4], self._sizes[self._seen // 4 + 1]
            at = self._seen + _HEAD
            name, *labels = json.loads(bytes(self._bytes[at : at + key_bytes]))
            first = (at + _padded(key_bytes)) // 8
            self._views[name, tuple(labels)] = self._numbers[first : first + size]
            self._seen = 8 * (first + size)

    def _append(self, key: Key, size: int) -> memoryview[float]:
        """A new record, all zero, in the shared memory while there is room."""
        name = json.dumps([key[0], *key[1]]).encode()
        first = (self._seen + _HEAD + _padded(len(name))) // 8
        end = 8 * (first + size)
        if end > len(self._memory):
            if not self._spilled:
                log.error("memory for metrics is full; further series are not shared", series=key[0], labels=key[1])
            view = self._spilled[key] = memoryview(bytearray(8 * size)).cast("d")
            return view
        at = self._seen + _HEAD
        self._sizes[self._seen // 4], self._sizes[self._seen // 4 + 1] = len(name), size
        self._bytes[at : at + len(name)] = name
        self._bytes[8 * first : end] = bytes(8 * size)
        self._used[0] = end
        self._catch_up()
        return self._views[key]


def _padded(num_bytes: int) -> int:
    """Rounded up to whole numbers."""
    return (num_bytes + 7) // 8 * 8
