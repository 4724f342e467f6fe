"""Servers started for a measurement: on their core, ready, with their memory read, and always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from embstore.errors import EmbstoreError

READY_SECONDS = 180.0
END_SECONDS = 15.0


def cores() -> list[int]:
    """The cores that this process may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def on_cores(wanted: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these cores only, with every thread; nothing is wanted: as it is."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does: nothing stays behind. For the main thread."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Server:
    """One server process, with children or without, in a session of its own; EmbstoreError when it does not start."""

    def __init__(self, command: Sequence[str], log: Path, on: Sequence[int] = ()) -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBSTORE_")}
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # till it is known to `end`
        try:
            with log.open("wb") as file, on_cores(on):
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, held),
                )
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
                self.url = self._wait()
            except BaseException:
                self.end()
                raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _wait(self) -> str:
        """Until it is ready; its address."""
        end, url = time.monotonic() + READY_SECONDS, ""
        while time.monotonic() < end:
            lines = self.log.read_text("utf-8", "replace").splitlines()
            if self.process.poll() is not None:
                raise EmbstoreError(f"the server ended: {lines[-1] if lines else 'it said nothing'}")
            if not url:
                url = next((found for line in lines if '"listening"' in line and (found := _address(line))), "")
            if url:
                with suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5):
                    return url
            time.sleep(0.02)
        raise EmbstoreError(f"the server was not ready in {READY_SECONDS:g} s, see {self.log}")

    def pids(self) -> list[int]:
        """It and its descendants, parents first."""
        found = [self.process.pid]
        for pid in found:
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                with suppress(OSError):
                    found += map(int, file.read_text().split())
        return found

    def resident_mb(self) -> float:
        """Resident memory of all its processes, mapped files included."""
        return sum(_kilobytes(pid, "status", ("VmRSS",)) for pid in self.pids()) / 1024

    def private_mb(self) -> list[float]:
        """Resident memory that no other process shares, of each of its processes."""
        wanted = ("Private_Clean", "Private_Dirty")
        return [_kilobytes(pid, "smaps_rollup", wanted) / 1024 for pid in self.pids()]

    def end(self) -> None:
        """SIGTERM, then SIGKILL for what is left of it and its children."""
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(command: Sequence[str], log: Path, on: Sequence[int] = ()) -> Iterator[Server]:
    """A server while the block runs."""
    server = Server(command, log, on)
    try:
        yield server
    finally:
        server.end()


def probe(url: str, seconds: float, on: Sequence[int]) -> tuple[float, int]:
    """Ask /livez and /readyz 20 times a second: seconds of the slowest answer, and how many were not 200."""
    slowest, failed, end = 0.0, 0, time.monotonic() + seconds
    with on_cores(on):
        while (begin := time.monotonic()) < end:
            for path in ("livez", "readyz"):
                try:
                    urllib.request.urlopen(f"{url}/{path}", timeout=5).close()
                except OSError:
                    failed += 1
                slowest, begin = max(slowest, time.monotonic() - begin), time.monotonic()
            time.sleep(0.1)
    return slowest, failed


def _address(line: str) -> str:
    """The TCP address that a line says it listens on."""
    with suppress(ValueError):
        event = json.loads(line)
        if event.get("event") == "listening" and str(event["address"]).startswith("http"):
            return str(event["address"])
    return ""


def _kilobytes(pid: int, file: str, names: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # it has ended, or the system has no such file
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(tuple(f"{name}:" for name in names)))
