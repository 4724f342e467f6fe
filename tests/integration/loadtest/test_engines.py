"""Both engines and both loops: what is due is sent, what is sent is counted, and what the figures are worth is said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
import uvloop
from msgspec.structs import replace
from support.driving import SPEC, drive, scenario
from support.ill_server import CLOSE, RESET, SILENCE, Answer, reply, rows, scripted
from support.serving import ServerProcess, serving

import embstore
from loadtest.errors import LoadError
from loadtest.generator.clock_watch import ClockWatch
from loadtest.generator.recorder import SECOND, Recorder
from loadtest.generator.timer import Timer
from loadtest.results.histogram import Histogram
from loadtest.results.tally import Tally
from loadtest.results.validity import invalid_reasons
from loadtest.run import worker_pool
from loadtest.run.calibrate import calibrate
from loadtest.run.merge import gather
from loadtest.run.progress import Progress
from loadtest.scenario.model import Batch, IdDistribution, Phase, RequestSpec

ENGINES = pytest.mark.parametrize("engine", ["httpx", "raw"])
BUSY = reply(b"", "429 Too Many Requests", retry_after=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server with two tables of one release."""
    folder = tmp_path_factory.mktemp("engines")
    store = embstore.open_store(folder / "store")
    tables = {name: embstore.Publication(np.ones((500, 8), np.float32)) for name in ("item", "user")}
    store.publish_release(tables)
    with serving(folder / "store", folder / "log") as running:
        yield running


@ENGINES
def test_every_kind_of_request_is_answered_by_a_real_server(server: ServerProcess, engine: str) -> None:
    """Octets, JSON and the inference protocol, one table and two, over two processes: all due, all sent, all right."""
    requests = [RequestSpec(protocol=protocol, batch=Batch(size=20)) for protocol in ("octet", "json", "infer")]
    many = RequestSpec(protocol="json", tables=("item", "user"), batch=Batch(size=5))
    phases = (Phase(name="warm", seconds=0.3, rate=100, warmup=True), Phase(seconds=1.0, rate=100.0))
    asked = scenario(server.url, engine=engine, requests=(*requests, many), phases=phases, processes=2, timeout=30.0)
    seen: list[Progress] = []
    begun: list[int] = []
    result = worker_pool.run(asked, on_progress=seen.append, on_begin=begun.append)
    total = result.total()
    assert (total.offered, total.statuses, total.errors) == (100, {200: 100}, {})
    assert set(result.kinds()) == {"octet item", "json item", "infer item", "json item+user"}
    assert (total.latency.num, total.service.num, total.lag.num) == (100, 100, 100)
    assert (result.seconds, result.partial, len(begun)) == (1.0, False, 1)
    assert {(found.table, found.version) for found in result.versions} >= {("item", "1")}
    assert all(0 <= found.first <= found.last < 60 for found in result.versions)
    assert seen[0].phase in ("warm", "load")
    assert result.generator.processes == 2
    assert result.from_json(result.to_json()) == result


@ENGINES
def test_a_closed_loop_has_so_many_callers(server: ServerProcess, engine: str) -> None:
    """Each sends when it was answered; nothing is queued and nothing late, and every request sent is accounted for."""
    _, total = drive(
        scenario(server.url, engine=engine, mode="closed", connections=3, requests=(RequestSpec(),), seconds=1.0)
    )
    assert total.offered == total.ok >= 3
    assert (total.queued.num, total.lag.num, total.errors) == (0, 0, {})
    assert total.latency.num == total.service.num == total.ok
    assert total.latency.total > 2e9  # three callers wait, nearly all of a second


@ENGINES
def test_every_request_is_counted_once(engine: str) -> None:
    """Good replies, refusals, hangups and resets add up to what was offered."""
    answers: list[Answer] = [rows(), BUSY, CLOSE, RESET, rows(), rows(9), [rows()[:-5], b"", CLOSE], b"EHLO\r\n\r\n"]
    with scripted(lambda number: answers[number % 8]) as url:
        _, total = drive(scenario(url, engine=engine, rate=160.0, connections=1, timeout=30.0))
    assert (total.offered, total.statuses) == (80, {200: 20, 429: 10})
    assert total.retry_after == total.refused.num == 10
    assert total.latency.num == 20
    assert sum(total.errors.values()) == 50
    assert {kind: total.errors[kind] for kind in ("mislabelled", "truncated", "protocol")} == {
        "mislabelled": 10,
        "truncated": 10,
        "protocol": 10,
    }
    assert total.errors["closed"] + total.errors["reset"] == 20


