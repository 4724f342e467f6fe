"""The load generator against servers that stall, refuse, lie and hang up: what it says is what happened."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.ill_server import CLOSE, RESET, SILENCE, Answer, scripted

from loadtest.results.histogram import Histogram
from loadtest.results.report import Report
from loadtest.run.plan import due_times
from loadtest.run.raw import LoadError, Plan, run
from loadtest.workload.prewritten import (
    get_request,
    infer_requests,
    json_requests,
    octet_requests,
    read_requests,
    write_requests,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\ncontent-length: 0\r\n\r\n"
GOODBYE = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbye"


def load(url: str, **fields: object) -> Report:
    """One load of GETs."""
    plan = Plan(**({"url": url, "seconds": 0.3, "connections": 2} | fields))  # type: ignore[arg-type]
    return run([(plan, [get_request("test", "/")])])[0]


def stalls_once() -> Callable[[int], Answer]:
    """Half a second of nothing, a fifth of a second after the first request."""
    begin: list[float] = []
    stalled: list[bool] = []

    def answer(number: int) -> Answer:
        begin.append(time.monotonic()) if not begin else None
        if not stalled and time.monotonic() - begin[0] > 0.2:
            stalled.append(True)
            time.sleep(0.5)
        return OK

    return answer


def test_an_open_loop_sees_a_stall_and_a_closed_loop_does_not() -> None:
    """Half a second without answers is in p99 of all that was due then; a closed loop asks for nothing meanwhile."""
    with scripted(stalls_once()) as url:
        open_loop = load(url, seconds=1.5, rate=200.0, arrivals="constant", connections=8)
    with scripted(stalls_once()) as url:
        closed_loop = load(url, seconds=1.5)
    assert open_loop.statuses == {200: 300}
    assert 0.4e9 < open_loop.latency.percentile(99) < 5e9
    assert open_loop.latency.percentile(85) > 0.1e9
    assert closed_loop.latency.most > 0.4e9
    assert closed_loop.latency.percentile(99) < 0.1e9


def test_statuses_are_counted_and_only_successes_are_goodput() -> None:
    """Refusals have times of their own, and their Retry-After is counted."""
    with scripted(lambda number: BUSY if number % 2 else OK) as url:
        report = load(url, connections=1)
    assert report.errors == {}
    assert report.statuses[200] > 10
    assert abs(report.statuses[200] - report.statuses[429]) <= 1
    assert report.retry_after == report.statuses[429] == report.refused.num
    assert report.statuses[200] == report.latency.num
    assert 0 <= report.latency.num - report.ok_in_time <= 1  # the last reply may come after the end
    assert report.goodput == pytest.approx(report.requests_per_s / 2, rel=0.2)
    assert report.reconnects == 0


def test_a_connection_that_the_server_ends_after_a_reply_is_no_error() -> None:
    """`connection: close` is obeyed, the reply counts, and the load goes on over a new connection."""
    with scripted(lambda _: GOODBYE) as url:
        report = load(url)
    assert report.errors == {}
    assert set(report.statuses) == {503}
    assert report.reconnects >= report.statuses[503] > 3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (CLOSE, "closed"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", b"", CLOSE], "truncated"),
        (RESET, "reset"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nok", "protocol"),
        (b"HTTP/1.1 200 OK\r\n\r\nok", "protocol"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok", "protocol"),
        (b"EHLO there\r\ncontent-length: 0\r\n\r\n", "protocol"),
        (b"x" * 70_000, "protocol"),
    ],
    ids=[
        "closes",
        "closes amid",
        "resets",
        "more than it said",
        "no length",
        "a length of letters",
        "another protocol",
        "no end",
    ],
)
def test_what_is_no_reply_is_an_error_of_its_kind(answer: Answer, kind: str) -> None:
    """Each is counted once, and every second request, which is answered well, still is."""
    with scripted(lambda number: OK if number % 2 else answer) as url:
        report = load(url, connections=1)
    assert set(report.errors) == {kind}
    assert set(report.statuses) == {200}
    assert report.errors[kind] > 1
    assert report.statuses[200] > 1


def test_a_reply_that_is_too_short_ends_by_timeout() -> None:
    """Fewer bytes than said are waited for as long as the plan allows."""
    with scripted(lambda _: b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok") as url:
        report = load(url, seconds=0.5, timeout=0.1)
    assert set(report.errors) == {"timeout"}
    assert report.statuses == {}


def test_replies_in_pieces_are_put_together() -> None:
    """A head in three parts, a body in two: one reply, all bytes of its body counted."""
    pieces = [b"HTTP/1.1 2", b"00 OK\r\nConte", b"nt-length: 6\r\n\r", b"\nabc", b"def"]
    with scripted(lambda _: pieces) as url:
        report = load(url, rate=20.0, arrivals="constant", seconds=0.5)
    assert (report.statuses, report.errors) == ({200: 10}, {})
    assert report.num_bytes == 10 * len(b"abcdef")


def test_requests_wait_for_a_free_connection_and_time_out_there_too() -> None:
    """One connection, no answers: what is sent and what still waits has failed when its time is over."""
    with scripted(lambda _: SILENCE) as url:
        report = load(url, rate=50.0, arrivals="constant", connections=1, seconds=0.5, timeout=0.2)
    assert report.offered == 25
    assert report.errors["timeout"] == 25
    assert report.latency.num == 0


def test_the_wait_for_a_connection_is_part_of_the_latency() -> None:
    """At twice of what one connection can do, the latest requests have waited about half of the run."""
    with scripted(lambda _: [b"", b"", b"", b"", b"", OK]) as url:  # 10 ms each
        report = load(url, rate=200.0, arrivals="constant", connections=1, seconds=0.5)
    assert report.statuses == {200: 100}
    assert report.queued.num > 50
    assert report.latency.most > report.queued.most > 0.2e9
    assert report.ok_in_time < 100
    assert report.queued.percentile(99) > report.lag.percentile(50)


def test_warm_up_is_left_out() -> None:
    """Requests due before the measurement are sent and not counted."""
    seen = list[int]()

    def answer(number: int) -> Answer:
        seen.append(number)
        return OK

    with scripted(answer) as url:
        report = load(url, rate=100.0, arrivals="constant", seconds=0.3, warmup=0.3)
    assert report.offered == 30
    assert report.statuses == {200: 30}
    assert 55 <= len(seen) <= 60


def test_loads_run_at_the_same_time() -> None:
    """A probe beside a load has a report of its own."""
    with scripted(lambda _: OK) as url:
        plans = [Plan(url=url, seconds=0.3, rate=rate, arrivals="constant", connections=2) for rate in (300.0, 20.0)]
        reports = run([(plan, [get_request("test", "/")]) for plan in plans])
    assert [report.offered for report in reports] == [90, 6]


def test_nobody_listening_is_one_line() -> None:
    """LoadError says where, in this process and in another."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(LoadError, match=f"cannot connect to 127.0.0.1:{port}: "):
            load(f"http://127.0.0.1:{port}")


