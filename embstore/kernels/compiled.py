"""Compile a loop for fixed signatures, once: the machine code is kept on disk where there is a place for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

log = logging.getLogger(__name__)


def compiled(*signatures: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the loop compiled for these signatures, without the GIL; division by zero is the caller's to avoid.

    numba keeps the code beside the source, or in NUMBA_CACHE_DIR, or in the user's cache. Where none of them can be
    written (a read-only container) every process compiles for itself, which takes about six seconds in all.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        try:
            return njit(list(signatures), cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            log.warning("%s is compiled without a cache: %s", function.__name__, error)
            return njit(list(signatures), **options)(function)

    return decorate