@ENGINES
def test_a_timeout_runs_from_the_intended_start(engine: str) -> None:
    """One connection, no answers: what is in flight and what still waits fails after the same time."""
    with scripted(lambda _: SILENCE) as url:
        begin = time.monotonic()
        _, total = drive(scenario(url, engine=engine, rate=50.0, connections=1, timeout=0.2))
    assert (total.offered, total.errors) == (25, {"timeout": 25})
    assert time.monotonic() - begin < 20


@ENGINES
def test_after_a_timeout_the_caller_goes_on(engine: str) -> None:
    """A request that was given up takes its connection with it, and the next has a new one."""
    with scripted(lambda number: SILENCE if number == 0 else rows()) as url:
        load, total = drive(scenario(url, engine=engine, rate=20.0, connections=1, timeout=0.15, seconds=1.0))
    assert total.errors["timeout"] >= 1
    assert total.ok >= 10
    assert total.ok + total.errors["timeout"] == total.offered == 20
    assert engine == "httpx" or load.recorder.reconnects == 1


@ENGINES
def test_the_wait_for_a_connection_is_in_the_latency_and_not_in_the_service(engine: str) -> None:
    """At more than one connection can do, requests queue here: their latency grows, the service time does not."""
    with scripted(lambda _: [b"", b"", b"", b"", rows()]) as url:  # 10 ms each
        _, total = drive(scenario(url, engine=engine, rate=200.0, connections=1, timeout=60.0))
    assert (total.offered, total.ok) == (100, 100)
    assert total.queued.num > 50
    assert total.latency.max > total.queued.max > 0.2e9
    assert total.latency.percentile(90) > 2 * total.service.percentile(50)


def test_a_rate_beyond_the_generator_ends_in_time_and_is_said() -> None:
    """What could not be sent by the end is not sent later; the result is invalid and says how much was due."""
    with scripted(lambda _: rows()) as url:
        asked = scenario(url, rate=100_000.0, connections=1, timeout=0.2)
        begin = time.monotonic()
        load, total = drive(asked)
        assert time.monotonic() - begin < 20
    assert total.offered + load.unsent == 50_000
    assert load.unsent > 2500
    part = {"busy": load.busy, "unsent": load.unsent, "paused": 0.0, "clock_jumps": 0, "seconds": 0.5, "notes": []}
    result = gather(asked, [load.recorder.to_json() | part | {"stopped": False}], 1, 0.0)
    assert any("of 50,000 requests that were due were sent" in doubt for doubt in result.invalid)


def test_what_makes_a_result_invalid() -> None:
    """Lag beside the latency, a busy process, the calibrated ceiling, clocks, a process that was held up."""
    part = Recorder(0, 1.0).to_json() | {"busy": 0.2, "unsent": 0, "paused": 0.0, "clock_jumps": 0, "seconds": 1.0}
    part |= {"notes": ["seen before"], "stopped": False, "first_problem": [0.5, "mislabelled: x"]}
    result = gather(scenario("http://h", rate=950.0), [part], 1, 1000.0)
    assert result.invalid == ["950 requests/s is more than 90% of what this generator can do (1,000)"]
    assert [(mark.name, mark.detail, mark.ok) for mark in result.marks] == [
        ("note", "seen before", True),
        ("mislabelled", "mislabelled: x", False),
    ]
    result.generator.ceiling = 0.0
    assert invalid_reasons(result, [part]) == []
    times = {"lag": Histogram([2 * 10**6] * 100), "latency": Histogram([30 * 10**6] * 100)}
    result.tallies[0, "x"] = Tally(offered=100, **times)  # type: ignore[arg-type]
    assert invalid_reasons(result, [part]) == []
    result.tallies[0, "x"].lag = Histogram([4 * 10**6] * 100)
    result.generator.busy, result.generator.clock_jumps = 0.97, 2
    said = invalid_reasons(result, [part | {"paused": 1.5}])
    assert [text.split(":")[0].split(";")[0] for text in said] == [
        "generator lag",
        "a generator process used 97% of its core",
        "the clock was set 2 times during the run",
        "a generator process was held up for 1.5 s",
    ]
    late = {"lag": Histogram([10**5] * 9980 + [10**7] * 20), "latency": Histogram([10**6] * 10_000)}
    result.tallies[0, "x"] = Tally(offered=10_000, **late)  # type: ignore[arg-type]
    assert invalid_reasons(result, [part])[0] == ("generator lag: p99.9 lag is 10.00 ms, p99.9 latency 1.00 ms")


