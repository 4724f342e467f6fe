"""Retries of the client: what is sent again, when, how often, and always within the deadline."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import embstore_client
import numpy as np
import pytest
from embstore_client import ConnectionFailed, EmbeddingClient, Overloaded, ProtocolError, Retries, Timeout, Unavailable
from embstore_client._core.attempts import Attempt, Attempts, Traffic
from embstore_client._core.deadline import Deadline
from embstore_client._core.token_bucket import TokenBucket
from support.scripted import (
    Act,
    Either,
    Recorder,
    answer,
    hang_up,
    item_one,
    refuse,
    reset_in_the_body,
    scripted,
    stall,
    too_short,
    trickle,
)
from support.serving import serving

import embstore

pytestmark = pytest.mark.slow

URL = "http://a"


class Halves(Random):
    """A random generator that always takes the middle."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    errors: list[Exception],
    *,
    seconds_each: float = 0.0,
    timeout_s: float = 10.0,
    retries: Retries | None = Retries(),  # noqa: B008
    traffic: Traffic | None = None,
) -> tuple[list[float], Exception | None]:
    """When each attempt began, where they fail with `errors` one after the other and then succeed; and the error."""
    clock = Clock()
    if traffic is None:
        traffic = Traffic([URL], retries, None, None, clock, Halves())
    else:
        clock = traffic.clock  # type: ignore[assignment]
    begin = clock.now
    attempts = Attempts(traffic, Deadline(timeout_s, clock), retries)
    began: list[float] = []
    while True:
        step = attempts.step()
        if not isinstance(step, Attempt):
            clock.now += step
            continue
        began.append(round(clock.now - begin, 6))
        clock.now += seconds_each
        if len(began) > len(errors):
            attempts.answered(step)
            return began, None
        try:
            attempts.failed(step, errors[len(began) - 1])
        except embstore_client.EmbstoreError as error:
            return began, error


def overloaded(seconds: float | None = None) -> Overloaded:
    return Overloaded("busy", status=429, code="overloaded", retry_after_s=seconds)


def test_waits_double_up_to_their_bound() -> None:
    """Waits are random below 25, 50, 100 ms and so on, and below `max_s` at last: here always half of that."""
    began, error = run([ConnectionFailed("no")] * 4, retries=Retries(max_attempts=5, max_s=0.08))
    assert (began, error) == ([0.0, 0.0125, 0.0375, 0.0775, 0.1175], None)


def test_retry_after_is_a_least_wait() -> None:
    """`Retry-After` is waited out, and some of the usual wait besides, so that clients do not return together."""
    assert run([overloaded(2.0)]) == ([0.0, 2.0125], None)
    assert run([overloaded(40.0)], timeout_s=60.0) == ([0.0, 40.0125], None)
    assert run([overloaded()]) == ([0.0, 0.0125], None)


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    """Where the wait asked for does not fit, the error is raised at once, and costs no retry."""
    error = overloaded(2.0)
    assert run([error], timeout_s=2.0) == ([0.0], error)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionFailed("reset"), True),
        (overloaded(), True),
        (Unavailable("", status=502), True),
        (embstore_client.NotReady("", status=503, code="not_ready"), True),
        (embstore_client.Draining("", status=503, code="draining"), True),
        (embstore_client.DeadlineExceeded("a gateway's", status=504), True),
        (embstore_client.DeadlineExceeded("the service's", status=504, code="deadline_exceeded"), False),
        (embstore_client.InternalError("", status=500, code="internal"), False),
        (embstore_client.TableNotFound("", status=404, code="table_not_found"), False),
        (embstore_client.MalformedRequest("", status=400), False),
        (embstore_client.Unauthorized("", status=401), False),
        (embstore_client.TooManyIds("", status=413), False),
        (embstore_client.IdOutOfRange("", status=422), False),
        (ProtocolError("mislabelled"), False),
        (Timeout("a connect that had its share"), True),
    ],
    ids=lambda value: f"{type(value).__name__} {value}" if isinstance(value, Exception) else str(value),
)
def test_only_what_may_end_better_is_sent_again(error: Exception, again: bool) -> None:
    """What was not answered, or refused for now, is sent again; what the caller must change is not."""
    assert run([error]) == (([0.0, 0.0125], None) if again else ([0.0], error))


def test_attempts_are_counted() -> None:
    """`max_attempts` includes the first, and the last error is the one raised; None is one attempt."""
    errors: list[Exception] = [ConnectionFailed(str(n)) for n in range(5)]
    assert run(errors) == ([0.0, 0.0125, 0.0375], errors[2])
    assert run(errors, retries=None) == ([0.0], errors[0])


def test_nothing_begins_after_the_deadline() -> None:
    """An attempt that used the time up is the last."""
    error = ConnectionFailed("slowly")
    assert run([error], seconds_each=1.0, timeout_s=1.0) == ([0.0], error)


def test_retries_do_not_double_an_overload() -> None:
    """When all fails, 1,000 calls make 100 retries (the budget's tenth) and the 10 that a new client has."""
    clock = Clock()
    retries = Retries(budget=0.1, min_per_s=0.0, base_s=0.0)
    traffic = Traffic([URL], retries, None, None, clock, Halves())
    made = sum(len(run([ConnectionFailed("no")] * 3, traffic=traffic, retries=retries)[0]) for _ in range(1000))
    assert made == 1000 + 100 + 10


