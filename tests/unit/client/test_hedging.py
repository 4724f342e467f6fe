"""Hedged requests of the client: a second attempt for a slow one, capped, the loser cancelled."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from random import Random
from typing import Any

import pytest
from embstore_client import AsyncEmbeddingClient, ConnectionFailed, Hedge, NotReady, Retries, TableNotFound, Timeout
from embstore_client._core.attempts import Attempt, Attempts, Traffic
from embstore_client._core.deadline import Deadline
from embstore_client._core.latency import RecentLatencies
from support.scripted import Either, Recorder, after, answer, hang_up, item_one, refuse, scripted, stall

URLS = ["http://a", "http://b"]


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


USUAL = Hedge(min_samples=20)


def started(urls: list[str] = URLS, hedge: Hedge = USUAL, tokens: float = 1.0) -> tuple[Clock, Attempts]:
    """A request's attempts in a client that knows 20 latencies of 1 to 20 ms, and may hedge so often."""
    clock = Clock()
    traffic = Traffic(urls, Retries(base_s=0.0), hedge, None, clock, Random(1))
    for n in range(1, 21):
        traffic.latencies.add(n / 1000)
    traffic.hedge_budget._tokens = tokens
    return clock, Attempts(traffic, Deadline(1.0, clock), traffic.retries)


def attempt_of(step: Attempt | float) -> Attempt:
    assert isinstance(step, Attempt)
    return step


def test_the_second_attempt_starts_after_the_percentile() -> None:
    """The 95th of 100 latencies is waited for, then the other address is asked too, once."""
    clock, attempts = started()
    first = attempt_of(attempts.step())
    assert attempts.step() == pytest.approx(0.019)
    clock.now += 0.019
    second = attempt_of(attempts.step())
    assert (second.hedge, second.number) == (True, 2)
    assert second.address is not first.address
    assert attempts.step() == pytest.approx(1.0 - 0.019)


def test_one_address_is_asked_twice() -> None:
    """Where there is no other address, the second attempt goes to the same."""
    clock, attempts = started(["http://a"])
    first = attempt_of(attempts.step())
    clock.now += 0.02
    assert attempt_of(attempts.step()).address is first.address


def test_the_wait_stays_within_its_bounds() -> None:
    """`min_s` and `max_s` hold whatever the percentile says."""
    for hedge, wait in ((Hedge(min_samples=20, min_s=0.05), 0.05), (Hedge(min_samples=20, max_s=0.002), 0.002)):
        _, attempts = started(hedge=hedge)
        attempts.step()
        assert attempts.step() == pytest.approx(wait)


def test_without_budget_nothing_is_hedged() -> None:
    """Where the share is used up, the first attempt is waited for alone."""
    clock, attempts = started(tokens=0.5)
    attempts.step()
    clock.now += 0.02
    assert attempts.step() == pytest.approx(0.98)


def test_hedges_stay_under_their_share() -> None:
    """When every request is slow, 5 % of them are sent twice."""
    clock = Clock()
    traffic = Traffic(URLS, None, Hedge(min_samples=1, max_share=0.05), None, clock, Random(1))
    traffic.latencies.add(0.001)
    hedged = 0
    for _ in range(1000):
        attempts = Attempts(traffic, Deadline(1.0, clock), None)
        attempts.step()
        clock.now += 0.5
        if isinstance(attempts.step(), Attempt):
            hedged += 1
    assert hedged == 50


def test_a_failed_attempt_leaves_the_other_running() -> None:
    """One error of two is not the end; two are, or a retry."""
    clock, attempts = started()
    first = attempt_of(attempts.step())
    clock.now += 0.02
    second = attempt_of(attempts.step())
    attempts.failed(second, NotReady("", status=503))
    assert attempts.step() == pytest.approx(0.98)
    attempts.failed(first, ConnectionFailed("reset"))
    third = attempt_of(attempts.step())
    assert (third.number, third.hedge) == (3, False)
    attempts.answered(third)


def test_an_attempt_that_never_ends_does_not_keep_the_call() -> None:
    """After the deadline, the next step is Timeout, whatever still runs."""
    clock, attempts = started(tokens=0.0)
    attempts.step()
    clock.now += 1.0
    with pytest.raises(Timeout, match="within 1 s"):
        attempts.step()


@pytest.mark.parametrize("reported", [False, True], ids=["step", "failed"])
def test_an_address_that_hangs_is_ejected(reported: bool) -> None:
    """Who has not answered by the deadline has failed, a hedge or not; after three of them it is left alone."""
    clock, attempts = started()
    traffic = attempts._traffic
    for _ in range(3):
        attempts = Attempts(traffic, Deadline(1.0, clock), traffic.retries)
        traffic.hedge_budget._tokens = 1.0
        running = [attempt_of(attempts.step())]
        clock.now += 0.02
        running.append(attempt_of(attempts.step()))
        clock.now += 1.0
        end = partial(attempts.failed, running.pop(), Timeout("late")) if reported else attempts.step
        with pytest.raises(Timeout):
            end()
        for attempt in running:
            attempts.dropped(attempt)  # as both clients do with what is left
    assert all(address.ejected_until is not None for address in traffic.balance.addresses)
    assert [address.in_flight for address in traffic.balance.addresses] == [0, 0]


