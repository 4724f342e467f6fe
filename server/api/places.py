"""Tensors in shared memory, as the parameters of an infer request and reply speak of them. No state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from embstore.errors import BadRequest
from server.http.problems import clip

REGION, OFFSET, BYTE_SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"
_LIMIT = 1 << 63


class Place(NamedTuple):
    """Where a request says that a tensor is: a range of bytes of a region."""

    region: str
    offset: int
    num_bytes: int

    def parameters(self, num_bytes: int) -> dict[str, str | int]:
        """The parameters of an output that is there and takes so many bytes."""
        return {REGION: self.region, OFFSET: self.offset, BYTE_SIZE: num_bytes}


def place_of(parameters: Mapping[str, Any], what: str) -> Place | None:
    """Where a tensor's parameters say that it is; None where they do not speak of shared memory. Else BadRequest."""
    region, offset, size = parameters.get(REGION), parameters.get(OFFSET, 0), parameters.get(BYTE_SIZE)
    if region is None and size is None:
        return None
    if not isinstance(region, str):
        raise BadRequest(f"{what}: {BYTE_SIZE} needs the name of a region, {REGION}; got {clip(repr(region))}")
    for name, value in ((BYTE_SIZE, size), (OFFSET, offset)):
        if type(value) is not int or not 0 <= value < _LIMIT:
            raise BadRequest(f"{what}: {REGION} needs {name} as a number of bytes, got {clip(repr(value))}")
    return Place(region, offset, size)  # type: ignore[arg-type]
