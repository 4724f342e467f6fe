"""Several processes that serve as one: forked from one that has imported everything, watched, replaced when they die.

The supervisor answers no request. It binds the addresses, imports what a server needs, and forks the workers while no
other thread lives, so code and tables lie in memory once. All workers accept from the same sockets: what waits in them
is lost with none of them.

Who accepts: at the start one worker accepts at once, so that probes hear why there is nothing to serve yet. Every
other worker, and each that replaces one, accepts when its own tables are loaded and no accepting one is still loading:
whichever answers, the answer to "ready?" holds for all.

A signal to the supervisor goes to every worker, and it ends when they have; a second one kills them. Workers take the
first signal only: a terminal, and systemd, send it to all processes of a group besides.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from types import FrameType
from typing import NoReturn

import structlog

from embstore.errors import EmbstoreError
from server.metrics.recorder import Metrics, take_over
from server.metrics.shared_counters import SharedCounters
from server.process.listeners import log_addresses

log = structlog.get_logger()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
QUICK_SECONDS = 10.0
"""A worker that ends earlier than this after its start is replaced later and later."""
FIRST_DELAY, MAX_DELAY = 0.1, 30.0


@dataclass(frozen=True)
class Member:
    """What a worker knows of the group it belongs to."""

    number: int
    metrics: Metrics
    patient: bool
    """It accepts no connection before its tables are loaded."""
    alive: int
    """A pipe that ends when the supervisor does."""
    _report: int
    _loading: mmap.mmap
    _held: memoryview[float]
    """Connections that each worker has; infinite where it does not accept."""

    def may_listen(self, loaded: bool) -> bool:
        """Whether to accept connections now; `loaded` says that this worker's tables are."""
        return not self.patient or (loaded and self._loading[0] == 0)

    def listening(self) -> None:
        """Tell the supervisor that connections are accepted."""
        log.info("worker listening")
        self._held[self.number] = 0
        os.write(self._report, bytes([self.number]))

    def has_its_share(self, num_connections: int) -> bool:
        """Whether another worker has clearly fewer connections than this one, which has so many.

        To the last connection would be fairer, and slower where every request opens one: 8,000 a second, not 12,000.
        """
        self._held[self.number] = num_connections
        return num_connections * 7 // 8 > min(self._held) + 1

    def tick(self, loaded: bool, num_connections: int) -> None:
        """Tell the others how things are, now and then."""
        if loaded and not self.patient:
            self._loading[0] = 0
        if self._held[self.number] != inf:
            self._held[self.number] = num_connections


@dataclass
class _Slot:
    """One of the workers that there should be; `pid` is None between a process and the next."""

    number: int
    cells: SharedCounters
    pid: int | None = None
    began: float = 0.0
    due: float = 0.0
    failures: int = 0
    listening: bool = False
    patient: bool = False