def test_the_command_says_what_is_wrong() -> None:
    """One line on stderr, exit code 1."""
    asked = json.dumps({"loads": [{"url": "ftp://x", "seconds": 1, "requests": "none"}]})
    ran = subprocess.run([sys.executable, "-m", "loadtest.run.raw"], input=asked, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "loadtest: url must begin with http:// and a host, got 'ftp://x'\n"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"url": "https://127.0.0.1"}, "http://"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"connections": 0}, "connections at least 1"),
        ({"warmup": -1.0}, "warmup at least 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"arrivals": "bursts"}, "poisson or constant"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_plan_that_means_nothing_is_refused(field: dict[str, object], said: str) -> None:
    """The message says what would be right."""
    with pytest.raises(ValueError, match=said):
        Plan(**({"url": "http://127.0.0.1:1", "seconds": 1.0} | field))  # type: ignore[arg-type]


def test_due_times_are_fixed_beforehand() -> None:
    """Constant gaps are even; Poisson gaps have the mean of the rate, spread as wide, the same for the same seed."""
    plan = Plan(url="http://h", seconds=1.0, rate=1000.0, seed=3)
    even = Plan(url="http://h", seconds=1.0, rate=1000.0, arrivals="constant")
    assert list(due_times(even, 5, 3_000_005)) == [5, 1_000_005, 2_000_005]
    gaps = np.diff(list(due_times(plan, 0, 20 * 10**9)))
    assert gaps.mean() == pytest.approx(1e6, rel=0.05)
    assert gaps.std() == pytest.approx(1e6, rel=0.05)
    assert list(due_times(plan, 0, 10**9)) == list(due_times(plan, 0, 10**9))


def test_a_report_says_when_the_generator_set_the_figures() -> None:
    """A closed loop by its share of the core, an open one by its lag beside the latency."""
    assert "99% of its core" in str(Report(mode="closed", seconds=1, connections=1, busy=0.99).bottleneck)
    assert Report(mode="closed", seconds=1, connections=1, busy=0.5).bottleneck is None
    times = {"lag": Histogram([10**6] * 100), "latency": Histogram([2 * 10**6] * 100)}
    assert "p99 of its lag is 1.00 ms, of the latency 2.00 ms" in str(
        Report(mode="open", seconds=1, connections=1, **times).bottleneck  # type: ignore[arg-type]
    )
    assert Report(mode="open", seconds=1, connections=1, latency=Histogram([10**6])).bottleneck is None


def test_a_report_is_read_back_from_json() -> None:
    """Everything that was counted comes back."""
    with scripted(lambda number: BUSY if number % 3 else CLOSE) as url:
        report = load(url, rate=100.0)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_requests_are_complete_and_read_back(tmp_path: Path) -> None:
    """Bytes of HTTP for each protocol, the same from a file."""
    ids = np.array([[1, -2]], np.int64)
    (octet,), (text,) = octet_requests("h:1", "/o", ids), json_requests("h:1", "/j", ids)
    (infer,) = infer_requests("h:1", "/i", ids)
    assert octet.startswith(b"POST /o HTTP/1.1\r\nHost: h:1\r\nContent-Type: application/octet-stream\r\n")
    assert octet.endswith(b"Content-Length: 16\r\n\r\n" + ids.astype("<i8").tobytes())
    assert text.endswith(b'Content-Length: 14\r\n\r\n{"ids":[1,-2]}')
    head, _, body = infer.partition(b"\r\n\r\n")
    size = int(head.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0])
    assert json.loads(body[:size])["inputs"][0]["shape"] == [2]
    assert body[size:] == ids.astype("<i8").tobytes()
    write_requests(tmp_path / "requests", [octet, text, infer])
    assert read_requests(tmp_path / "requests") == [octet, text, infer]
