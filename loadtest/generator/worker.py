"""One generator process. `python -m loadtest.generator.worker` reads lines of JSON and prints lines of JSON.

In: a job {"scenario", "share", "shares", "num_ids", "checked"}, then {"begin": nanoseconds of time.perf_counter_ns}.
Out: {"ready": true} once all connections are open, {"progress"} twice a second, {"result"}; or {"error": text}.
When its stdin ends, or at SIGINT or SIGTERM, it sends no more and prints what it has.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import os
import signal
import sys
import time
from operator import length_hint
from typing import Any
from urllib.parse import urlsplit

import uvloop

from loadtest.errors import LoadError, ScenarioError
from loadtest.generator.clock_watch import EVERY_SECONDS, ClockWatch
from loadtest.generator.httpx_engine import HttpxEngine
from loadtest.generator.interfaces import Engine
from loadtest.generator.loops import ClosedLoop, Load, OpenLoop
from loadtest.generator.raw_engine import RawEngine
from loadtest.generator.recorder import SECOND, Recorder
from loadtest.scenario.model import Scenario
from loadtest.scenario.target import api_headers, tls_context
from loadtest.workload.request_stream import RequestStream
from loadtest.workload.schedule import due_offsets, expected

PROGRESS_EVERY = 5
"""Looks at the clock between two lines of progress."""
EARLY_SECONDS = 0.01
"""The loop is there this much before the first request is due."""


def say(**line: Any) -> None:
    """A line to whoever started this."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Orders:
    """What comes in on stdin after the job, and signals: when to begin, when to stop."""

    def __init__(self, load: Load) -> None:
        self.load, self.text = load, b""
        self.begin: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        loop.add_reader(0, self._read)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)

    def _read(self) -> None:
        data = os.read(0, 4096)
        self.text += data
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            self.stop()
        elif self.text.endswith(b"\n") and not self.begin.done():
            self.begin.set_result(int(json.loads(self.text)["begin"]))

    def stop(self) -> None:
        """Now."""
        if not self.begin.done():
            self.begin.set_result(None)
        self.load.stop()


async def generate(job: dict[str, Any]) -> None:
    """Do a job."""
    scenario, share, shares = Scenario.from_json(job["scenario"]), int(job["share"]), int(job["shares"])
    load, source = make_load(scenario, share, shares, job["num_ids"])
    load.checked = job["checked"]
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, about: load.broken(about.get("exception") or RuntimeError(about["message"])))
    orders, watch = Orders(load), ClockWatch()
    try:
        await load.connect()
        gc.collect()
        gc.freeze()  # what is here stays; a collection that looks at it again would be a pause of ours
        say(ready=True)
        begin = await orders.begin
        if begin is not None:
            schedule(load, scenario, begin, share, shares)
            watching = asyncio.create_task(_watch(load, watch))
            await asyncio.sleep((begin - time.perf_counter_ns()) / SECOND - EARLY_SECONDS)
            await load.run()
            watching.cancel()
        say(result=_result(load, source, watch))
    finally:
        await load.close()


def make_load(scenario: Scenario, share: int, shares: int, num_ids: dict[str, int]) -> tuple[Load, RequestStream]:
    """The loop of one share of a scenario, not yet connected, and where its requests come from."""
    source = RequestStream(scenario, share, shares, num_ids)
    headers = api_headers(scenario)
    engine: Engine
    if scenario.engine == "raw":
        engine = RawEngine(scenario.url, source, headers)
    else:
        engine = HttpxEngine(scenario.url, source, headers, tls_context(scenario))
    parts = urlsplit(scenario.url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    connections = scenario.connections // shares + (share < scenario.connections % shares)
    kind = ClosedLoop if scenario.mode == "closed" else OpenLoop
    recorder = Recorder(0, scenario.seconds)
    return kind(engine, recorder, connections=connections, timeout=scenario.timeout, address=address), source


def schedule(load: Load, scenario: Scenario, begin: int, share: int = 0, shares: int = 1) -> None:
    """Let a load begin its warm-up at `begin`, in nanoseconds of time.perf_counter_ns."""
    load.recorder = Recorder(begin + round(scenario.warmup_seconds * SECOND), scenario.seconds)
    if isinstance(load, OpenLoop):
        offsets, total = due_offsets(scenario, share, shares), expected(scenario)
        load.num_due = length_hint(offsets) if total is None else math.ceil((total - share) / shares)
        load.schedule = (begin + offset for offset in offsets)


async def _watch(load: Load, watch: ClockWatch) -> None:
    for look in itertools.count(1):
        await asyncio.sleep(EVERY_SECONDS)
        if time.perf_counter_ns() < load.recorder.begin:
            watch.restart()  # nothing is measured yet
        else:
            watch.look()
        if look % PROGRESS_EVERY == 0:
            try:
                say(progress=load.recorder.progress())
            except OSError:  # nobody reads it any more
                load.stop()
                return


def _result(load: Load, source: RequestStream, watch: ClockWatch) -> dict[str, Any]:
    recorder = load.recorder
    until = recorder.end if load.stopped is None else min(load.stopped, recorder.end)
    return recorder.to_json() | {
        "stopped": load.stopped is not None,
        "seconds": max(0.0, (until - recorder.begin) / SECOND) if recorder.begin else 0.0,
        "busy": load.busy,
        "unsent": load.unsent,
        "clock_jumps": watch.jumps,
        "paused": watch.paused,
        "notes": [*source.notes, *(["requests made ahead ran out and came again"] if source.cycled else [])],
    }


def main() -> int:
    """A job from stdin; whatever goes wrong is one line, never a traceback."""
    try:
        job = json.loads(sys.stdin.buffer.readline())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(generate(job))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody is there to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (LoadError, ScenarioError) as error:
        say(error=str(error))
        return 1
    except Exception as error:
        say(error=f"the generator failed: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
