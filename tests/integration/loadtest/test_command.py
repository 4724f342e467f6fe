"""`embstore loadtest` from end to end: a real server, real runs, what they print and write, how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import ServerProcess, serving

from embstore.publish.store import open_store
from loadtest import command
from loadtest.errors import LoadError
from loadtest.report.files import read_results, results_to_json
from loadtest.results.histogram import Histogram
from loadtest.results.result import Generator, Result
from loadtest.results.tally import Tally
from loadtest.results.validity import GENERATOR_LAG
from loadtest.scenario.model import Event, IdDistribution, Phase, RequestSpec, Scenario
from loadtest.scenario.toml import to_toml
from loadtest.search.find_max import Limits, peak_rate

VECTORS = np.random.default_rng(5).normal(size=(500, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of one table."""
    folder = tmp_path_factory.mktemp("server")
    open_store(folder / "store").publish("item", VECTORS)
    with serving(folder / "store", folder / "log") as running:
        yield running


class Here:
    """The commands in this process, which has already imported what they need."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", ["loadtest", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command.main()
        out, err = self.capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    def fails(self, code: int, *arguments: object) -> str:
        """The one line on stderr with which it ends with this exit code, nothing on stdout."""
        ended, out, err = self(*arguments)
        assert (ended, out) == (code, ""), err
        assert err.startswith("embstore: ")
        assert err.count("\n") == 1
        return err.removeprefix("embstore: ").strip()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The commands, in this process."""
    return Here(monkeypatch, capsys)


BUSY = "all of its core"


def ran(p99_ms: float = 5.0, *, invalid: str = "", status: int = 200, scenario: Scenario | None = None) -> Result:
    """A run of ten requests that took as long each."""
    times = Histogram([int(p99_ms * 1e6)] * 10)
    tally = Tally(offered=10)
    tally.statuses[status] = 10
    tally.latency, tally.refused = (times, Histogram()) if status == 200 else (Histogram(), times)
    return Result(
        scenario=scenario or Scenario(),
        machine={},
        began=0.0,
        seconds=10.0,
        generator=Generator(engine="httpx", processes=1),
        tallies={(0, "octet item"): tally},
        invalid=[invalid] if invalid else [],
    )


def test_runs_from_file_to_report_to_comparison(server: ServerProcess, here: Here, tmp_path: Path) -> None:
    """A run writes its counts, a page and percentiles, with events and the server's metrics in it; two are compared."""
    events = (Event(at=0.2, name="look"), Event(at=0.5, kind="publish", store=str(server.store), table="item"))
    scenario = Scenario(
        url=server.url,
        phases=(Phase(seconds=0.5, rate=40, warmup=True), Phase(seconds=2, rate=40)),
        requests=(RequestSpec(ids=IdDistribution(num_ids=500)),),
        events=events,
        connections=8,
    )
    file, out = tmp_path / "scenario.toml", tmp_path / "a.json"
    file.write_text(to_toml(scenario))
    files = ("--out", out, "--html", tmp_path / "a.html", "--hgrm", tmp_path / "a.hgrm")
    code, printed, err = here(file, *files, "--json")
    assert (code, err) == (0, "")
    (result,) = read_results(out)
    assert result.scenario == scenario
    assert json.loads(printed)["total"]["offered"] == result.total().offered > 20
    assert result.total().ok == result.total().offered
    assert [(mark.name, mark.ok) for mark in result.marks] == [("look", True), ("publish item", True)], result.marks
    assert len(result.samples) >= 2
    assert all('embstore_ids_total{status="found",table="item"}' in sample.values for sample in result.samples)
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert "#[Mean" in (tmp_path / "a.hgrm").read_text()

    code, printed, err = here("run", file, "--out", tmp_path / "b.json", "--fail-if", "p50>0us")
    assert code == 1
    assert any(f"embstore: {said}" in err for said in ("failed, because p50>0us", "the run is invalid", "p50>0us may"))
    assert "of 2 s, load: 2xx" in err  # how it went, in plain lines: stderr is no terminal
    assert "load test" in printed

    code, printed, _ = here("compare", out, tmp_path / "b.json", "--json", "--force")
    assert code == 0  # forced, since a busy machine makes runs invalid
    assert {figure["name"] for figure in json.loads(printed)["figures"]} >= {"p50", "p99", "goodput"}