def test_a_recording_is_held_against_the_ceiling() -> None:
    """Where a clock says when requests are due, its fullest second is what was asked for."""
    clock = RequestSpec(ids=IdDistribution(kind="replay", file=__file__, time_column="t"))
    part = Recorder(0, 2.0).to_json() | {"busy": 0.2, "unsent": 0, "paused": 0.0, "clock_jumps": 0, "seconds": 2.0}
    result = gather(scenario("http://h", requests=(clock,)), [part | {"notes": [], "stopped": False}], 1, 1000.0)
    result.tallies = {(0, "x"): Tally(offered=10), (1, "x"): Tally(offered=901)}
    assert invalid_reasons(result, [part]) == ["901 requests/s is more than 90% of what this generator can do (1,000)"]


def test_clocks_that_jump_and_pauses_are_noticed() -> None:
    """The clock on the wall set forth or back is a jump, a small difference is none; a long gap is a pause."""
    clocks = iter([(0, 0), (100, 100), (5100, 200), (100, 300), (110, 400), (2110, 2400)])
    walls, steadies = zip(*[(wall * 10**6, steady * 10**6) for wall, steady in clocks], strict=True)
    wall, steady = iter(walls), iter(steadies)
    watch = ClockWatch(lambda: next(wall), lambda: next(steady))
    assert (watch.jumps, watch.paused) == (0, 0.0)
    for _ in range(5):
        watch.look()
    assert (watch.jumps, watch.paused) == (2, 2.0)


def test_an_alarm_never_rings_early() -> None:
    """Times far and near, and one that is past: in order, each at or after its time."""

    async def ring() -> list[int]:
        rung: list[int] = []
        done = asyncio.get_running_loop().create_future()
        begin = time.perf_counter_ns()
        times = iter([begin - 5, begin + 50_000, begin + 3_000_000, begin + 30_000_000])

        def on_time() -> None:
            rung.append(time.perf_counter_ns() - timer.when)
            if (when := next(times, None)) is None:
                done.set_result(None)
            else:
                timer.set(when)

        timer = Timer(on_time)
        timer.set(next(times))
        await asyncio.wait_for(done, 30)
        timer.close()
        return rung

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        late = runner.run(ring())
    assert len(late) == 4
    assert min(late) >= 0


def test_a_recorder_counts_what_was_due_in_the_measurement() -> None:
    """The warm-up is left out of everything; seconds are those of the intended start."""
    recorder = Recorder(10 * SECOND, 2.0)
    for due in (9, 10, 11, 12):
        at = due * SECOND + SECOND // 2
        recorder.offered(at, "a")
        recorder.replied(at, at + 1000, at + 600_000_000, "a", 200, 7)
        recorder.version("item", "3", at)
    recorder.failed(11 * SECOND, "b", "reset")
    assert set(recorder.tallies) == {(0, "a"), (1, "a"), (1, "b")}
    assert (recorder.total().offered, recorder.total().num_bytes) == (2, 14)
    assert recorder.seen == {("item", "3"): (0.5, 1.5, 2)}
    progress = recorder.progress()
    assert (progress["offered"], progress["ok"], progress["failed"]) == (2, 2, {"reset": 1})
    assert Histogram.from_json(progress["latency"]).num == 2
    assert Histogram.from_json(recorder.progress()["latency"]).num == 0


def test_a_generator_that_fails_itself_says_so() -> None:
    """An exception of ours is no error of the server: the run ends with it."""

    def fail(self: object, second: float) -> None:
        raise RuntimeError("no more ids")

    with scripted(lambda _: rows()) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadtest.generator.raw_engine.RawEngine.next", fail)
        with pytest.raises(LoadError, match="the generator failed: RuntimeError: no more ids"):
            drive(scenario(url, engine="raw"))


def test_the_ceiling_is_found_without_the_server(server: ServerProcess) -> None:
    """A calibration knows what the generator could do, and the least service time it could see, whatever the sizes."""
    sizes = Batch(kind="uniform", min=1, max=5000)
    spec = replace(SPEC, ids=IdDistribution(num_ids=100), batch=sizes)
    found = calibrate(scenario(server.url, requests=(spec,), engine="raw", processes=2), seconds=0.4)
    assert found.ceiling > 20
    assert 0 < found.floor_us < 1e6
