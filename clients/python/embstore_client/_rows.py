"""What a lookup returns. Shapes: n ids in the call, d embedding_dim of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rows:
    """The vectors of one table for one call, in the order of the ids that were asked for.

    Attributes:
        vectors: `[n, d]` of `dtype`, read-only: it lies over the reply's bytes. Copy it to change it.
        found: bool `[n]`, False where the table does not know the id (`on_missing` chose that row).
        version: the published version that answered, a positive integer.
        missing: how many of `found` are False.
        dtype: `"float32"` or `"float16"`.
        release: the release that the version came from, where one applies.
        request_id: the server's name for this call, to quote when asking about it.
    """

    vectors: NDArray[Any]
    found: NDArray[np.bool_]
    version: int
    missing: int
    dtype: str
    release: str | None = None
    request_id: str | None = None

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    def __repr__(self) -> str:
        n, d = self.vectors.shape
        return f"Rows({n} x {d} {self.dtype}, version={self.version}, missing={self.missing})"


class ManyRows(Mapping[str, Rows]):
    """The rows of several tables, all from one release: `many["user"].vectors`.

    Attributes:
        release: the release that answered, or None where the server names none.
        request_id: the server's name for this call.
    """

    __slots__ = ("_rows", "release", "request_id")

    def __init__(self, rows: Mapping[str, Rows], *, release: str | None, request_id: str | None) -> None:
        self._rows = dict(rows)
        self.release = release
        self.request_id = request_id

    def __getitem__(self, table: str) -> Rows:
        return self._rows[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ManyRows(release={self.release!r}, {self._rows!r})"
