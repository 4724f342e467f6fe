"""Compile a loop for fixed signatures, once: the machine code is kept on disk where there is a place for it.

`compiled` compiles when its file is imported. `Kernel` waits for the first table of a storage dtype: there are five
of them, and few processes see more than one. A server sees all its tables' before it is ready, because loading a
table looks its golden ids up.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from numba import njit, types
from numba.core.errors import NumbaError

from embstore.common.locks import release_lock, take_lock

log = logging.getLogger(__name__)
_LOCK = threading.Lock()
_STORED_AS = {"f": types.float32, "h": types.int16, "H": types.uint16, "B": types.uint8, "b": types.int8}
"""numpy's character of a table's dtype -> what its elements are to numba; see embstore/quantize.py."""


def compiled(*signatures: Any, nogil: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the loop compiled for these signatures, without the GIL; division by zero is the caller's to avoid.

    numba keeps the code beside the source, or in NUMBA_CACHE_DIR, or in the user's cache. Where none of them can be
    written (a read-only container) every process compiles for itself, a second or so a loop.
    """
    return lambda function: _compile(function, list(signatures), nogil)


def _compile(function: Callable[..., Any], signatures: list[Any], nogil: bool = True) -> Any:
    options: dict[str, Any] = {"nogil": nogil, "error_model": "numpy"}
    try:
        kept = njit(cache=True, **options)(function)
        with _turn(kept.stats.cache_path, f"{function.__module__}.{function.__name__}"):
            try:
                return njit(signatures, cache=True, **options)(function)
            except NumbaError:
                raise
            except Exception as error:  # a file that a power cut left empty, say
                log.warning("the code kept of %s cannot be read and is made anew: %r", function.__name__, error)
                kept._cache.flush()
                return njit(signatures, cache=True, **options)(function)
    except NumbaError:  # the loop itself
        raise
    except Exception as error:
        log.warning("%s is compiled without a cache: %s", function.__name__, error)
        return njit(signatures, **options)(function)


@contextmanager
def _turn(folder: str, name: str) -> Iterator[None]:
    """One process at a time compiles a loop: numba's index of a function's code takes no two writers.

    Both would take the next number for their file, and the index then gives one signature the other's code. Who waited
    finds the code compiled. Where there can be no lock (a folder for reading only, a file system without locks), none
    is held.
    """
    lock = _lock_on(os.path.join(folder, f"{name}.lock"))
    try:
        yield
    finally:
        if lock is not None:
            release_lock(lock)


def _lock_on(path: str) -> int | None:
    """A lock on the file, made if it is not there; somebody else's serves for reading."""
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with suppress(OSError):
            return take_lock(path, flags)
    return None


class Kernel:
    """A loop whose first argument is a table: compiled for its storage dtype when that is first seen."""

    def __init__(self, function: Callable[..., Any], signature: Callable[[Any], Any]) -> None:
        self.function, self._signature = function, signature
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self._by_dtype: dict[str, Any] = {}

    def __call__(self, table: Any, *arguments: Any) -> None:
        """Run on `table` and the rest."""
        loop = self._by_dtype.get(table.dtype.char) or self._compiled(table.dtype.char)
        loop(table, *arguments)

    def prepare(self, table: Any) -> None:
        """Compile for the table's dtype now, if that is still to be done."""
        if table.dtype.char not in self._by_dtype:
            self._compiled(table.dtype.char)

    def _compiled(self, dtype: str) -> Any:
        with _LOCK:
            if dtype not in self._by_dtype:
                table = types.Array(_STORED_AS[dtype], 2, "C", readonly=True, aligned=dtype not in "Bb")
                self._by_dtype[dtype] = _compile(self.function, [self._signature(table)])
        return self._by_dtype[dtype]


def kernel(signature: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: `signature` gives the numba signature for the type of the table in the first argument."""
    return lambda function: Kernel(function, signature)
