"""Waking up on time, without spending a core on it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

SECOND = 1_000_000_000
EARLY_NS = 100_000
"""A kernel timer wakes the loop this much before the time; the rest is waited for awake."""
EARLY_WITHOUT_NS = 2_000_000
"""The same without kernel timers: timers of event loops are milliseconds."""
EMPTY_NS = 30_000
"""A turn of the loop that took longer than this did more than wait."""
ABSOLUTE = 1


class Timer:
    """Calls `ring` in the event loop at a time of time.perf_counter_ns, one time at once.

    On Linux by a timerfd, which knows nanoseconds; elsewhere by the loop's own timer and a longer wait awake.
    Other events of the loop are handled meanwhile. spun: nanoseconds awake with nothing else to do.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self.ring, self.when, self.closed = ring, 0, False
        self.spun = self.turn = 0
        self.loop = asyncio.get_running_loop()
        self.fd = -1
        libc = ctypes.CDLL(None)
        if create := getattr(libc, "timerfd_create", None):
            self.fd = create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd >= 0:
            self.arm = libc.timerfd_settime
            self.spec = (ctypes.c_long * 4)()  # itimerspec: interval, then value, each in seconds and nanoseconds
            self.loop.add_reader(self.fd, self._expired)

    def set(self, when: int) -> None:
        """Ring at `when`, or in the loop's next turn if that is past."""
        self.when = when
        ahead = when - time.perf_counter_ns()
        if self.fd >= 0 and ahead > EARLY_NS:
            self.spec[2], self.spec[3] = divmod(when - EARLY_NS, SECOND)
            self.arm(self.fd, ABSOLUTE, self.spec, None)
        elif self.fd < 0 and ahead > EARLY_WITHOUT_NS:
            self.loop.call_later((ahead - EARLY_WITHOUT_NS) / SECOND, self._wait)
        else:
            self.loop.call_soon(self._wait)
        self.turn = 0

    def _expired(self) -> None:
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return
        self._wait()

    def _wait(self) -> None:
        """Awake for the last bit."""
        if self.closed:
            return
        now = time.perf_counter_ns()
        if self.turn and now - self.turn < EMPTY_NS:
            self.spun += now - self.turn
        self.turn = now
        if now < self.when:
            self.loop.call_soon(self._wait)
        else:
            self.ring()

    def close(self) -> None:
        """Never ring again."""
        if not self.closed and self.fd >= 0:
            self.loop.remove_reader(self.fd)
            os.close(self.fd)
        self.closed = True
