"""What a caller may ask for, checked before anything is sent, and how it reads in a path."""

from __future__ import annotations

import operator
from functools import lru_cache
from urllib.parse import quote

from embstore_client._core.decode import DTYPES

ON_MISSING = ("zero", "default", "error", "hash")
ON_MISSING_DEFAULT = "zero"
DTYPE_DEFAULT = "float32"


@lru_cache(maxsize=1024)
def lookup_path(table: str, version: int | None, label: str | None) -> str:
    path = f"/v1/tables/{segment('table', table)}"
    if version is not None and label is not None:
        raise ValueError(f"choose version={version} or label={label!r}, not both")
    if version is not None:
        path += f"/versions/{version}"
    elif label is not None:
        path += f"/labels/{segment('label', label)}"
    return path + "/lookup"


@lru_cache(maxsize=64)
def lookup_query(on_missing: str, dtype: str) -> str:
    """What differs from the contract's defaults."""
    asked = (("on_missing", on_missing, ON_MISSING_DEFAULT), ("dtype", dtype, DTYPE_DEFAULT))
    query = "&".join(f"{name}={value}" for name, value, default in asked if value != default)
    return f"?{query}" if query else ""


def segment(what: str, name: str) -> str:
    """One path segment; `.` and `..` would silently name another path."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, got {type(name).__name__}")
    if name in ("", ".", ".."):
        raise ValueError(f"{what} must be a name, got {name!r}")
    return quote(name, safe="")


def check_version(version: int) -> int:
    if isinstance(version, bool):
        raise TypeError("version must be a positive integer, got bool")
    try:
        number = operator.index(version)
    except TypeError as error:
        raise TypeError(f"version must be a positive integer, got {type(version).__name__}") from error
    if number < 1:
        raise ValueError(f"version must be a positive integer, got {number}")
    return number


def check_on_missing(on_missing: str) -> None:
    if on_missing not in ON_MISSING:
        raise ValueError(f"on_missing must be one of {', '.join(ON_MISSING)}, got {on_missing!r}")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
