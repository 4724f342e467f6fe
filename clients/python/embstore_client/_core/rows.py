"""What a lookup returns. Shapes: n rows (one an id, or one a bag), d embedding_dim of the table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rows:
    """The vectors of one table for one call, in the order of the ids, or of the bags, that were asked for.

    Attributes:
        vectors: `[n, d]`, read-only. float32 and float16 lie over the reply's bytes, not copied; numpy has no
            bfloat16, and int8 rows are codes: both are widened to float32. Copy it to change it.
        found: bool, one for each id (of bags too): False where the table does not know it, and `on_missing` chose.
        version: the published version that answered, a positive integer.
        missing: how many of `found` are False.
        dtype: what travelled: `"float32"`, `"float16"`, `"bfloat16"` or `"int8"`.
        release: the release that the version came from, where one applies.
        request_id: the server's name for this call, to quote when asking about it; several, with commas, where the
            call was split; None where the near-cache answered.
        encoded: the rows as they came, where `vectors` is widened: uint16 `[n, d]` of bfloat16, or uint8
            `[n, d + 8]` of int8: d codes, a float32 scale, a float32 bias, and a number is code * scale + bias.
    """

    vectors: NDArray[Any]
    found: NDArray[np.bool_]
    version: int
    missing: int
    dtype: str
    release: str | None = None
    request_id: str | None = None
    encoded: NDArray[Any] | None = None

    def torch(self) -> Any:
        """The vectors as a `torch.Tensor` `[n, d]` that shares their memory: float32 (int8 too), float16 or bfloat16.

        torch knows no read-only tensors: writing to this one writes over `vectors`, so `clone()` it first.

        Raises:
            ImportError: torch is not installed.
        """
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise ImportError(
                "Rows.torch() needs torch, which is not installed; Rows.vectors needs numpy only"
            ) from error
        if self.dtype == "bfloat16" and self.encoded is not None:
            return torch.from_numpy(_writable(self.encoded.view(np.int16))).view(torch.bfloat16)
        return torch.from_numpy(_writable(self.vectors))

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


class _Memory:
    """Says of an array's memory that it may be written, and keeps the array alive."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory without its read-only flag, about which torch would warn with every call."""
    return np.asarray(_Memory(array))
