"""One time budget for a whole call, spent phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import httpx

_PHASES = ("connect", "read", "write", "pool")
_SHORTEST_WAIT_S = 0.001  # a socket timeout of 0 would mean "do not block", which is another error


class Deadline(Mapping[str, float]):
    """What httpx takes as its four timeouts, each being whatever is left of the whole.

    httpx asks this mapping at the start of every phase (pool, connect, write, read), so a slow connect leaves
    less time to read. Within the body, `check` is called between chunks, so a server that trickles its answer
    is noticed at the next chunk.
    """

    __slots__ = ("_clock", "_end", "timeout_s")

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end = clock() + timeout_s

    def __getitem__(self, phase: str) -> float:
        if phase not in _PHASES:
            raise KeyError(phase)
        return max(self._end - self._clock(), _SHORTEST_WAIT_S)

    def __iter__(self) -> Iterator[str]:
        return iter(_PHASES)

    def __len__(self) -> int:
        return len(_PHASES)

    def check(self) -> None:
        """Raise httpx's own timeout once the budget is spent."""
        if self._clock() > self._end:
            raise httpx.ReadTimeout("the answer was not whole in time")
