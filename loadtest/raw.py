"""A load generator that spends its core on sockets: prepared bytes out, a status line and a length read back.

Closed loop: every connection sends its next request when the last was answered; finds what a server can do.
Open loop: requests are due at times fixed beforehand, whatever the server does; finds what its users wait. A latency
runs from when a request was due, so a server that stalls is charged for everything that was due meanwhile, and so is
the time a request waits here for a free connection. How late the generator itself was is reported beside it.

`python -m loadtest.raw` reads {"loads": [{"requests": FILE, ... fields of Plan}]} and prints a report for each.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from loadtest.loops import ClosedLoop, OpenLoop
from loadtest.plan import LoadError as LoadError
from loadtest.plan import Plan as Plan
from loadtest.plan import split
from loadtest.report import Report
from loadtest.workload import read_requests


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
    made = [(ClosedLoop if plan.rate is None else OpenLoop)(plan, requests) for plan, requests in loads]
    try:
        await asyncio.gather(*(load.connect() for load in made))
        return list(await asyncio.gather(*(load.run() for load in made)))
    finally:
        for load in made:
            load.close()
        await asyncio.sleep(0)  # transports say goodbye in the loop's next turn


def run_processes(plan: Plan, requests: Path, processes: int) -> Report:
    """Run one load from several processes, each with its share of connections and rate; requests as a file."""
    asked = [json.dumps({"loads": [asdict(share) | {"requests": str(requests)}]}) for share in split(plan, processes)]
    with ThreadPoolExecutor(processes) as pool:
        ran = list(pool.map(_run_process, asked))
    wrong = [process.stderr.strip() for process in ran if process.returncode]
    if wrong:
        raise LoadError(wrong[0])
    reports = [Report.from_json(json.loads(process.stdout)[0]) for process in ran]
    for report in reports[1:]:
        reports[0].merge(report)
    return reports[0]


def _run_process(asked: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest.raw"]
    return subprocess.run(command, input=asked, capture_output=True, text=True, check=False)


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
