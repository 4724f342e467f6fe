"""What happens during a run: each event at its time, in a thread of its own, and what came of it as a mark.

Nothing an event does can end the run: one that fails is a mark with `ok` false and the reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from loadtest.results.result import Mark
from loadtest.scenario.model import Event

GRACE_SECONDS = 10.0
"""How long a test waits, after its last second, for what its events have started."""
KILL_SECONDS = 2.0
TAIL_BYTES = 4096
DETAIL_CHARS = 200

CHANGES = ("-m", "embstore.store.republish")


class EventFailed(Exception):
    """An event that could not be done; the message is one line."""


class Events:
    """The events of one run: `begin` when second 0 is known, `end` when the run is over."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._programs: list[subprocess.Popen[bytes]] = []
        self._marks: list[Mark] = []

    def begin(self, begin_ns: int) -> None:
        """Let every event happen `at` seconds after `begin_ns`."""
        for event in self._events:
            thread = threading.Thread(target=self._happen, args=(event, begin_ns), name=describe(event), daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self, grace: float = GRACE_SECONDS) -> list[Mark]:
        """Let nothing more begin, wait `grace` seconds for what has begun, end what then still runs; the marks."""
        self._over.set()
        until = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for program in list(self._programs):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(program.pid, sent)
            until = time.monotonic() + KILL_SECONDS
            for thread in self._threads:
                thread.join(max(0.0, until - time.monotonic()))
        return sorted(self._marks, key=lambda mark: mark.at)

    def _happen(self, event: Event, begin_ns: int) -> None:
        due_ns = begin_ns + int(event.at * 1e9)
        if self._over.wait(max(0.0, (due_ns - time.perf_counter_ns()) / 1e9)):
            return
        began_ns = time.perf_counter_ns()
        ok = True
        try:
            detail = self._do(event)
        except Exception as error:  # whatever it is, the run goes on
            ok, detail = False, _one_line(str(error)) or type(error).__name__
        seconds = (time.perf_counter_ns() - began_ns) / 1e9
        at = (began_ns - begin_ns) / 1e9
        self._marks.append(Mark(at=at, name=describe(event), detail=detail, ok=ok, seconds=seconds))

    def _do(self, event: Event) -> str:
        if event.kind in ("publish", "promote"):
            label = event.label or "latest"
            where = (event.store, event.table, event.version or label, label)
            return self._run([sys.executable, *CHANGES, event.kind, *where])
        if event.kind == "command":
            return self._run(event.command)
        if event.kind == "signal":
            return send_signal(event)
        return ""

    def _run(self, command: Sequence[str]) -> str:
        """Run a program to its end; its last line. EventFailed when it cannot run, fails, or outlasts the test."""
        if not command:
            raise EventFailed("the command is empty")
        with tempfile.TemporaryFile() as output:  # no pipe: a server that the program starts may keep it open
            program = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            self._programs.append(program)
            try:
                code = program.wait()
            finally:
                self._programs.remove(program)
            said = _last_line(output)
        if code < 0 and self._over.is_set():
            raise EventFailed("was still running when the test ended, and was stopped")
        if code:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise EventFailed(f"{ended}: {said}" if said else ended)
        return said


def describe(event: Event) -> str:
    """What marks and plots call an event."""
    if event.name:
        return event.name
    names: dict[str, Callable[[], str]] = {
        "publish": lambda: f"publish {event.table}",
        "promote": lambda: f"promote {event.table} {event.version}",
        "signal": lambda: event.signal,
        "command": lambda: Path(event.command[0]).name if event.command else "command",
        "mark": lambda: "mark",
    }
    return names[event.kind]()


def send_signal(event: Event) -> str:
    """Send the event's signal to its process, one of this user's; EventFailed otherwise."""
    wanted = event.signal.upper().removeprefix("SIG")
    known = {kind.name.removeprefix("SIG"): kind for kind in signal.Signals}
    if wanted not in known:
        raise EventFailed(f"there is no signal {event.signal!r}; SIGKILL, SIGTERM, SIGSTOP and SIGCONT are usual")
    pid = _read_pid(Path(event.pid_file)) if event.pid_file else event.pid
    if pid < 2 or pid == os.getpid():
        raise EventFailed(f"process id {pid} is not one that a test may signal")
    try:
        owner = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        raise EventFailed(f"there is no process {pid}") from None
    if owner != os.geteuid():
        raise EventFailed(f"process {pid} belongs to another user")
    os.kill(pid, known[wanted])
    return f"SIG{wanted} to process {pid}"


def _read_pid(path: Path) -> int:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EventFailed(f"pid file {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    if not text.isascii() or not text.isdecimal():
        raise EventFailed(f"pid file {path} holds no process id: {text[:40]!r}")
    return int(text)


def _last_line(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - TAIL_BYTES))
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    return _one_line(lines[-1]) if lines else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:DETAIL_CHARS]