class Supervisor:
    """Keeps `num_workers` forked processes at work on `listeners`; `work` is what each does, and its exit code.

    After a signal they have `stop_seconds` to end.
    """

    def __init__(
        self, work: Callable[[Member], int], listeners: list[socket.socket], num_workers: int, *, stop_seconds: float
    ) -> None:
        self._work, self._listeners, self._stop_seconds = work, listeners, stop_seconds
        self._slots = [_Slot(number, SharedCounters()) for number in range(num_workers)]
        self._loading = mmap.mmap(-1, 1)
        self._held = memoryview(mmap.mmap(-1, 8 * num_workers)).cast("d")
        for slot in self._slots:
            self._held[slot.number] = inf
        self._received: list[int] = []
        self._listened = False
        self._kill_at = inf
        self._exit_code = 0
        self._alive_read, alive_write = os.pipe()
        self._report_read, self._report_write = os.pipe()
        self._wake_read, self._wake_write = os.pipe()
        self._ours = (alive_write, self._report_read, self._wake_read, self._wake_write)
        for fd in self._ours:
            os.set_blocking(fd, False)

    def run(self) -> int:
        """Until a signal, and then until every worker has ended; returns the exit code."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for stop in STOP_SIGNALS:
            signal.signal(stop, self._on_signal)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._start_due()
        while self._running() or (not self._received and self._listened):
            select.select([self._wake_read, self._report_read], [], [], self._seconds_to_wait())
            _read_all(self._wake_read)
            for number in _read_all(self._report_read):
                self._has_listened(self._slots[number])
            self._pass_on_signals()
            self._reap()
            if not self._received:
                self._start_due()
        if not self._listened and not self._received:
            log.error("no worker could start")
            return 1
        return self._exit_code

    def _on_signal(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received.append(sig)

    def _running(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.pid is not None]

    def _seconds_to_wait(self) -> float | None:
        """Until a worker has to be started, or killed; None: for whatever happens."""
        at = min([self._kill_at, *(slot.due for slot in self._slots if slot.pid is None and not self._received)])
        return None if at == inf else max(0.0, at - time.monotonic())

    def _has_listened(self, slot: _Slot) -> None:
        slot.listening = slot.pid is not None
        if not self._listened:
            self._listened = True
            if not self._received:  # else the sockets are closed
                log_addresses(self._listeners)
            for other in self._slots:
                other.due = min(other.due, time.monotonic())

    def _pass_on_signals(self) -> None:
        """The first signal to everyone; at a second one, or when the time is over, no more patience."""
        if not self._received:
            return
        if self._kill_at == inf:
            self._kill_at = time.monotonic() + self._stop_seconds
            for listener in self._listeners:
                listener.close()  # while one copy of it is open, somebody may still connect
            log.info("stopping", signal=signal.Signals(self._received[0]).name, workers=len(self._running()))
            for slot in self._running():
                _send(slot, self._received[0])
        if len(self._received) > 1 or time.monotonic() >= self._kill_at:
            self._kill_at = time.monotonic() + 1
            for slot in self._running():
                log.error("killing a worker", worker=slot.number, pid=slot.pid)
                _send(slot, signal.SIGKILL)

    def _reap(self) -> None:
        for slot in self._running():
            assert slot.pid is not None
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
            if pid:
                self._has_ended(slot, os.waitstatus_to_exitcode(status))

    def _has_ended(self, slot: _Slot, code: int) -> None:
        pid, slot.pid, slot.listening = slot.pid, None, False
        self._held[slot.number] = inf
        if not slot.patient:
            self._loading[0] = 0
        if self._received:
            self._exit_code = self._exit_code or int(code != 0)
            return
        how = {"signal": signal.Signals(-code).name} if code < 0 else {"exit_code": code}
        write = log.error if code else log.info
        write("worker ended", worker=slot.number, pid=pid, **how)
        take_over(slot.cells)
        now = time.monotonic()
        slot.failures = slot.failures + 1 if now - slot.began < QUICK_SECONDS else 0
        delay = min(MAX_DELAY, FIRST_DELAY * 2 ** (slot.failures - 1)) if slot.failures else 0.0
        slot.due = now + delay if self._listened else inf  # a mistake in the settings is the same for the next one

    def _start_due(self) -> None:
        for slot in self._slots:
            if slot.pid is None and slot.due <= time.monotonic():
                self._start(slot)

    def _start(self, slot: _Slot) -> None:
        if threading.active_count() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate())
            raise RuntimeError(f"the supervisor may have no other thread when it forks; there are {names}")
        slot.patient = any(other.listening or (other.pid and not other.patient) for other in self._slots)
        if not slot.patient:
            self._loading[0] = 1
        self._held[slot.number] = inf
        slot.began = time.monotonic()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()  # numpy's BLAS has threads, and ends them itself before a fork
        except OSError as error:
            pid = None
            log.error("a worker cannot be forked", worker=slot.number, error=str(error))
            slot.due = slot.began + MAX_DELAY
            if not slot.patient:
                self._loading[0] = 0
        if pid == 0:
            self._be_worker(slot)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        slot.pid = pid
        if pid:
            log.info("worker started", worker=slot.number, pid=pid)

    def _be_worker(self, slot: _Slot) -> NoReturn:
        """The life of a forked process. What the supervisor registered for its own end does not run here."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for stop in STOP_SIGNALS:  # before a worker serves, nothing has to be ended in order
                signal.signal(stop, lambda *_: os._exit(0))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            for fd in self._ours:
                os.close(fd)
            metrics = Metrics([other.cells for other in self._slots], slot.number)
            pipes = self._alive_read, self._report_write
            code = self._work(Member(slot.number, metrics, slot.patient, *pipes, self._loading, self._held))
        except EmbstoreError as error:
            log.error("worker cannot start", error=str(error))
        except BaseException:
            log.exception("worker failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _send(slot: _Slot, sig: int) -> None:
    assert slot.pid is not None
    os.kill(slot.pid, sig)  # not reaped yet, so the number is still this process's


def _read_all(fd: int) -> bytes:
    """What a pipe has now."""
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""
