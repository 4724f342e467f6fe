"""Events of a load test: they happen at their times, do what they say, and whatever goes wrong is a mark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embstore.publish.store import open_store
from embstore.schemes import MEmCom
from loadtest.results.result import Mark
from loadtest.run.events import Events, describe, send_signal
from loadtest.scenario.model import Event

SLEEPS = "import time; print('up', flush=True); time.sleep(60)"


def happen(*events: Event, grace: float = 60.0) -> list[Mark]:
    """Marks of events that all begin before the end."""
    run = Events(events)
    run.begin(time.perf_counter_ns())
    time.sleep(max(event.at for event in events) + 0.2)
    return run.end(grace)


def python(program: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs a program in Python."""
    return (sys.executable, "-c", program, *arguments)


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that does nothing."""
    process = subprocess.Popen(python(SLEEPS), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one version of a compressed table of string keys."""
    ids = [f"word {row}" for row in range(30)]
    open_store(tmp_path / "store").publish("word", MEmCom(30, 4, num_buckets=7), ids=ids)
    return tmp_path / "store"


def test_events_happen_at_their_times() -> None:
    """Each is on time by the clock of the run, also while another takes long, and marks come in order of time."""
    slow = Event(at=0.1, kind="command", name="slow", command=python("import time; time.sleep(0.5)"))
    marks = happen(Event(at=0.4, name="second"), Event(at=0.3, name="first"), slow)
    assert [mark.name for mark in marks] == ["slow", "first", "second"]
    assert all(mark.ok for mark in marks)
    for mark, due in zip(marks, (0.1, 0.3, 0.4), strict=True):
        assert due <= mark.at < due + 2
    assert marks[0].seconds > 0.5


def test_what_is_not_due_when_the_run_ends_does_not_happen(tmp_path: Path) -> None:
    """A run that ends early leaves its later events undone, and says nothing of them."""
    touched = tmp_path / "touched"
    events = Events([Event(at=0, name="now"), Event(at=60, kind="command", command=("touch", str(touched)))])
    events.begin(time.perf_counter_ns())
    time.sleep(0.1)
    assert [mark.name for mark in events.end()] == ["now"]
    assert not touched.exists()


def test_events_of_a_run_that_never_began_are_none() -> None:
    """A run that is stopped while it starts has no marks."""
    assert Events([Event(at=0)]).end() == []


def test_a_publication_is_a_new_version_with_the_same_rows(store: Path) -> None:
    """`publish` makes version 2 of a compressed table, keys and all, moves the label, and names what it took."""
    (mark,) = happen(Event(at=0, kind="publish", store=str(store), table="word"))
    assert (mark.name, mark.ok) == ("publish word", True), mark.detail
    assert mark.detail == "version 2, the rows of version 1, label latest"
    opened = open_store(store)
    old, new = opened.load("word", 1), opened.load("word", "latest")
    assert new.version == 2
    assert new.manifest is not None
    assert new.manifest.parent == 1
    keys = ["word 3", "word 29"]
    np.testing.assert_array_equal(old.lookup(keys), new.lookup(keys))


def test_a_promotion_moves_the_label(store: Path) -> None:
    """`promote` points the label at a version."""
    (mark,) = happen(Event(at=0, kind="promote", store=str(store), table="word", label="stable", version="1"))
    assert (mark.name, mark.ok) == ("promote word 1", True), mark.detail
    assert mark.detail == "version 1, label stable"
    assert open_store(store).labels("word")["stable"].version == 1


def test_a_signal_reaches_its_process(tmp_path: Path) -> None:
    """`signal` ends the process whose id the file names when the event is due."""
    with sleeper() as process:
        pid_file = tmp_path / "pid"
        pid_file.write_text(f"{process.pid}\n")
        (mark,) = happen(Event(at=0, kind="signal", signal="term", pid_file=str(pid_file)))
        assert mark.ok, mark.detail
        assert mark.detail == f"SIGTERM to process {process.pid}"
        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Event(at=0, kind="signal", signal="SIGNOTHING", pid=1), "there is no signal 'SIGNOTHING'"),
        (Event(at=0, kind="signal", pid=1), "process id 1 is not one that a test may signal"),
        (Event(at=0, kind="signal", pid=os.getpid()), "is not one that a test may signal"),
        (Event(at=0, kind="signal", pid=2**22 + 1), "there is no process 4194305"),
        (Event(at=0, kind="signal", pid_file="/no/such/file"), "pid file /no/such/file: No such file or directory"),
        (Event(at=0, kind="signal", pid_file="/dev/null"), "pid file /dev/null holds no process id: ''"),
        (Event(at=0, kind="command", command=("/no/such/program",)), "No such file or directory"),
        (Event(at=0, kind="command", command=()), "the command is empty"),
        (Event(at=0, kind="command", command=python("import sys; sys.exit('bad\\nday')")), "exit code 1: day"),
        (Event(at=0, kind="command", command=("sh", "-c", "kill -9 $$")), "killed by SIGKILL"),
        (Event(at=0, kind="publish", store="/no/such/store", table="word"), "exit code 1: no table named 'word'"),
        (Event(at=0, kind="promote", store="/no/such/store", table="word", version="1"), "no table named 'word'"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.kind}",
)
def test_what_fails_is_a_mark_with_the_reason(event: Event, reason: str) -> None:
    """Whatever an event runs into: no exception, but a mark that is not ok and says why in one line."""
    (mark,) = happen(event)
    assert not Path("/no").exists()
    assert not mark.ok
    assert reason in mark.detail
    assert "\n" not in mark.detail


def test_a_process_of_another_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one who may signal every process does not signal another user's."""
    with sleeper() as process:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(Exception, match=f"process {process.pid} belongs to another user"):
            send_signal(Event(at=0, kind="signal", pid=process.pid))
        assert process.poll() is None


def test_a_program_that_outlasts_the_run_is_ended() -> None:
    """What still runs after the grace is stopped with its children, and its mark says so."""
    (mark,) = happen(Event(at=0, kind="command", name="long", command=("sh", "-c", "sleep 60; true")), grace=0.1)
    assert not mark.ok
    assert mark.detail == "was still running when the test ended, and was stopped"
    assert mark.seconds < 30


def test_a_server_that_a_program_leaves_behind_is_not_waited_for() -> None:
    """A command that starts something in the background and ends has ended; the last line it said is its detail."""
    (mark,) = happen(Event(at=0, kind="command", command=("sh", "-c", "sleep 20 & echo started; echo $!")))
    assert mark.ok
    assert mark.seconds < 15
    os.kill(int(mark.detail), signal.SIGKILL)


def test_nothing_of_a_command_is_read_by_a_shell(tmp_path: Path) -> None:
    """Arguments reach the program as they are."""
    text = f"; touch {tmp_path}/made $(true) *"
    (mark,) = happen(Event(at=0, kind="command", command=python("import sys; print(sys.argv[1])", text)))
    assert mark.detail == text
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (Event(at=0, name="kill Redis", kind="signal"), "kill Redis"),
        (Event(at=0, kind="publish", table="item"), "publish item"),
        (Event(at=0, kind="promote", table="item", version="3"), "promote item 3"),
        (Event(at=0, kind="signal", signal="SIGSTOP"), "SIGSTOP"),
        (Event(at=0, kind="command", command=("/usr/bin/redis-cli", "flushall")), "redis-cli"),
        (Event(at=0), "mark"),
    ],
    ids=["own", "publish", "promote", "signal", "command", "mark"],
)
def test_an_event_has_a_name(event: Event, name: str) -> None:
    """Its own, or what it does."""
    assert describe(event) == name
