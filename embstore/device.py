"""The device side of a lookup: rows up, one launch, vectors down, one wait.

Every lookup under way has a lane of its own: pinned host memory that ids go up from and vectors come down to, memory on
the device for both, a stream and an event. All of it is asked for once and used again. Copies and launch are queued on
the lane's stream; the thread then sleeps on the event, without the GIL, until the vectors are there. Nothing of it runs
on the default stream, so lookups neither wait for each other nor for a version that is being loaded.

Several requests can share a launch: their rows go up as one batch, and each gets its share of what comes down. Where a
row is below 0 the caller's vector stays as it is: it need not be sent to the device, and what a lane held before, which
may be another caller's, never gets into it.

A CUDA context that has failed (an illegal address, a launch that died) answers every later call with the same error
until the process ends. So after any error the device is asked for one number: if it has none, the device has failed,
`device_failure` says so, and later lookups are refused before they touch it. Too little memory is no such failure.
"""

# Shapes: B ids of a part, S ids of all parts together, D embedding_dim.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.errors import ConfigError, DeviceFailed, EmbstoreError, Overloaded

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Int64s = NDArray[np.int64]
Part = tuple[Int64s, Floats]
"""rows int64 [B], and float32 [B, D] for their vectors; where a row is below 0 the vector stays as it is."""
Lookup = Callable[[Any, Any], None]
"""lookup(rows, out): a scheme's lookup over the table's tensors on the device."""

STAGED_BYTES = 64 << 20
"""Bytes of vectors that a lane holds at most; more of them go in several launches."""
LEAST_IDS = 1 << 10
LANES_KEPT = 4
"""Lanes that wait for the next lookup; when more are at work, the others' memory is given back."""


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where there is one. ConfigError for a device that is not there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {wanted!r}")
    has_cuda = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device is cuda, but torch finds no CUDA device on this machine")
    return "cuda" if has_cuda else "cpu"


def device_named(name: str) -> Device:
    """The one object that this process has for a device."""
    return _DEVICES.get(name) or _DEVICES.setdefault(name, Device(name))


def device_failure() -> str | None:
    """Why a device of this process has failed; None while all work."""
    return next((device.failure for device in list(_DEVICES.values()) if device.failure), None)


class Device:
    """A device that holds tables; one instance serves every table and thread."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.failure: str | None = None
        """Why the device has failed; only a new process can use it again."""
        self._idle: list[_Lane] = []

    def compose(self, lookup: Lookup, parts: Sequence[Part]) -> None:
        """Vectors of every part's rows, all in one launch where they fit a lane.

        DeviceFailed when the device has failed; Overloaded when it has no memory left for this.
        """
        num_floats = max((vectors_BD.shape[1] for _, vectors_BD in parts), default=1)
        with self.watched():
            lane = self._lane()
            for batch in in_batches(parts, max(1, STAGED_BYTES // (4 * num_floats))):
                lane.run(lookup, batch)
            if len(self._idle) < LANES_KEPT:  # one that raised may still be written to: it is not used again
                self._idle.append(lane)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Errors of what runs inside become DeviceFailed or Overloaded where it was the device's fault."""
        if self.failure is not None:
            raise DeviceFailed(self.failure)
        try:
            yield
        except EmbstoreError:
            raise
        except Exception as error:
            if _out_of_memory(error):
                raise Overloaded(f"device {self.device} has no memory left for this lookup at the moment") from error
            if self.answers():
                raise
            self.failure = f"device {self.device} has failed; the process has to be started again"
            log.critical("%s", self.failure, exc_info=error)
            raise DeviceFailed(self.failure) from error

    def answers(self) -> bool:
        """Whether the device can still be used: it is asked for a number."""
        try:
            return torch.zeros(1, device=self.device).item() == 0.0
        except Exception as error:
            return _out_of_memory(error)

    def _lane(self) -> _Lane:
        try:
            return self._idle.pop()
        except IndexError:
            return _Lane(self.device)


class _Lane:
    """What one lookup at a time needs; devices other than cuda have neither pinned memory nor streams."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event(blocking=True) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.ids_up = self.ids = torch.empty(0, dtype=torch.int64)
        self.vectors_down = self.vectors = torch.empty(0)

    def run(self, lookup: Lookup, parts: Sequence[Part]) -> None:
        """One launch for all parts, which are of one width and fit."""
        num_ids, num_floats = sum(len(rows_B) for rows_B, _ in parts), parts[0][1].shape[1]
        with self._on_stream():
            self._make_room(num_ids, num_ids * num_floats)
            ids_up_S, ids_S = self.ids_up[:num_ids], self.ids[:num_ids]
            vectors_SD = self.vectors[: num_ids * num_floats].view(num_ids, num_floats)
            down_SD = self.vectors_down[: num_ids * num_floats].view(num_ids, num_floats)
            np.concatenate([rows_B for rows_B, _ in parts], out=ids_up_S.numpy())
            ids_S.copy_(ids_up_S, non_blocking=True)
            lookup(ids_S, vectors_SD)
            down_SD.copy_(vectors_SD, non_blocking=True)
            if self.done is not None:
                self.done.record()
        if self.done is not None:
            self.done.synchronize()
        hand_out(down_SD.numpy(), parts)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _make_room(self, num_ids: int, num_floats: int) -> None:
        """Buffers of at least these sizes: powers of two, so that a lane soon has the largest it needs."""
        if len(self.ids) < num_ids:
            size = _power_of_two(max(num_ids, LEAST_IDS))
            self.ids_up, self.ids = self._pair(size, torch.int64)
        if len(self.vectors) < num_floats:
            self.vectors_down, self.vectors = self._pair(_power_of_two(num_floats), torch.float32)

    def _pair(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same on the host and on the device."""
        host = torch.empty(size, dtype=dtype, pin_memory=self.on_gpu)
        return host, torch.empty(size, dtype=dtype, device=self.device)


_DEVICES: dict[str, Device] = {}


def in_batches(parts: Sequence[Part], limit: int) -> Iterator[list[Part]]:
    """The parts' rows in their order, in lists of at most `limit` rows each; a part is cut where a list is full."""
    batch: list[Part] = []
    room = limit
    for rows_B, vectors_BD in parts:
        at = 0
        while at < len(rows_B):
            end = min(at + room, len(rows_B))
            batch.append((rows_B[at:end], vectors_BD[at:end]))
            room -= end - at
            at = end
            if not room:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def hand_out(vectors_SD: Floats, parts: Sequence[Part]) -> None:
    """Each part's vectors from those of all parts; where a row is below 0 the part keeps the vector it has."""
    start = 0
    for rows_B, vectors_BD in parts:
        composed_BD = vectors_SD[start : start + len(rows_B)]
        start += len(rows_B)
        missing = np.flatnonzero(rows_B < 0)
        if len(missing):  # most often few: they are put aside, and the rest is one copy
            kept = vectors_BD[missing]
            vectors_BD[:] = composed_BD
            vectors_BD[missing] = kept
        else:
            vectors_BD[:] = composed_BD


def _out_of_memory(error: Exception) -> bool:
    """Whether memory is all that was missing, on the device or pinned on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
