"""Arrays on disk: the safetensors format, written so that rows start on cache lines, read as memory maps.

Any safetensors reader can open these files. Two things are done beyond the format: the header is padded so that the
data starts on a 64-byte line, and arrays whose size is a multiple of a line come first, so each of them starts on
one too (a 256-byte row then takes 4 lines, not 5). Reading maps the file: processes share its pages and nothing is
copied, and the kernel is asked for huge pages.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embstore.errors import VerificationFailed

LINE = 64
MAX_HEADER = 16 << 20
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: these are its bits
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays in safetensors format, lines first, without joining them in memory."""
    ordered = sorted(arrays.items(), key=lambda item: (item[1].nbytes % LINE != 0, -item[1].itemsize, item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, array in ordered:
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for _, array in ordered:
        if array.nbytes:
            file.write(np.ascontiguousarray(array).data.cast("B"))


def map_file(path: Path) -> memoryview:
    """The file as read-only memory, shared with every process that maps it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with suppress(OSError, AttributeError):  # a hint: file systems without huge pages answer EINVAL
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)


def read_arrays(data: memoryview, source: str) -> dict[str, NDArray[Any]]:
    """Views of the arrays in a mapped safetensors file; VerificationFailed names `source` when it is not one."""

    def bad(what: str) -> VerificationFailed:
        return VerificationFailed(f"{source}: not a readable safetensors file: {what}")

    if len(data) < 8:
        raise bad("shorter than its header")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(MAX_HEADER, len(data) - 8):
        raise bad(f"the header claims {header_bytes:,} bytes")
    start = 8 + header_bytes
    try:
        header = json.loads(bytes(data[8:start]))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        return {name: _view(data, start, entry) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(str(error)) from error


def _view(data: memoryview, start: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}; this release reads {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    shape, (low, high) = list(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int for number in (*shape, low, high)):
        raise ValueError(f"shape {shape} and offsets {low}..{high} must be whole numbers")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if not 0 <= low <= high <= len(data) - start or high - low != count * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"offsets {low}..{high} do not hold shape {shape}")
    return np.frombuffer(data, dtype, count, start + low).reshape(shape)