def test_a_loser_shows_how_slow_its_address_is() -> None:
    """An attempt that was overtaken counts as one that took that long, so requests go elsewhere."""
    clock, attempts = started()
    first = attempt_of(attempts.step())
    clock.now += 0.5
    second = attempt_of(attempts.step())
    clock.now += 0.001
    attempts.answered(second)
    attempts.dropped(first)
    assert first.address.latency_s(clock.now) == pytest.approx(0.501)
    assert attempts._traffic.balance.choose(clock.now) is second.address


def test_a_refusal_of_one_of_two_waits_for_the_other() -> None:
    """What only one server says (its table is not loaded yet) is raised where the other brings nothing better."""
    refused = TableNotFound("", status=404, code="table_not_found")
    for better in (True, False):
        clock, attempts = started()
        first = attempt_of(attempts.step())
        clock.now += 0.02
        attempts.failed(attempt_of(attempts.step()), refused)
        if better:
            attempts.answered(first)
            continue
        clock.now += 1.0
        with pytest.raises(TableNotFound):
            attempts.step()


def test_the_percentile_is_of_recent_latencies() -> None:
    """Nearest rank over a sliding window; unknown before there are enough."""
    latencies = RecentLatencies(95.0, min_samples=100)
    for n in range(99):
        latencies.add(float(n))
    assert latencies.percentile() is None
    latencies.add(99.0)
    assert latencies.percentile() == 94.0
    for _ in range(512):
        latencies.add(7.0)
    assert latencies.percentile() == 7.0


@pytest.mark.parametrize(
    "options", [{"percentile": 101}, {"max_share": 2}, {"min_samples": 0}, {"min_s": -1}, {"max_s": 0}], ids=str
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    """Settings that mean nothing raise, and the message names them."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Hedge(**options)


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


EAGER = Hedge(min_samples=1, max_share=1.0, max_s=0.02)


def wait_for(happened: Any) -> None:
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_first_good_answer_wins(through: Either) -> None:
    """A stalled attempt is overtaken by a second one; it is told to the observer, and its connection is closed."""
    with scripted(answer, stall) as server:
        recorder = Recorder()
        rows = through(server.url, item_one, item_one, timeout_s=20.0, hedge=EAGER, observer=recorder)
        assert [len(row) for row in rows] == [1, 1]
        assert recorder.of("hedge", "address") == [server.url]
        ended = recorder.of("attempt_ended", "number", "hedge", "reason")
        assert ended == [(1, False, "ok"), (2, True, "ok"), (1, False, "cancelled")]
        wait_for(lambda: server.given_up == [1])


def test_a_hedge_that_fails_does_not_fail_the_call(through: Either) -> None:
    """The first attempt's answer counts although the second was refused before it came."""
    with scripted(answer, after(0.3, answer), refuse(503, "not_ready")) as server:
        _, rows = through(server.url, item_one, item_one, timeout_s=20.0, hedge=EAGER, retries=None)
        assert rows.vectors.tolist() == [[1.0] * 4]
        assert len(server.seen) == 3


@pytest.mark.parametrize("status", [404, 500], ids=str)
def test_a_hedge_that_is_refused_does_not_either(through: Either, status: int) -> None:
    """An error that is not sent again ends the call only where the other attempt has none either."""
    with scripted(answer, after(0.3, answer), refuse(status)) as server:
        _, rows = through(server.url, item_one, item_one, timeout_s=20.0, hedge=EAGER)
        assert rows.vectors.tolist() == [[1.0] * 4]
        assert len(server.seen) == 3


def test_retries_and_hedges_go_together(through: Either) -> None:
    """A hedged client retries what failed, too."""
    with scripted(hang_up, hang_up) as server:
        (rows,) = through(server.url, item_one, timeout_s=20.0, hedge=EAGER)
        assert len(rows) == 1


def test_two_stalls_end_in_time(through: Either) -> None:
    """Where neither attempt is answered, the call ends with its deadline and both connections are closed."""
    with scripted(answer, stall, stall) as server:
        begin = time.monotonic()
        _, error = through(server.url, item_one, lambda client: client.lookup("item", [1], timeout_s=0.4), hedge=EAGER)
        assert isinstance(error, Timeout)
        assert time.monotonic() - begin < 5.0
        wait_for(lambda: sorted(server.given_up) == [1, 2])


@pytest.mark.parametrize("hedge", [None, EAGER], ids=["plain", "hedged"])
def test_a_cancelled_call_leaves_nothing(hedge: Hedge | None) -> None:
    """Cancelling an async call ends its tasks and closes its connection; the next call is answered."""

    async def run(url: str) -> int:
        async with AsyncEmbeddingClient(url, timeout_s=20.0, hedge=hedge) as client:
            await client.lookup("item", [1])
            before = asyncio.all_tasks()
            call = asyncio.create_task(client.lookup("item", [1]))
            while len(server.seen) < len(server.acts):
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert asyncio.all_tasks() == before
            return len(await client.lookup("item", [1, 2]))

    stalls = [stall] if hedge is None else [stall, stall]
    with scripted(answer, *stalls) as server:
        assert asyncio.run(run(server.url)) == 2
        wait_for(lambda: len(server.given_up) == len(stalls))


def test_trio_will_do_too() -> None:
    """The async client retries and hedges under trio as under asyncio."""
    trio = pytest.importorskip("trio")

    async def run(url: str) -> list[int]:
        async with AsyncEmbeddingClient(url, timeout_s=20.0, hedge=EAGER) as client:
            return [len(await client.lookup("item", [1])) for _ in range(2)]

    with scripted(hang_up, answer, stall) as server:
        assert trio.run(run, server.url) == [1, 1]
