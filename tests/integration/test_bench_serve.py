"""`embstore bench serve` measures every kind of row, says what it could not measure, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore import cli
from embstore.bench import serve as bench
from embstore.bench.load import Load, Target, check
from embstore.bench.processes import Server, cores, on_cores, serving
from embstore.bench.serve import Row, Sizes
from embstore.errors import ConfigError, EmbstoreError
from loadtest.workload.prewritten import get_request, write_requests

SMALL = Sizes(num_ids=2_000, dim=32, dhe_ids=1_000, dhe_bytes=50_000, num_requests=20)
RATES = {"requests_per_s", "ids_per_s", "x", "x_least", "x_most"}


def test_rows_have_their_candidates_and_figures() -> None:
    """Throughput beside the limit, latency at half of saturation, workers with their memory, overload with health."""
    wanted = ("octet-10", "infer-10", "latency", "workers", "overload")
    rows, tool = bench.measure(wanted, seconds=0.15, rounds=1, sizes=SMALL, tool="raw")
    assert tool == "raw"
    assert [row.note for row in rows if not row.figures] == []
    found = {name: {row.candidate: row for row in rows if row.row == name} for name in wanted}
    assert list(found["octet-10"]) == ["limit", *bench.TABLES]
    assert list(found["infer-10"]) == ["limit", "octet", "infer"]
    assert list(found["workers"]) == ["1 worker", "2 workers"]
    for row in [*found["octet-10"].values(), *found["infer-10"].values()]:
        assert set(row.figures) == RATES
        assert row.figures["requests_per_s"] > 0
        assert row.against == "limit"
    assert found["octet-10"]["limit"].figures["x"] == 1
    for row in found["workers"].values():
        assert row.figures["worker_mb"] > 1
        assert row.figures["load_cores"] > 0
    latency = found["latency"]["full"].figures
    assert 0 < latency["p50_us"] <= latency["p99_us"]
    assert latency["errors"] == 0
    overload = found["overload"]["full"].figures
    assert 0 < overload["goodput"] <= overload["offered"]
    assert overload["health_failed"] == 0
    assert overload["health_max_ms"] > 0
    assert min(overload["rss_mb_before"], overload["rss_mb_after"]) > 10


def test_a_row_that_cannot_be_measured_says_why_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints both, as JSON and as tables, and fails."""

    def refuse(_: Any) -> list[Row]:
        raise EmbstoreError("the server ended: no reason")

    good = Row(row="good", candidate="full", ids=10, against="full", figures={"requests_per_s": 1234, "x": 1.5})
    alone = Row(row="alone", candidate="full", ids=10, figures={"p99_us": 1234.5}, note="to be doubted")
    known = {
        "good": ("all is well", lambda _: [good]),
        "bad": ("nothing is", refuse),
        "alone": ("one", lambda _: [alone]),
    }
    monkeypatch.setattr(bench, "ROWS", known)
    monkeypatch.setattr(bench, "publish", lambda *_: None)
    flags = ["embstore", "bench", "serve", "--load", "raw"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*flags, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1
    text = capsys.readouterr().out
    shown, _, given = text.partition("\n{")
    for part in (
        "x full",
        "1,234",
        "p99 us",
        "1,234.5",
        "bad: nothing is",
        "the server ended: no reason",
        "to be doubted",
    ):
        assert part in shown
    rows = json.loads("{" + given)["rows"]
    assert [row["row"] for row in rows] == ["good", "bad", "alone"]
    assert rows[0]["requests_per_s"] == 1234
    assert rows[1]["note"] == "the server ended: no reason"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "octets"], "no row is called octets; there are octet-10, "),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be between 0.05 and 3600, got 0"),
        (["--dim", "7"], "--dim must be even, got 7"),
        (["--num-ids", "10"], "--num-ids must be at least 1000, got 10"),
        (["--load", "ab"], "--load must be one of auto, wrk, raw, got 'ab'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_that_means_nothing_is_one_line(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what would be right, before anything is built."""
    monkeypatch.setattr(sys, "argv", ["embstore", "bench", "serve", *flags])
    monkeypatch.setattr(bench, "publish", lambda *_: pytest.fail("built something"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert said in error[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_nothing_is_left_when_it_is_stopped(tmp_path: Path, number: int) -> None:
    """Servers, load and folder are gone, and the exit code is that of Ctrl-C."""
    command = [
        "embstore",
        "bench",
        "serve",
        "--rows",
        "json-100",
        "--seconds",
        "60",
        "--num-ids",
        "1000",
        "--dim",
        "16",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    started: list[int] = []
    try:
        end = time.monotonic() + 60
        while len(started) < 2:  # the limit and the server
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
            started = children(process.pid)
        process.send_signal(number)
        _, error = process.communicate(timeout=40)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, error
    end = time.monotonic() + 10  # whoever was being started just then is ended by init
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """uvicorn with the app that looks nothing up, 4 bytes for each that it gets."""
    with serving(("embstore.bench.limit", "4"), tmp_path_factory.mktemp("limit") / "log", cores()[:1]) as server:
        yield server


def ask(folder: Path, server: Server, *, reply_bytes: int | None = None) -> Target:
    """A target of ten bytes."""
    host = server.url.removeprefix("http://")
    request = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 10\r\n\r\n0123456789".encode()
    write_requests(folder / "requests", [request])
    return Target("limit", server.url, folder / "requests", reply_bytes)


@pytest.mark.parametrize("tool", ["raw", "wrk"])
def test_either_tool_loads_a_server(limit: Server, tool: str, tmp_path: Path) -> None:
    """Both give replies a second."""
    if tool == "wrk" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    assert Load(tool, tmp_path, cores()[-1:]).closed(ask(tmp_path, limit), 0.2) > 50


def test_wrk_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it `auto` is our own generator, and `wrk` an error that says how to get it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Load("auto", tmp_path, ()).tool == "raw"
    with pytest.raises(ConfigError, match="no wrk on PATH"):
        Load("wrk", tmp_path, ())


def test_a_reply_is_checked_before_it_is_measured(limit: Server, tmp_path: Path) -> None:
    """The right length passes, another does not."""
    check(ask(tmp_path, limit, reply_bytes=40))
    with pytest.raises(EmbstoreError, match="limit: the reply has 40 bytes, not 41"):
        check(ask(tmp_path, limit, reply_bytes=41))


def test_a_load_that_fails_is_one_line(tmp_path: Path) -> None:
    """Where nobody listens there is no rate."""
    write_requests(tmp_path / "requests", [get_request("h", "/")])
    with pytest.raises(EmbstoreError, match=r"the load failed: loadtest: cannot connect to 127\.0\.0\.1:1: "):
        Load("raw", tmp_path, ()).closed(Target("x", "http://127.0.0.1:1", tmp_path / "requests"), 0.2)


def test_a_server_that_does_not_start_says_its_last_line(tmp_path: Path) -> None:
    """The error is the server's own, not a wait until the end of patience."""
    with pytest.raises(EmbstoreError, match="the server ended: embstore: No such command 'sreve'"):
        Server(("embstore", "sreve"), tmp_path / "log", ())


def test_memory_and_processes_of_a_server_are_read(limit: Server) -> None:
    """Itself first, with resident memory, a part of it its own."""
    assert limit.pids()[0] == limit.process.pid
    assert limit.resident_mb() > limit.private_mb()[0] > 1


def test_cores_are_given_back() -> None:
    """What is started inside inherits the cores; outside everything is as it was."""
    before = cores()
    with on_cores(before[:1]):
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(inside) == before[:1]
    assert cores() == before
