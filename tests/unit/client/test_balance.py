"""Several addresses: the less busy of two, those that fail left alone, retries going elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random
from typing import Any

import httpx
import pytest
from embstore_client import ConnectionFailed, EmbeddingClient, Hedge, Overloaded, Retries, Timeout
from embstore_client._core.attempts import Attempt, Attempts, Traffic
from embstore_client._core.balancer import EJECT_AFTER, Address, Balancer
from embstore_client._core.deadline import Deadline
from support.scripted import Either, Recorder, hang_up, item_one, refuse, scripted, stall

URLS = ["http://a", "http://b", "http://c"]


def balance_of(num: int = 3) -> tuple[Balancer, list[Address]]:
    balance = Balancer(URLS[:num], Random(7))
    return balance, balance.addresses


def chosen(balance: Balancer, now: float, times: int = 300) -> Counter[str]:
    return Counter(balance.choose(now).url for _ in range(times))


def fail(balance: Balancer, address: Address, now: float, times: int = EJECT_AFTER) -> float | None:
    pause = None
    for _ in range(times):
        balance.ended(address, probe=balance.started(address, now))
        pause = balance.failed(address, now, now)
    return pause


def test_equal_addresses_have_equal_shares() -> None:
    """Nobody is favoured where nothing is known."""
    balance, _ = balance_of()
    assert all(80 <= count <= 120 for count in chosen(balance, 0.0).values())


def test_the_busiest_address_is_passed_over() -> None:
    """Of two at random the one with fewer requests in flight is taken, so the busiest never is."""
    balance, (busy, *_) = balance_of()
    balance.started(busy, 0.0)
    assert set(chosen(balance, 0.0)) == {"http://b", "http://c"}


def test_a_slow_address_is_passed_over_for_a_while() -> None:
    """Ten times the latency loses every comparison; what is known fades, so it is tried again."""
    balance, (slow, fast) = balance_of(2)
    for address, seconds in ((slow, 0.1), (fast, 0.01)):
        balance.answered(address, 0.0, seconds)
    assert set(chosen(balance, 0.0)) == {"http://b"}
    balance.answered(fast, 40.0, 0.01)
    assert "http://a" in chosen(balance, 40.0)


def test_failures_in_a_row_eject() -> None:
    """Three failures eject for about a second, then one probe; each failed probe about doubles the pause."""
    balance, (bad, *_) = balance_of()
    assert fail(balance, bad, 0.0, EJECT_AFTER - 1) is None
    pause = fail(balance, bad, 0.0, 1)
    assert pause is not None
    assert 0.75 <= pause <= 1.25
    assert set(chosen(balance, 0.0)) == {"http://b", "http://c"}
    now, pauses = 0.0, [pause]
    for _ in range(8):
        now += pauses[-1]
        assert balance.choose(now) is bad
        assert balance.started(bad, now)
        assert bad.url not in chosen(balance, now)
        balance.ended(bad, probe=True)
        next_pause = balance.failed(bad, now, now)
        assert next_pause is not None
        pauses.append(next_pause)
    assert all(0.75 * 2**n <= pause <= 1.25 * 2**n for n, pause in enumerate(pauses[:5]))
    assert max(pauses) <= 1.25 * 30


def test_a_probe_that_is_answered_restores() -> None:
    """One answer ends the ejection, and the count of failures starts again."""
    balance, (bad, *_) = balance_of()
    pause = fail(balance, bad, 0.0)
    assert pause is not None
    assert balance.choose(pause) is bad
    assert balance.answered(bad, pause, 0.01) is True
    assert fail(balance, bad, pause, EJECT_AFTER - 1) is None


def test_a_probe_that_is_given_up_says_nothing() -> None:
    """After a cancelled probe, the next request probes."""
    balance, (bad, *_) = balance_of()
    fail(balance, bad, 0.0)
    probe = balance.started(balance.choose(2.0), 2.0)
    balance.ended(bad, probe=probe)
    assert balance.choose(2.0) is bad


def test_only_the_probe_tells_how_the_probe_went() -> None:
    """Attempts that began before the ejection end while it is probed: they neither fail it nor free its place."""
    balance, (bad, *_) = balance_of()
    balance.started(bad, 0.0)
    pause = fail(balance, bad, 0.0)
    assert pause is not None
    assert balance.started(balance.choose(pause), pause)
    balance.ended(bad)
    assert balance.failed(bad, pause, 0.0) is None
    assert bad.url not in chosen(balance, pause)
    assert balance.answered(bad, pause, None) is True


def test_an_attempt_that_is_overtaken_shows_how_slow_its_address_is() -> None:
    """What had not answered by then would have taken longer; what was given up early says nothing."""
    balance, (slow, fast) = balance_of(2)
    for address in (slow, fast):
        balance.answered(address, 0.0, 0.01)
    balance.overtaken(fast, 0.0, 0.001)
    balance.overtaken(slow, 0.0, 1.0)
    assert set(chosen(balance, 0.0)) == {"http://b"}
    assert fast.latency_s(0.0) == 0.01


def test_when_all_are_ejected_all_are_tried() -> None:
    """Rather than failing at once, a client with no healthy address tries them."""
    balance, addresses = balance_of()
    for address in addresses:
        fail(balance, address, 0.0)
    assert set(chosen(balance, 0.0)) == set(URLS)


def test_one_address_is_never_ejected() -> None:
    """Without another there is nothing to spare it for."""
    balance, (only,) = balance_of(1)
    assert fail(balance, only, 0.0, 10) is None
    assert balance.choose(0.0) is only


def test_who_asks_for_time_is_liked_less() -> None:
    """`Retry-After` sends requests elsewhere for so long, at most 30 s; when all ask, the one that asks least is taken.

    An answer to what was asked after that ends it before.
    """
    balance, (first, second, third) = balance_of()
    balance.asked_to_wait(first, 0.0, 5.0)
    assert set(chosen(balance, 4.9)) == {"http://b", "http://c"}
    assert set(chosen(balance, 5.0)) == set(URLS)
    balance.asked_to_wait(second, 0.0, 2.0)
    balance.asked_to_wait(third, 0.0, 3.0)
    assert balance.choose(1.0) is second
    balance.answered(second, 1.0, 1.5)
    assert second.disliked_until == 2.0
    balance.answered(first, 1.0, 0.01)
    assert balance.choose(1.0) is first
    for address in (first, second, third):
        balance.asked_to_wait(address, 1.0, 1e9)
    assert {address.disliked_until for address in (first, second, third)} == {31.0}


def test_a_retry_goes_elsewhere_without_the_wait() -> None:
    """Another address did not ask to be left alone, so it is asked after the usual short wait."""
    now = [100.0]
    traffic = Traffic(URLS[:2], Retries(), None, None, lambda: now[0], Random(3))
    attempts = Attempts(traffic, Deadline(1.0, traffic.clock), traffic.retries)
    first = attempts.step()
    assert isinstance(first, Attempt)
    attempts.failed(first, Overloaded("", status=429, retry_after_s=30.0))
    wait = attempts.step()
    assert isinstance(wait, float)
    assert wait <= 0.025
    now[0] += wait
    second = attempts.step()
    assert isinstance(second, Attempt)
    assert second.address is not first.address


def test_a_wait_for_a_connection_of_ones_own_blames_nobody() -> None:
    """Where all connections of the client are busy until the deadline, no address has failed."""
    now = [100.0]
    traffic = Traffic(URLS, Retries(), None, None, lambda: now[0], Random(3))
    for _ in range(20):
        attempts = Attempts(traffic, Deadline(1.0, traffic.clock), traffic.retries)
        attempt = attempts.step()
        assert isinstance(attempt, Attempt)
        assert attempt.timeouts["pool"] == 1.0
        now[0] += 1.0
        with pytest.raises(Timeout):
            attempts.failed(attempt, Timeout("no connection was free"))
    assert [(a.failures, a.in_flight) for a in traffic.balance.addresses] == [(0, 0)] * 3


def test_a_busy_pool_is_told_from_a_busy_server() -> None:
    """Over a real pool of one connection: the call that holds it has asked the server, the one behind it has not."""
    pool = httpx.HTTPTransport(limits=httpx.Limits(max_connections=1))
    with scripted(stall) as server, EmbeddingClient(server.url, timeout_s=20.0, transport=pool) as client:
        (address,) = client._core.traffic.balance.addresses
        with ThreadPoolExecutor(1) as thread:
            holder = thread.submit(lambda: client.lookup("item", [1], timeout_s=1.0))
            while not (server.seen or holder.done()):
                time.sleep(0.01)
            with pytest.raises(Timeout):
                client.lookup("item", [1], timeout_s=0.2)
            assert address.failures == 0
            assert isinstance(holder.exception(20.0), Timeout)
        assert (address.failures, len(server.seen)) == (1, 1)


def test_nothing_goes_out_after_the_deadline() -> None:
    """A call whose time is over before it begins is Timeout, and no address is asked."""
    now = [100.0]
    traffic = Traffic(URLS, Retries(), None, None, lambda: now[0], Random(3))
    attempts = Attempts(traffic, Deadline(1.0, traffic.clock), traffic.retries)
    now[0] += 1.0
    with pytest.raises(Timeout, match="no whole answer within 1 s"):
        attempts.step()
    assert [a.in_flight for a in traffic.balance.addresses] == [0] * 3


def test_a_connect_leaves_time_for_another_address() -> None:
    """Where another address could be asked, connecting may take half of what is left; else all of it."""
    for urls, seconds in ((URLS, 0.5), (URLS[:1], 1.0)):
        traffic = Traffic(urls, Retries(), None, None, lambda: 100.0, Random(3))
        step = Attempts(traffic, Deadline(1.0, traffic.clock), traffic.retries).step()
        assert isinstance(step, Attempt)
        assert (step.timeouts["connect"], step.timeouts["read"]) == (seconds, 1.0)


@pytest.fixture(params=["sync", "async"])
def through(request: pytest.FixtureRequest) -> Either:
    return Either(request.param)


def test_one_dead_address_is_not_noticed(through: Either) -> None:
    """With one of two servers gone every call is answered, and the dead address is soon left alone."""
    with scripted() as gone:
        pass
    with scripted() as alive:
        recorder = Recorder()
        rows = through([gone.url, alive.url], *[item_one] * 20, timeout_s=20.0, observer=recorder)
        assert [len(row) for row in rows] == [1] * 20
        assert set(recorder.of("ejected", "address")) == {gone.url}
        assert len(alive.seen) == 20


def test_all_dead_is_an_error_and_recovery_is_noticed(through: Either) -> None:
    """When every address is gone calls fail, and succeed once one is back, ejected or not."""
    with scripted() as one, scripted() as other:
        urls, port = [one.url, other.url], one.port
    with ExitStack() as stack:

        def comes_back(client: Any) -> Any:
            stack.enter_context(scripted(port=port))
            return item_one(client)

        *failures, rows = through(urls, *[item_one] * 4, comes_back, timeout_s=20.0)
    assert {type(failure) for failure in failures} == {ConnectionFailed}
    assert len(rows) == 1


def test_ready_asks_every_address(through: Either) -> None:
    """One ready address is enough; none is False."""
    with scripted(refuse(503)) as not_ready, scripted(*[refuse(200)] * 2) as ready, scripted(hang_up) as gone:
        ask = lambda client: client.ready()  # noqa: E731
        assert through([not_ready.url, gone.url, ready.url], ask, timeout_s=20.0) == [True]
    assert through([not_ready.url, gone.url], ask, timeout_s=20.0) == [False]


def test_ready_gives_each_address_its_share_of_the_time(through: Either) -> None:
    """One that hangs costs its part; one that is busy, or no embstore, is passed over; every one is asked once."""
    ask = lambda client: client.ready(timeout_s=2.0)  # noqa: E731
    acts = (stall, refuse(429), refuse(404), refuse(200))
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted(act)) for act in acts]
        urls = [server.url for server in servers]
        assert through(urls, ask, retries=None, hedge=Hedge(min_samples=1)) == [True]
        assert [len(server.seen) for server in servers] == [1] * 4
    with scripted(refuse(504)) as busy:
        assert through(busy.url, ask) == [False]


@pytest.mark.parametrize("base_url", [[], ["http://a", "ftp://b"], ["http://a", ""]], ids=str)
def test_wrong_addresses_are_refused(base_url: list[str]) -> None:
    """Each of several addresses is checked."""
    with pytest.raises(ValueError, match="base_url"):
        EmbeddingClient(base_url)


def test_addresses_are_in_the_repr() -> None:
    """Each once."""
    with EmbeddingClient(["http://a/", "http://b", "http://a"]) as client:
        assert repr(client) == "EmbeddingClient(['http://a', 'http://b'], timeout_s=1)"
    with pytest.raises(RuntimeError, match="closed"):
        client.lookup("item", [1])
