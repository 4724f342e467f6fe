"""Whoever makes a load, or answers it, is stopped or killed: a partial result, one line, or errors that are counted."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.driving import drive, scenario
from support.ill_server import rows, scripted

from loadtest.errors import LoadError
from loadtest.results.result import Result
from loadtest.run import worker_pool

ENGINES = pytest.mark.parametrize("engine", ["httpx", "raw"])

SCRIPT = """
import json, sys
from loadtest.run import worker_pool
from loadtest.scenario.model import Scenario
asked = Scenario.from_json(json.loads(sys.argv[1]))
said = {"on_begin": lambda _: print("begun", flush=True), "on_progress": lambda p: print(p.offered, flush=True)}
result = worker_pool.run(asked, **said)
print(json.dumps(result.to_json()))
"""


def test_ctrl_c_gives_what_was_found() -> None:
    """SIGINT to the process that runs the load: soon, without a traceback, the result so far, marked as partial."""
    with scripted(lambda _: rows()) as url:
        asked = scenario(url, seconds=100.0, rate=50.0, processes=2)
        command = [sys.executable, "-c", SCRIPT, json.dumps(asked.to_json())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while (line := process.stdout.readline()) in ("begun\n", "0\n"):
            pass
        assert int(line) > 0
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    result = Result.from_json(json.loads(output.splitlines()[-1]))
    assert result.partial
    assert 0 < result.seconds < 100
    assert result.total().ok >= int(line) - 4
    assert result.total().failures["timeout"] == 0


def test_stopped_before_it_began_there_is_nothing() -> None:
    """An empty partial result, at once."""
    stop = threading.Event()
    stop.set()
    with scripted(lambda _: rows()) as url:
        result = worker_pool.run(scenario(url, seconds=100.0), stop=stop)
    assert (result.partial, result.seconds, result.tallies) == (True, 0.0, {})


def generators() -> list[int]:
    """Process ids of the generators that this process started."""
    tasks = Path("/proc/self/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in children if b"loadtest.generator.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_generator_that_is_killed_is_one_line() -> None:
    """The run ends with who was killed and how, and leaves no process behind."""
    killed: list[int] = []

    def kill(begin: int) -> None:
        killed.extend(generators())
        os.kill(killed[-1], signal.SIGKILL)

    with scripted(lambda _: rows()) as url, pytest.raises(LoadError) as error:
        worker_pool.run(scenario(url, seconds=60.0, processes=2), on_begin=kill)
    assert str(error.value).endswith("of 2 ended without a result: killed by SIGKILL")
    assert len(killed) == 2
    assert generators() == []


def test_processes_that_cannot_be_started_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the second: it is said why, and the first is gone."""
    begin, begun = subprocess.Popen, list[Any]()

    def refuse(*command: Any, **options: Any) -> Any:
        if begun:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        begun.append(begin(*command, **options))
        return begun[0]

    monkeypatch.setattr("loadtest.run.worker_pool.subprocess.Popen", refuse)
    with scripted(lambda _: rows()) as url, pytest.raises(LoadError) as error:
        worker_pool.run(scenario(url, processes=2), num_ids={"item": 100})
    assert str(error.value) == "cannot start generator process 2 of 2: Resource temporarily unavailable"
    assert begun[0].poll() is not None


def test_generators_end_with_whoever_started_them() -> None:
    """The process that runs the load is killed: its generators are gone soon after."""
    with scripted(lambda _: rows()) as url:
        asked = scenario(url, seconds=100.0, processes=2)
        command = [sys.executable, "-c", SCRIPT, json.dumps(asked.to_json())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        process.kill()
        process.communicate(timeout=30)
        end = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < end:
            time.sleep(0.05)
    assert len(children) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@ENGINES
def test_a_server_that_dies_and_comes_back(engine: str) -> None:
    """Requests meanwhile are errors of their kind, those afterwards are answered over new connections."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    asked = scenario(f"http://127.0.0.1:{port}", engine=engine, seconds=60.0, rate=40.0, timeout=1.5)
    stop = threading.Event()
    with start(port) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(drive, asked, stop)
        time.sleep(1.0)
        server.kill()
        server.wait(30)
        time.sleep(0.2)
        with start(port) as another:
            time.sleep(1.5)
            stop.set()
            load, total = running.result(60)
            another.kill()
    assert total.ok + total.failures.total() == total.offered
    assert set(total.errors) & {"connect", "closed", "reset", "timeout"}
    assert load.recorder.reconnects > 0
    answered = [second for (second, _), tally in load.recorder.tallies.items() if tally.ok]
    assert min(answered) == 0
    assert max(answered) >= 2


def start(port: int) -> subprocess.Popen[bytes]:
    """A server process on a port, once it answers."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[2] / "support" / "ill_server.py"), str(port)]
    )
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            break
    return process