def test_ctrl_c_gives_a_partial_report(server: ServerProcess, tmp_path: Path) -> None:
    """In the middle of a run: the figures so far are printed and written, exit code 130, no traceback."""
    out = tmp_path / "a.json"
    line = ["--url", server.url, "--seconds", "60", "--rate", "30", "--warmup", "0.1", "--out", out]
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", *map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "load: 2xx" not in (said := process.stderr.readline()):
            assert said, "it ended by itself"
        process.send_signal(signal.SIGINT)
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "load test" in printed
    (result,) = read_results(out)
    assert result.partial
    assert 0 < result.seconds < 60
    assert result.total().ok > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupt_before_anything_was_measured_is_the_end(number: signal.Signals) -> None:
    """While a server does not answer, there is nothing to report: exit code 130, not a line."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = ["--url", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(
            [sys.executable, "-m", "loadtest", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(number)
                assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_a_server_that_is_not_there_is_one_line(here: Here) -> None:
    """Nobody listens: the address and the reason, exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    assert here.fails(1, "--url", f"http://127.0.0.1:{port}").startswith(f"cannot connect to http://127.0.0.1:{port}")


def test_what_cannot_be_written_is_said_before_the_run(here: Here, tmp_path: Path) -> None:
    """No server is asked anything when the report would have no place."""
    path = tmp_path / "none" / "a.html"
    assert here.fails(1, "--url", "http://127.0.0.1:9", "--html", path).startswith(f"cannot write {path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rat", "5"], "No such option: --rat"),
        (["--rate", "many"], "Invalid value for '--rate'"),
        (["--set", "phases.0.rat=5"], "phases.0.rat is unknown"),
        (["--seconds", "0"], "phases.1.seconds: expected float > 0.0, got 0.0"),
        (["nothing.toml"], "nothing.toml"),
        (["--fail-if", "p99"], "fail_if: "),
        (["--find-max"], "--find-max and --slo go together"),
        (["--slo", "p99<10ms"], "--find-max and --slo go together"),
        (["--find-max", "--slo", "p99<10"], "p99 is a time in us, ms or s"),
        (["--find-max", "--slo", "p99<10ms", "--set", "mode=closed"], "mode: "),
        (["--find-max", "--slo", "p99<10ms", "--repeat", "2"], "leave out --html, --hgrm, --repeat"),
        (["--repeat", "0"], "Invalid value for '--repeat'"),
        (["compare", "a.json"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(here: Here, arguments: list[str], message: str) -> None:
    """Whatever is wrong with the command line: exit code 2 and what to change."""
    assert message in here.fails(2, *arguments)


def test_files_that_are_no_results_are_one_line(here: Here, tmp_path: Path) -> None:
    """`report` and `compare` of something else: exit code 1 and its name."""
    (tmp_path / "a.json").write_text("{}")
    assert "a.json is no result of a load test" in here.fails(1, "report", tmp_path / "a.json")
    assert "cannot read" in here.fails(1, "compare", tmp_path / "none.json", tmp_path / "a.json")


@pytest.mark.parametrize(
    ("runs", "code", "said"),
    [
        ([ran(5)], 0, ""),
        ([ran(20)], 1, "failed, because p99>10ms holds: p99 is 20.0 ms"),
        ([ran(20, invalid=BUSY)], 1, "the run is invalid, so that p99>10ms says nothing: all of its core"),
        ([ran(5, invalid=BUSY)], 1, "the run is invalid, so that p99>10ms says nothing: all of its core"),
        ([ran(20, invalid=GENERATOR_LAG)], 1, "p99>10ms may hold: generator lag"),
        ([ran(5, invalid=GENERATOR_LAG)], 0, ""),
        (
            [ran(20), ran(5, invalid=GENERATOR_LAG), ran(20, invalid=GENERATOR_LAG)],
            1,
            "p99>10ms may hold in 2 of 3 runs: gen",
        ),
        ([ran(5), ran(5, invalid=GENERATOR_LAG), ran(20, invalid=GENERATOR_LAG)], 0, ""),
        ([ran(5), ran(20), ran(5)], 0, ""),
        ([ran(20), ran(5), ran(20)], 1, "failed, because p99>10ms holds in 2 of 3 runs: p99 is 20.0 ms"),
        ([ran(20, invalid=BUSY), ran(5), ran(5)], 0, ""),
        ([ran(20), ran(20, invalid=BUSY)], 1, "1 of 2 runs are invalid, so that p99>10ms says nothing: all of its"),
        ([ran(5, status=503)], 1, "failed: no request got a 2xx reply"),
    ],
)
def test_conditions_decide_the_exit_code(here: Here, tmp_path: Path, runs: list[Result], code: int, said: str) -> None:
    """Most of the valid runs decide; runs that are invalid decide nothing, and too many of them are a failure.

    A generator that was only late makes latencies longer, never shorter: one below the limit is below it.
    """
    (tmp_path / "a.json").write_text(results_to_json(runs))
    ended, out, err = here("report", tmp_path / "a.json", "--fail-if", "p99>10ms")
    assert ended == code
    assert said in err
    assert "load test" in out


def test_a_run_that_fails_does_not_lose_those_before_it(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is gone in the third of four runs: two are reported and written, exit code 1 and the reason."""
    runs = iter([ran(), ran()])

    def load_test(*_: object, **__: object) -> Result:
        if result := next(runs, None):
            return result
        raise LoadError("cannot connect")

    monkeypatch.setattr("loadtest.run.session.load_test", load_test)
    monkeypatch.setattr("loadtest.scenario.target.list_tables", lambda _: {"item": 500})
    out = tmp_path / "a.json"
    code, printed, err = here("--repeat", "4", "--out", out, "--json")
    assert (code, err) == (1, "embstore: run 3 of 4 failed: cannot connect\n")
    assert len(json.loads(printed)) == len(read_results(out)) == 2
    assert here.fails(1, "--repeat", "4", "--out", tmp_path / "b.json") == "cannot connect"
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("how", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_is_gone_costs_no_file(tmp_path: Path, how: list[str]) -> None:
    """Nobody reads stdout any more: the files are written all the same, exit code 1 and not a line."""
    (tmp_path / "a.json").write_text(results_to_json([ran()]))
    line = ["report", tmp_path / "a.json", "--hgrm", tmp_path / "a.hgrm", *how]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        program = [sys.executable, "-m", "loadtest", *map(str, line)]
        done = subprocess.run(program, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert "#[Mean" in (tmp_path / "a.hgrm").read_text()


def test_a_search_reports_what_it_found(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--find-max tells each run, prints the search, writes it, and fails when no rate keeps the SLO."""
    asked: list[dict[str, Any]] = []

    def load_test(scenario: Scenario, **others: Any) -> Result:
        asked.append(others)
        return ran(5 if peak_rate(scenario) < 300 else 50, scenario=scenario)

    monkeypatch.setattr("loadtest.run.session.load_test", load_test)
    monkeypatch.setattr("loadtest.scenario.target.list_tables", lambda _: {"item": 500})
    monkeypatch.setattr(command, "_ceiling", lambda *_: 12_345.0)
    monkeypatch.setattr("loadtest.search.find_max.Limits", partial(Limits, cool_down=0.0))
    out = tmp_path / "a.json"
    code, printed, err = here("--find-max", "--slo", "p99<10ms", "--out", out, "--rate", "100")
    assert code == 0
    assert "the limit is about" in printed
    found = json.loads(out.read_text())
    assert found["low"] < 300 <= found["high"]
    assert found["slo"] == ["p99<10ms", "error_rate<1%"]
    assert asked[0]["ceiling"] == found["ceiling"] == 12_345.0
    assert err.count("requests/s: pass") + err.count("requests/s: fail") == len(found["runs"])

    code, printed, err = here("--find-max", "--slo", "p99<1ms", "--json")
    assert (code, err) == (1, "")
    assert json.loads(printed)["limit"] == "lowest"


def test_run_need_not_be_named(here: Here, tmp_path: Path) -> None:
    """Options, a file, or nothing at all are for `run`; --help is for all commands."""
    file = tmp_path / "a.toml"
    file.write_text(to_toml(Scenario(seed=7)))
    for arguments in (["run", file], [file], ["--set", "seed=7", "--warmup", "0"]):
        code, printed, _ = here(*arguments, "--print-scenario")
        assert (code, printed) == (0, to_toml(Scenario(seed=7)))
    code, printed, _ = here("--help")
    assert code == 0
    assert "compare" in printed


def test_help_needs_none_of_the_heavy_parts() -> None:
    """Importing the commands loads neither the HTTP client nor numpy: --help answers at once."""
    program = (
        "import sys, loadtest.command; print([m for m in ('httpx', 'numpy', 'uvloop', 'rich') if m in sys.modules])"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", time.monotonic() - began
