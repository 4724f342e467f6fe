"""The loops by themselves: callers that come back, the end of a schedule, what is the server's time and what ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from support.driving import drive, scenario
from support.ill_server import CLOSE, NUM_IDS, Answer, rows, scripted

from loadtest.generator.clock_watch import ClockWatch
from loadtest.generator.interfaces import InFlight
from loadtest.generator.loops import OpenLoop
from loadtest.generator.recorder import SECOND, Recorder
from loadtest.generator.timer import Timer
from loadtest.generator.worker import make_load, schedule
from loadtest.run import worker_pool
from loadtest.scenario.model import Phase
from loadtest.workload.response_check import ResponseCheck

ENGINES = pytest.mark.parametrize("engine", ["httpx", "raw"])


def with_load(use: Callable[[OpenLoop], Awaitable[None]], **fields: Any) -> OpenLoop:
    """An open loop of one connection, connected, that nobody drives but `use`."""

    async def run(url: str) -> OpenLoop:
        load, _ = make_load(scenario(url, connections=1, **fields), 0, 1, {"item": NUM_IDS})
        assert isinstance(load, OpenLoop)
        try:
            await load.connect()
            load.recorder = Recorder(time.perf_counter_ns() - 100 * SECOND, 200.0)
            await use(load)
        finally:
            await load.close()
        return load

    with scripted(lambda _: rows()) as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(url))


def test_a_request_given_up_before_its_first_step_costs_no_caller() -> None:
    """Sent and given up in one turn of the loop: it has failed, and its caller takes the next one."""

    async def use(load: OpenLoop) -> None:
        caller = load.free.popleft()
        now = time.perf_counter_ns()
        caller.send(InFlight(now, load.next_request(now)))
        caller.fail("timeout")
        async with asyncio.timeout(30):
            while not load.free:
                await asyncio.sleep(0.001)
        assert caller.usable()

    assert with_load(use).recorder.total().errors == {"timeout": 1}


@ENGINES
def test_what_waited_longer_than_the_timeout_is_not_sent(engine: str) -> None:
    """A caller that comes free finds the first in the queue expired: that has failed, and its wait is counted."""

    async def use(load: OpenLoop) -> None:
        caller = load.free.popleft()
        due = time.perf_counter_ns() - 2 * SECOND
        load.waiting.append(InFlight(due, load.next_request(due)))
        load.ready(caller)
        assert list(load.free) == [caller]

    total = with_load(use, engine=engine, timeout=1.0).recorder.total()
    assert (total.errors, total.queued.num) == ({"timeout": 1}, 1)
    assert total.queued.max >= 2 * SECOND


def test_an_open_loop_lasts_as_long_as_its_phases() -> None:
    """Phases in which nothing is due take their time, at the end too."""
    phases = (Phase(seconds=0.1, rate=100.0), Phase(seconds=0.6, rate=0.0))
    with scripted(lambda _: rows()) as url:
        begin = time.monotonic()
        load, total = drive(scenario(url, engine="raw", phases=phases))
    assert time.monotonic() - begin >= 0.7
    assert (total.offered, total.ok, load.unsent) == (10, 10, 0)


@ENGINES
def test_checking_a_reply_is_not_the_servers_time(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that takes 300 ms is in no service time."""
    monkeypatch.setattr(ResponseCheck, "problem", lambda *_: time.sleep(0.3))
    with scripted(lambda _: rows()) as url:
        _, total = drive(scenario(url, engine=engine, mode="closed", connections=1, seconds=0.5))
    assert total.ok >= 1
    assert total.service.percentile(1) < 0.3e9


def test_waiting_awake_is_not_work() -> None:
    """A timer says how long it was awake with nothing to do, and an open loop is not busy with that."""

    async def use(load: OpenLoop) -> None:
        rung = asyncio.Event()
        load.timer = Timer(rung.set)
        for _ in range(20):
            rung.clear()
            load.timer.set(time.perf_counter_ns() + 90_000)
            await asyncio.wait_for(rung.wait(), 30)
        assert 0 < load.timer.spun <= 20 * 90_000
        before = time.process_time()
        assert load.spent() < before
        load.timer.close()

    with_load(use)


@ENGINES
def test_a_warm_up_leaves_no_trace(engine: str) -> None:
    """Wrong replies and lost connections of the warm-up are in neither the counts nor the marks."""
    phases = (Phase(name="warm", seconds=1.0, rate=20.0, warmup=True), Phase(seconds=0.3, rate=20.0))
    answers: list[Answer] = [rows(said=9), CLOSE]
    with scripted(lambda number: answers[number] if number < 2 else rows()) as url:
        result = worker_pool.run(scenario(url, engine=engine, phases=phases, timeout=30.0))
    assert result.total().errors == {}
    assert (result.marks, result.generator.reconnects) == ([], 0)


def test_a_restarted_watch_forgets_what_went_before() -> None:
    """A pause before it is none of the measurement."""
    times = iter([0, 5 * SECOND, 5 * SECOND + 1])
    watch = ClockWatch(lambda: 0, lambda: next(times))
    watch.restart()
    watch.look()
    assert (watch.paused, watch.longest) == (0.0, 1)


def test_what_was_not_sent_is_known_without_counting_it() -> None:
    """Of ten million requests that were due in a second, each of two processes knows its half."""
    phases = (Phase(name="warm", seconds=0.5, rate=3.0, warmup=True), Phase(seconds=1.0, rate=9_999_999.0))
    asked = scenario("http://127.0.0.1:9", phases=phases)

    async def due(share: int) -> int:
        load, _ = make_load(asked, share, 2, {"item": NUM_IDS})
        schedule(load, asked, 0, share, 2)
        assert isinstance(load, OpenLoop)
        return load.num_due

    assert [asyncio.run(due(share)) for share in (0, 1)] == [5_000_001, 5_000_000]
