"""What the generator can do at most: the same load on a server that does nothing."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
from msgspec.structs import replace

from loadtest.errors import LoadError
from loadtest.run import worker_pool
from loadtest.scenario.model import Phase, Scenario
from loadtest.scenario.target import api_headers, list_tables, tls_context
from loadtest.workload.request_stream import RequestStream

SECONDS, WARMUP_SECONDS = 2.0, 0.5
NUM_REPLIES = 8
HOP = frozenset({"connection", "content-length", "date", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """ceiling: replies a second that the generator takes in when the server costs nothing, all its callers busy;
    floor_us: the median service time of one caller alone, below which no server can be measured."""

    ceiling: float
    floor_us: float


def calibrate(
    scenario: Scenario,
    *,
    seconds: float = SECONDS,
    stop: threading.Event | None = None,
    num_ids: Mapping[str, int] | None = None,
) -> Calibration:
    """Run the scenario's requests in a closed loop, with its engine and processes, on a server that sends replies which
    the real one gave; LoadError when that gives none. The server that does nothing speaks plain HTTP on loopback.

    stop: once set, this ends with KeyboardInterrupt: half a calibration is none.
    num_ids: of every table of the scenario; without it the server is asked.
    """
    if num_ids is None:
        num_ids = list_tables(scenario)
    replies = _replies(scenario, num_ids)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_idle_server(replies)) for _ in range(scenario.processes)]
        whole = _closed(scenario, num_ids, idle, seconds, stop)
        alone = _closed(replace(scenario, connections=1, processes=1), num_ids, idle[:1], seconds / 2, stop)
    return Calibration(ceiling=whole[0], floor_us=alone[1])


def _closed(
    scenario: Scenario, num_ids: Mapping[str, int], idle: Sequence[str], seconds: float, stop: threading.Event | None
) -> tuple[float, float]:
    """Replies a second and the median service time in microseconds, each process with an idle server of its own."""
    phases = (Phase(name="warm-up", seconds=WARMUP_SECONDS, warmup=True), Phase(seconds=seconds))
    closed = replace(scenario, mode="closed", phases=phases, events=())
    result = worker_pool.run(closed, num_ids=num_ids, stop=stop, idle=idle)
    if result.partial:
        raise KeyboardInterrupt
    total = result.total()
    if total.failures or not total.ok:
        raise LoadError(f"calibration failed: {dict(total.failures) or 'no request was answered'}")
    return total.ok / result.seconds, total.service.percentile(50) / 1e3


def _replies(scenario: Scenario, num_ids: Mapping[str, int]) -> list[bytes]:
    """Replies of the real server to the scenario's first requests, as they travel."""
    source, found = RequestStream(scenario, 0, 1, dict(num_ids)), []
    url = scenario.url.rstrip("/")
    try:
        with httpx.Client(verify=tls_context(scenario), timeout=scenario.timeout, trust_env=False) as client:
            for _ in range(NUM_REPLIES):
                request = source.next(0.0)
                headers = [*request.headers, *api_headers(scenario)]
                reply = client.request(request.method, url + request.target, headers=headers, content=request.body)
                if reply.status_code != 200:
                    raise LoadError(f"calibration: {request.kind} was answered with {reply.status_code}, not 200")
                found.append(_wire(reply))
    except httpx.HTTPError as error:
        raise LoadError(f"calibration: {scenario.url} does not answer: {error}") from error
    return found


def _wire(reply: httpx.Response) -> bytes:
    """A reply as bytes of HTTP/1.1."""
    lines = ["HTTP/1.1 200 OK", *(f"{n}: {v}" for n, v in reply.headers.multi_items() if n.lower() not in HOP)]
    return "\r\n".join([*lines, f"content-length: {len(reply.content)}", "", ""]).encode("latin-1") + reply.content


@contextlib.contextmanager
def _idle_server(replies: list[bytes]) -> Iterator[str]:
    """The address of a server process that gives these replies."""
    command = [sys.executable, "-m", "loadtest.run.idle_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            texts = [base64.b64encode(reply).decode() for reply in replies]
            process.stdin.write(json.dumps({"replies": texts}).encode() + b"\n")
            process.stdin.flush()
            port = process.stdout.readline().strip().decode()
            if not port:
                raise LoadError("calibration: the server that does nothing did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