def test_a_seldom_caller_may_retry_too() -> None:
    """The budget refills with time as well, up to what may be saved up."""
    budget = TokenBucket(0.1, per_s=2.0, burst=3.0, initial=1.0)
    assert [budget.take(0.0), budget.take(0.0), budget.take(0.4), budget.take(0.5)] == [True, False, False, True]
    assert [budget.take(100.0) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    "options",
    [{"max_attempts": 0}, {"max_attempts": 1.5}, {"budget": -0.1}, {"base_s": float("nan")}, {"max_s": True}],
    ids=str,
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    """Settings that mean nothing raise, and the message names them."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Retries(**options)


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


@pytest.mark.parametrize(
    "fault",
    [hang_up, reset_in_the_body, refuse(503, "not_ready"), refuse(502), refuse(429, "overloaded")],
    ids=["hang up", "reset", "503", "502", "429"],
)
def test_a_fault_that_passes_is_not_seen(through: Either, fault: Act) -> None:
    """Two faults and then an answer are an answer, over real sockets."""
    with scripted(fault, fault) as server:
        (rows,) = through(server.url, item_one, timeout_s=10.0)
        assert rows.vectors.tolist() == [[1.0] * 4]
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("fault", "cls"),
    [(too_short, ProtocolError), (refuse(404, "table_not_found"), embstore_client.TableNotFound)],
    ids=["too short", "404"],
)
def test_a_fault_that_stays_is_raised(through: Either, fault: Act, cls: type[Exception]) -> None:
    """A wrong answer is refused, not asked for again; the connection serves the next call."""
    with scripted(fault) as server:
        error, rows = through(server.url, item_one, item_one, timeout_s=10.0)
        assert type(error) is cls
        assert rows.vectors.tolist() == [[1.0] * 4]
        assert (len(server.seen), server.connections) == (2, 1)


@pytest.mark.parametrize(
    "act", [stall, trickle, refuse(429, "overloaded", retry_after=5)], ids=["stall", "trickle", "429"]
)
def test_every_call_ends_in_its_time(through: Either, act: Act) -> None:
    """A server that says nothing, or a byte now and then, or "later", costs no more than the timeout."""
    with scripted(act) as server:
        begin = time.monotonic()
        (error,) = through(server.url, item_one, timeout_s=0.3)
        assert isinstance(error, Timeout | Overloaded)
        assert time.monotonic() - begin < 3.0


def test_the_server_is_told_what_is_left(through: Either) -> None:
    """Each attempt says how much of the whole deadline remains."""
    with scripted(lambda exchange: (time.sleep(0.05), hang_up(exchange))[1]) as server:
        through(server.url, item_one, timeout_s=5.0)
        first, second = (int(exchange.headers["x-request-timeout-ms"]) for exchange in server.seen)
        assert 4000 < second <= first - 50 <= 4950


def test_an_observer_hears_of_every_attempt(through: Either) -> None:
    """Attempts, retries and the call's end are told, with address, status and reason."""
    with scripted(refuse(503, "draining"), hang_up) as server:
        recorder = Recorder()
        through(server.url, item_one, timeout_s=10.0, observer=recorder)
        ended = recorder.of("attempt_ended", "address", "number", "hedge", "status", "reason")
        url = server.url
        assert ended == [
            (url, 1, False, 503, "draining"),
            (url, 2, False, None, "connection"),
            (url, 3, False, 200, "ok"),
        ]
        assert recorder.of("retry", "reason") == ["draining", "connection"]
        assert recorder.of("call_ended", "operation", "reason") == [("lookup", "ok")]


class Broken(embstore_client.Observer):
    """Every hook that is used here fails."""

    def headers(self) -> dict[str, str]:
        return {"traceparent": "00-1", "bad": "line\r\nbreak"}

    def attempt_started(self, **_: Any) -> None:
        raise RuntimeError("broken hook")


def test_a_broken_observer_breaks_no_call(through: Either, caplog: pytest.LogCaptureFixture) -> None:
    """What a hook raises is logged once; headers that cannot be sent are not."""
    with scripted() as server:
        first, second = through(server.url, item_one, item_one, observer=Broken(), timeout_s=10.0)
        assert len(first) == len(second) == 1
        assert "traceparent" not in server.seen[0].headers
    assert [record.message[:42] for record in caplog.records] == ["an embstore_client observer failed; its fu"]


class Traced(embstore_client.Observer):
    """Adds the header of a trace."""

    def headers(self) -> dict[str, str]:
        return {"traceparent": "00-1-2-01"}


def test_an_observer_adds_headers(through: Either) -> None:
    """A trace goes on in the server."""
    with scripted(answer) as server:
        through(server.url, item_one, observer=Traced(), timeout_s=10.0)
        assert server.seen[0].headers["traceparent"] == "00-1-2-01"


def test_a_restart_is_survived(tmp_path: Path) -> None:
    """A real server that is still loading, then killed, and back on its port, costs a patient client only time."""
    embstore.open_store(tmp_path / "store").publish("item", np.arange(40, dtype=np.float32).reshape(10, 4))
    patient = Retries(max_attempts=1000, base_s=0.05, max_s=0.1, min_per_s=100.0)
    with (
        serving(tmp_path / "store", tmp_path / "log", ready=False) as server,
        EmbeddingClient(server.url, timeout_s=150.0, retries=patient) as client,
    ):
        before = client.lookup("item", [3])
        server.process.kill()
        server.process.wait(30)
        with serving(tmp_path / "store", tmp_path / "log2", ready=False, port=int(server.url.rpartition(":")[2])):
            after = client.lookup("item", [3])
    assert before.vectors.tolist() == after.vectors.tolist() == [[12.0, 13.0, 14.0, 15.0]]
