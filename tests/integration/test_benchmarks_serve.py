"""`python -m benchmarks.serve` measures what it says, says what it could not measure, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import serve as bench
from benchmarks.grid import grid
from benchmarks.load import closed
from benchmarks.processes import Server, cores, on_cores
from benchmarks.servers import TABLES, Servers, Sizes, publish
from benchmarks.show import Row
from embstore.errors import ConfigError, EmbstoreError

SMALL = Sizes(num_ids=2_000, dim=32, dhe_ids=1_000, dhe_bytes=50_000)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Small tables, measured for a moment, once."""
    with ExitStack() as stack:
        made = Servers(tmp_path_factory.mktemp("bench"), SMALL, 0.15, 1, stack)
        publish(made.store, SMALL)
        yield made


def test_candidates_stand_beside_the_limit(servers: Servers) -> None:
    """A comparison has every candidate's requests a second, and its ratio to the app that looks nothing up."""
    rows = bench.beside_limit(servers, 10, servers.target("qr", 10))
    assert [(row["candidate"], row["ids"]) for row in rows] == [("limit", 10), ("qr", 10)]
    assert rows[0]["x limit"] == 1
    assert all(float(str(row["requests/s"])) > 0 for row in rows)


def test_latency_and_overload_have_their_figures(servers: Servers) -> None:
    """Percentiles at half of saturation beside the limit's; past saturation what is answered, and the probes."""
    (limit, full), (over,) = bench.latency(servers), bench.overload(servers)
    assert (limit["candidate"], full["candidate"]) == ("limit", "full")
    assert 0 < float(str(full["p50 us"])) <= float(str(full["p99 us"]))
    assert 0 < float(str(over["answered"])) <= float(str(over["due"]))
    assert over["failed probes"] == 0
    assert float(str(over["slowest probe ms"])) > 0


def test_the_grid_has_a_latency_for_everything_that_happens(servers: Servers) -> None:
    """One combination has p50 / p99 idle, while versions are swapped, with the cache cold and with it hot."""
    (row,) = grid(servers, (("full", "octet", 10, "zipf"),))
    assert {"idle us", "swap us", "cold us", "hot us"} <= set(row)
    assert all(" / " in str(value) for name, value in row.items() if name.endswith("us"))


def test_every_table_is_published(servers: Servers) -> None:
    """The tables that rows compare are in the store, the two that are swapped in two versions."""
    import embstore

    store = embstore.open_store(servers.store)
    assert {name: len(store.versions(name)) for name in TABLES} == dict.fromkeys(TABLES, 1) | {"full": 2, "dhe": 2}


def test_memory_and_processes_of_a_server_are_read(servers: Servers) -> None:
    """A server's processes begin with itself, and a part of its resident memory is its own."""
    server = servers.base()
    assert server.pids()[0] == server.process.pid
    assert server.resident_mb() > server.private_mb()[0] > 1


def test_a_request_that_fails_is_an_error(servers: Servers) -> None:
    """No figure comes of a load whose requests are refused, nor of one that nobody answers."""
    target = servers.target("full", 10)
    with pytest.raises(EmbstoreError, match="full: no request was answered"):
        closed(replace(target, table="nothing"), 0.1)
    with pytest.raises(EmbstoreError, match=r"full: the load failed: .*127\.0\.0\.1:1"):
        closed(replace(target, url="http://127.0.0.1:1"), 0.1)


def test_a_row_that_cannot_be_measured_says_why_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints both, as JSON and as tables, and fails."""

    def refuse(_: Servers) -> list[Row]:
        raise EmbstoreError("the server ended: no reason")

    good: Row = {"candidate": "full", "requests/s": 1234}
    monkeypatch.setattr(bench, "ROWS", {"good": ("all is well", lambda _: [good]), "bad": ("nothing is", refuse)})
    monkeypatch.setattr(bench, "publish", lambda *_: None)
    for as_json in (False, True):
        with pytest.raises(bench.typer.Exit) as stopped:
            bench.main(json=as_json)
        assert stopped.value.exit_code == 1
    shown, _, given = capsys.readouterr().out.partition("\n{")
    assert "### good: all is well\n\n| candidate | requests/s |\n|---|---|\n| full | 1234 |" in shown
    assert "the server ended: no reason" in shown
    found = json.loads("{" + given)["tables"]
    assert found["good: all is well"] == [good]
    assert found["bad: nothing is"] == [{"failed": "the server ended: no reason"}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ["octets"]}, "there is no row octets; there are octet-10, "),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"seconds": 0}, "--seconds must be between 0.05 and 3600, got 0"),
    ],
    ids=["rows", "rounds", "seconds"],
)
def test_a_flag_that_means_nothing_is_refused(
    options: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong flags are a ConfigError before anything is built."""
    monkeypatch.setattr(bench, "publish", lambda *_: pytest.fail("built something"))
    given = {"names": [], "sizes": SMALL, "seconds": 1.0, "rounds": 1} | options
    with pytest.raises(ConfigError, match=said):
        bench.measure(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_nothing_is_left_when_it_is_stopped(tmp_path: Path, number: int) -> None:
    """Servers, load and folder are gone, and the exit code is that of Ctrl-C."""
    flags = ["--rows", "protocols-10", "--seconds", "60", "--num-ids", "2000", "--dim", "32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve", *flags],
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


def test_a_server_that_does_not_start_says_its_last_line(tmp_path: Path) -> None:
    """The error is the server's own, not a wait until the end of patience."""
    with pytest.raises(EmbstoreError, match="the server ended: embstore: No such command 'sreve'"):
        Server(("embstore", "sreve"), tmp_path / "log", ())


def test_cores_are_given_back() -> None:
    """What is started inside inherits the cores; outside everything is as it was."""
    before = cores()
    with on_cores(before[:1]):
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(inside) == before[:1]
    assert cores() == before
