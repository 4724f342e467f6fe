"""A server that stands still for half a second: what an open loop says of it, and what a closed loop hides."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.driving import scenario
from support.serving import ServerProcess, serving

import embstore
from loadtest.results.result import Result
from loadtest.run import worker_pool
from loadtest.run.progress import Progress
from loadtest.scenario.model import Scenario

STALL_SECONDS = 0.5
ENOUGH = 250
"""Requests of the closed loop of which one is less than 1 %."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server."""
    folder = tmp_path_factory.mktemp("stall")
    embstore.open_store(folder / "store").publish("item", np.ones((100, 4), np.float32))
    with serving(folder / "store", folder / "log") as running:
        yield running


def run_with_stall(server: ServerProcess, open_loop: Scenario, closed_loop: Scenario) -> tuple[Result, Result]:
    """Two load tests at the same time; the server stands still once, and when the closed loop has enough, both end."""
    begun: list[int] = []
    all_begun, enough, stop = threading.Barrier(3, timeout=60), threading.Event(), threading.Event()

    def on_begin(begin: int) -> None:
        begun.append(begin)
        all_begun.wait()

    def on_progress(progress: Progress) -> None:
        if progress.ok >= ENOUGH:
            enough.set()

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(worker_pool.run, open_loop, on_begin=on_begin, stop=stop)
        beside = pool.submit(worker_pool.run, closed_loop, on_begin=on_begin, on_progress=on_progress, stop=stop)
        all_begun.wait()
        time.sleep(max(0.0, (max(begun) - time.perf_counter_ns()) / 1e9 + 0.5))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            time.sleep(STALL_SECONDS)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert enough.wait(60)
        stop.set()
        return running.result(60), beside.result(60)


@pytest.mark.parametrize("engine", ["httpx", "raw"])
def test_an_open_loop_shows_a_stall_and_a_closed_loop_does_not(server: ServerProcess, engine: str) -> None:
    """Of one stall, p99 of the open loop has at least 300 of its 500 ms; of the closed loop one request is slow,
    which only its maximum knows."""
    about = {"seconds": 90.0, "engine": engine, "timeout": 20.0}
    open_loop, closed_loop = run_with_stall(
        server,
        scenario(server.url, mode="open", rate=60.0, connections=8, **about),
        scenario(server.url, mode="closed", connections=1, **about),
    )
    seen, hidden = open_loop.total(), closed_loop.total()
    assert abs(open_loop.seconds - closed_loop.seconds) < 10
    assert seen.ok + seen.errors["unanswered"] == seen.offered
    assert seen.latency.percentile(99) >= 300e6
    assert hidden.latency.max >= 300e6
    assert hidden.latency.percentile(99) < 300e6
    assert hidden.ok >= ENOUGH
