"""Server processes by fork from one that has imported everything: imports are most of what it takes to start one.

Run as a program this is that process; `ForkedProcess` is what tests hold of a server, with what they use of `Popen`.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>: what a process gets when its parent ends."""


class ForkedProcess:
    """One process that runs `python -m embstore ARGUMENTS`."""

    def __init__(self, args: list[str], log: Path, env: dict[str, str]) -> None:
        self.args = args
        self.returncode: int | None = None
        log.write_bytes(b"")
        self.pid = _parent().start({"args": args, "log": str(log), "env": env})

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that killed it), None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it ended; `subprocess.TimeoutExpired` when it does not in so many seconds."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """Nothing when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = _parent().code(self.pid, seconds)
        return self.returncode


class _Parent:
    """The process that forks; it ends when this one does."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._said = threading.Condition()
        self._started: list[int] = []
        self._codes: dict[int, int] = {}
        self._dead = False
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        with self._said:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            assert self._said.wait_for(lambda: self._started or self._dead, 120), "nothing was forked"
            return self._started.pop()

    def code(self, pid: int, seconds: float | None) -> int | None:
        with self._said:
            self._said.wait_for(lambda: pid in self._codes or self._dead, seconds)
            return self._codes.get(pid)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._said:
                if "started" in said:
                    self._started.append(said["started"])
                else:
                    self._codes[said["ended"]] = said["code"]
                self._said.notify_all()
        with self._said:
            self._dead = True
            self._said.notify_all()


_made: dict[int, _Parent] = {}


def _parent() -> _Parent:
    """That of this process, made at first use."""
    if os.getpid() not in _made:
        _made[os.getpid()] = _Parent()
    return _made[os.getpid()]


def main() -> None:
    """Fork when told to on stdin, say so and who has ended on stdout."""
    from server.process.serve import import_everything

    import_everything()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
        _reap()
        if 0 in readable:
            more = os.read(0, 1 << 16)
            if not more:
                return
            *whole, jobs = (jobs + more).split(b"\n")
            for job in whole:
                _fork(json.loads(job), (woken, wake))


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _say(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _fork(job: dict[str, Any], pipes: tuple[int, int]) -> None:
    pid = os.fork()
    if pid:
        _say({"started": pid})
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for pipe in pipes:
        os.close(pipe)
    log, nothing = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.close(log)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["embstore", *job["args"]]
    from embstore.cli import main as command_line

    code = 1
    try:
        command_line()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what was registered for the end of the parent is not this process's to do


if __name__ == "__main__":
    main()
