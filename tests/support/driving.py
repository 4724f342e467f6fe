"""A load test in this process: for tests that look at the loops and engines themselves."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import uvloop

from loadtest.generator.loops import Load
from loadtest.generator.worker import make_load, schedule
from loadtest.results.tally import Tally
from loadtest.scenario.model import Batch, IdDistribution, Phase, RequestSpec, Scenario
from support.ill_server import NUM_IDS, ROWS

SPEC = RequestSpec(ids=IdDistribution(kind="uniform"), batch=Batch(size=ROWS))


def scenario(url: str, *, seconds: float = 0.5, rate: float = 100.0, **fields: Any) -> Scenario:
    """A short load of lookups that a scripted server can answer, evenly due."""
    given = {
        "phases": (Phase(seconds=seconds, rate=rate),),
        "requests": (SPEC,),
        "arrivals": "constant",
        "connections": 4,
    }
    return Scenario(**(given | {"url": url, "scrape": False} | fields))


def drive(asked: Scenario, stop: threading.Event | None = None) -> tuple[Load, Tally]:
    """Make a load here until its end, or until told to stop; the loop as it ended, and everything that it counted."""

    async def stop_when_told(load: Load, told: threading.Event) -> None:
        while not told.is_set():
            await asyncio.sleep(0.02)
        load.stop()

    async def run() -> Load:
        load, _ = make_load(asked, 0, 1, {"item": NUM_IDS})
        asyncio.get_running_loop().set_exception_handler(lambda _, about: load.broken(RuntimeError(str(about))))
        try:
            await load.connect()
            schedule(load, asked, time.perf_counter_ns())
            stopping = stop and asyncio.create_task(stop_when_told(load, stop))
            await load.run()
            if stopping:
                stopping.cancel()
        finally:
            await load.close()
        return load

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        load = runner.run(run())
    return load, load.recorder.total()
