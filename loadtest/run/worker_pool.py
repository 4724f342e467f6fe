"""Generator processes: started together, begun at the same moment, stopped together, their findings made one."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from msgspec.structs import replace

from loadtest.errors import LoadError
from loadtest.generator.recorder import SECOND
from loadtest.results.result import Result
from loadtest.run.merge import gather
from loadtest.run.progress import Meter, OnProgress
from loadtest.scenario.model import Scenario
from loadtest.scenario.target import list_tables

READY_SECONDS = 120.0
OVERTIME_SECONDS = 30.0
"""After its end and the timeout of the last request, a process that still has not reported never will."""
HEAD_START_SECONDS = 0.25
"""From when all processes are ready until the first request: the moment must reach them all before it comes."""

OnBegin = Callable[[int], None]


def run(
    scenario: Scenario,
    *,
    on_progress: OnProgress | None = None,
    on_begin: OnBegin | None = None,
    stop: threading.Event | None = None,
    ceiling: float = 0.0,
    num_ids: Mapping[str, int] | None = None,
    idle: Sequence[str] = (),
) -> Result:
    """Make the load and say what came of it; LoadError in one line when it cannot be made.

    on_begin: gets the moment of second 0, in nanoseconds of time.perf_counter_ns, before the warm-up begins.
    stop: once set, the run ends early and what was found is returned as `partial`. So it does at SIGINT where that has
        no handler of somebody else's; a second one is a KeyboardInterrupt.
    ceiling: requests a second that a calibration found, 0 without one.
    num_ids: of every table of the scenario; without it the server is asked.
    idle: addresses, one for each process, of servers whose replies need not be answers to their requests.
    """
    if not 1 <= scenario.processes <= scenario.connections:
        raise LoadError(f"{scenario.connections} connections cannot be shared by {scenario.processes} processes")
    tables = list_tables(scenario) if num_ids is None else dict(num_ids)
    stop = stop or threading.Event()
    with _catch_interrupt() as interrupted, WorkerPool(scenario, tables, idle) as pool:
        pool.wait(stop, interrupted, on_progress, on_begin)
    return gather(scenario, list(pool.results.values()), pool.begin, ceiling)


class WorkerPool:
    """The processes of one run."""

    def __init__(self, scenario: Scenario, num_ids: Mapping[str, int], idle: Sequence[str] = ()) -> None:
        self.scenario, self.num, self.num_ids, self.idle = scenario, scenario.processes, dict(num_ids), idle
        self.lines: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.results: dict[int, dict[str, Any]] = {}
        self.begin = 0
        self.processes: list[subprocess.Popen[str]] = []
        self.complaints: list[IO[str]] = []
        self.readers: list[threading.Thread] = []
        self.meter = Meter(scenario)

    def __enter__(self) -> WorkerPool:
        try:
            for share in range(self.num):
                self._start(share)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise LoadError(f"cannot start generator process {share + 1} of {self.num}: {reason}") from error
            raise
        return self

    def _start(self, share: int) -> None:
        self.complaints.append(complaints := tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.generator.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,  # a Ctrl-C on the terminal is for this process alone
        )
        self.processes.append(process)
        reader = threading.Thread(target=self._read, args=(share, process), daemon=True)
        reader.start()
        self.readers.append(reader)
        scenario = replace(self.scenario, url=self.idle[share]) if self.idle else self.scenario
        job = {"scenario": scenario.to_json(), "share": share, "shares": self.num, "num_ids": self.num_ids}
        self._tell(share, job | {"checked": not self.idle})

    def _read(self, share: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # the half line of one that was killed
                self.lines.put((share, json.loads(line)))
        self.lines.put((share, None))

    def _tell(self, share: int, what: dict[str, Any]) -> None:
        pipe = self.processes[share].stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # that it is gone is noticed where its lines end
            pipe.write(json.dumps(what) + "\n")
            pipe.flush()

    def wait(
        self,
        stop: threading.Event,
        interrupted: threading.Event,
        on_progress: OnProgress | None,
        on_begin: OnBegin | None,
    ) -> None:
        """Until every process has reported."""
        ready, stopping = set[int](), False
        deadline = time.monotonic() + READY_SECONDS
        scenario = self.scenario
        while len(self.results) < self.num:
            if not stopping and (stop.is_set() or interrupted.is_set()):
                stopping = True
                deadline = time.monotonic() + OVERTIME_SECONDS
                self._close_stdins()
            if time.monotonic() > deadline:
                raise LoadError("a generator process does not answer")
            with contextlib.suppress(queue.Empty):
                share, line = self.lines.get(timeout=0.05)
                if self._heard(share, line):
                    ready.add(share)
            if len(ready) == self.num and not self.begin and not stopping:
                start = time.perf_counter_ns() + int(HEAD_START_SECONDS * SECOND)
                self.begin = start + round(scenario.warmup_seconds * SECOND)
                for at in range(self.num):
                    self._tell(at, {"begin": start})
                planned = HEAD_START_SECONDS + scenario.warmup_seconds + scenario.seconds + scenario.timeout
                deadline = time.monotonic() + planned + OVERTIME_SECONDS
                if on_begin is not None:
                    on_begin(self.begin)
            if on_progress is not None and self.begin:
                self.meter.show(self.begin, on_progress)

    def _heard(self, share: int, line: dict[str, Any] | None) -> bool:
        """Whether the process says that it is ready."""
        if line is None:
            if share not in self.results:
                raise LoadError(self._how_it_ended(share))
        elif "error" in line:
            raise LoadError(line["error"])
        elif "progress" in line:
            self.meter.add(share, line["progress"])
        elif "result" in line:
            self.results[share] = line["result"]
        return line is not None and "ready" in line

    def _how_it_ended(self, share: int) -> str:
        code = self.processes[share].wait(OVERTIME_SECONDS)
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        self.complaints[share].seek(0)
        said = [line.strip() for line in self.complaints[share] if line.strip()]
        return f"generator process {share + 1} of {self.num} ended without a result: {': '.join([how, *said[-1:]])}"

    def _close_stdins(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()

    def __exit__(self, *error: object) -> None:
        """No process is left."""
        self._close_stdins()
        done = len(self.results) == self.num
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5 if done else 0)
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join(5)
        for process in self.processes:
            if process.stdout is not None:
                process.stdout.close()
        for complaints in self.complaints:
            complaints.close()


@contextlib.contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """SIGINT sets the event, the second is a KeyboardInterrupt; where somebody else handles it, nothing changes."""
    interrupted = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def handle(number: int, frame: Any) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
