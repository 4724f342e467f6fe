"""A load generator that spends its core on sockets: prepared bytes out, a status line and a length read back.

Closed loop: every connection sends its next request when the last was answered; finds what a server can do.
Open loop: requests are due at times fixed beforehand, whatever the server does; finds what its users wait. A latency
runs from when a request was due, so a server that stalls is charged for everything that was due meanwhile, and so is
the time a request waits here for a free connection. How late the generator itself was is reported beside it.

`python -m loadtest.run.raw` reads {"loads": [{"requests": FILE, ... fields of Plan}]} and prints a report for each.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from loadtest.generator.loops import ClosedLoop, Load, OpenLoop
from loadtest.generator.raw_engine import Prewritten
from loadtest.generator.recorder import SECOND, Recorder
from loadtest.results.report import Report
from loadtest.run.plan import LoadError as LoadError
from loadtest.run.plan import Plan as Plan
from loadtest.run.plan import due_times
from loadtest.workload.prewritten import read_requests


def run(loads: Sequence[tuple[Plan, Sequence[bytes]]]) -> list[Report]:
    """Run loads at the same time on one core, each cycling through its requests; LoadError when none can connect."""
    for _, requests in loads:
        if not requests:
            raise LoadError("a load needs at least one request")
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # nothing made for a request is a cycle, and a collection would be a pause of ours
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(loads))
    finally:
        if collects:
            gc.enable()


async def _run(loads: Sequence[tuple[Plan, Sequence[bytes]]]) -> list[Report]:
    made = [(plan, _made(plan, requests)) for plan, requests in loads]
    try:
        await asyncio.gather(*(load.connect() for _, load in made))
        return list(await asyncio.gather(*(_measure(plan, load) for plan, load in made)))
    finally:
        await asyncio.gather(*(load.close() for _, load in made))


def _made(plan: Plan, requests: Sequence[bytes]) -> Load:
    kind = ClosedLoop if plan.rate is None else OpenLoop
    engine, recorder = Prewritten(plan.address, requests), Recorder(0, plan.seconds)
    return kind(engine, recorder, connections=plan.connections, timeout=plan.timeout, address=plan.address)


async def _measure(plan: Plan, load: Load) -> Report:
    now = time.perf_counter_ns()
    recorder = load.recorder = Recorder(now + round(plan.warmup * SECOND), plan.seconds)
    if isinstance(load, OpenLoop):
        load.schedule = due_times(plan, now, recorder.end)
    await load.run()
    mode = "closed" if plan.rate is None else "open"
    report = Report(mode=mode, seconds=plan.seconds, connections=plan.connections, rate=plan.rate)
    report.merge(recorder.total())
    report.in_time, report.ok_in_time = recorder.in_time, recorder.ok_in_time
    report.reconnects, report.busy = recorder.reconnects, round(load.busy, 3)
    return report


def main() -> int:
    """Loads from stdin, reports to stdout; an error is one line on stderr and exit code 1."""
    try:
        asked: list[dict[str, Any]] = json.load(sys.stdin)["loads"]
        loads = [
            (Plan(**{k: v for k, v in a.items() if k != "requests"}), read_requests(Path(a["requests"]))) for a in asked
        ]
        reports = run(loads)
    except (LoadError, ValueError, OSError) as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    json.dump([report.to_json() for report in reports], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
