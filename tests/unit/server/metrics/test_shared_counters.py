"""SharedCounters: one process counts, its siblings read, and what was counted outlives whoever counted it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from server.metrics.shared_counters import SharedCounters

NAMES = st.sampled_from(["a", "b", "seconds"])
LABELS = st.lists(st.text(max_size=9), max_size=2).map(tuple)
SIZE_OF = {"a": 1, "b": 3, "seconds": 20}


@given(st.lists(st.tuples(st.integers(0, 2), NAMES, LABELS, st.integers(0, 19), st.integers(-(2**40), 2**40))))
def test_sums_over_siblings_equal_what_was_added(additions: list[tuple[int, str, tuple[str, ...], int, int]]) -> None:
    """Whatever is added by whom, in whatever order, everybody who reads the memories finds exactly that."""
    memories = [mmap.mmap(-1, 1 << 16) for _ in range(3)]
    siblings = [SharedCounters(memory) for memory in memories]
    late = [SharedCounters(memory) for memory in memories]
    expected: dict[tuple[str, tuple[str, ...], int], float] = {}
    for writer, name, labels, at, amount in additions:
        at %= SIZE_OF[name]
        siblings[writer].numbers(name, labels, SIZE_OF[name])[at] += amount
        expected[name, labels, at] = expected.get((name, labels, at), 0) + amount
    for readers in (siblings, late, [SharedCounters(memory) for memory in memories]):
        found: dict[tuple[str, tuple[str, ...], int], float] = {}
        for (name, labels), numbers in chain.from_iterable(reader.read().items() for reader in readers):
            for at, value in enumerate(numbers):
                found[name, labels, at] = found.get((name, labels, at), 0) + value
        assert {key: value for key, value in found.items() if value} == {k: v for k, v in expected.items() if v}


def test_the_same_key_has_the_same_numbers() -> None:
    """Asking again gives the cells that were there, at first zero; another label has others."""
    cells = SharedCounters()
    numbers = cells.numbers("seconds", ("item",), 3)
    assert list(numbers) == [0, 0, 0]
    numbers[1] = 2.5
    assert list(cells.numbers("seconds", ("item",), 3)) == [0, 2.5, 0]
    assert list(cells.numbers("seconds", ("user",), 3)) == [0, 0, 0]
    assert cells.read() == {("seconds", ("item",)): [0, 2.5, 0], ("seconds", ("user",)): [0, 0, 0]}


def test_another_size_of_the_same_key_is_refused() -> None:
    """A key has one size for good."""
    cells = SharedCounters()
    cells.numbers("seconds", (), 3)
    with pytest.raises(ValueError, match=r"seconds\(\) has 3 numbers, not 4"):
        cells.numbers("seconds", (), 4)


def test_the_next_owner_goes_on_counting() -> None:
    """Over the same memory counters continue; what was reset starts at zero."""
    memory = mmap.mmap(-1, 4096)
    before = SharedCounters(memory)
    before.numbers("total", ("x",))[0] = 41
    before.numbers("inflight")[0] = 3
    after = SharedCounters(memory)
    after.reset(["inflight", "no such name"])
    after.numbers("total", ("x",))[0] += 1
    after.numbers("new")[0] = 7
    assert before.read() == {("total", ("x",)): [42], ("inflight", ()): [0], ("new", ()): [7]}


def test_what_a_killed_writer_began_is_not_there() -> None:
    """Bytes behind the last whole record are no record, and the next one starts at zero all the same."""
    memory = mmap.mmap(-1, 1024)
    SharedCounters(memory).numbers("total")[0] = 1
    used = int.from_bytes(memory[:8], "little")
    memory[used:1024] = b"\xff" * (1024 - used)
    cells = SharedCounters(memory)
    assert cells.read() == {("total", ()): [1]}
    assert list(cells.numbers("seconds", (), 4)) == [0, 0, 0, 0]
    assert SharedCounters(memory).read() == {("total", ()): [1], ("seconds", ()): [0, 0, 0, 0]}


def test_full_memory_is_said_once_and_counting_goes_on() -> None:
    """Further keys count for this process alone; those that fitted are still shared."""
    memory = mmap.mmap(-1, 128)
    cells = SharedCounters(memory)
    cells.numbers("total")[0] = 1
    with capture_logs() as logs:
        for label in ("x", "y"):
            numbers = cells.numbers("seconds", (label,), 20)
            numbers[19] += 1
            assert cells.numbers("seconds", (label,), 20)[19] == 1
    cells.numbers("total")[0] += 1
    assert cells.read()["seconds", ("y",)] == [0] * 19 + [1]
    assert SharedCounters(memory).read() == {("total", ()): [2]}
    assert [log["log_level"] for log in logs] == ["error"]
    assert logs[0]["event"].startswith("memory for metrics is full")


WRITER = """
import os
from server.metrics.shared_counters import SharedCounters

memories = [SharedCounters(), SharedCounters()]
for round in range(3):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # counts without end; says when it has begun
        mine, count = memories[0], 0
        mine.reset(["inflight"])
        mine.numbers("inflight")[0] = 1
        while True:
            mine.numbers("total")[0] += 1
            mine.numbers("ticks", (str(count % 100),), 5)[4] += 1
            count += 1
            if count == 1000:
                os.write(write, b"x")
    os.read(read, 1)
    seen = memories[0].read()
    assert seen["inflight", ()] == [1]
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9
    after = memories[0].read()
    total, ticks = after["total", ()][0], sum(n[4] for (name, _), n in after.items() if name == "ticks")
    assert total >= seen["total", ()][0] >= 1000 * (round + 1), (round, total)
    assert 0 <= total - ticks <= round + 1, (total, ticks)
    assert len(after) == 102
    assert memories[1].read() == {}
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_counts_survive_the_kill_of_a_forked_writer() -> None:
    """A parent reads its child's counts while it writes; after SIGKILL the next child continues the same numbers."""
    done = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr


def test_memory_that_nothing_was_written_to_is_not_resident() -> None:
    """Room for thousands of tables costs address space until they are there."""
    code = """
import json
from server.metrics.shared_counters import NUM_BYTES, SharedCounters
def kib():
    return {l.split(":")[0]: int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("Rss")}
before = kib()
cells = [SharedCounters() for _ in range(8)]
for one in cells:
    one.numbers("total")
print(json.dumps(sum(kib().values()) - sum(before.values())))
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) < 2048
