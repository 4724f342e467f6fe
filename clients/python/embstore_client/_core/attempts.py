"""The attempts of one request, without IO: where each goes, when the next one starts, which answer counts.

An executor does what `step` says and reports how each attempt ended; both do, so they cannot disagree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NoReturn

from embstore_client._core.balancer import Address, Balancer
from embstore_client._core.deadline import AttemptTimeouts, Deadline
from embstore_client._core.latency import RecentLatencies
from embstore_client._core.observer import Guarded, Observer
from embstore_client._core.policies import Hedge, Retries
from embstore_client._core.token_bucket import TokenBucket
from embstore_client._errors import (
    ConnectionFailed,
    EmbstoreError,
    Overloaded,
    ProtocolError,
    ServiceError,
    Timeout,
    Unavailable,
)

_BURST, _INITIAL = 100.0, 10.0
"""Retries that may be saved up for a bad moment, and those that a new client has."""
_CONNECT_SHARE = 0.5
"""Of what is left, a connect may take so much where another address could be asked instead."""


class Traffic:
    """What all requests of one client share: addresses, budgets, recent latencies. Its lock guards them all."""

    def __init__(
        self,
        urls: Sequence[str],
        retries: Retries | None,
        hedge: Hedge | None,
        observer: Observer | None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self.retries, self.hedge, self.clock = retries, hedge, clock
        self.random = random or Random()
        self.lock = threading.Lock()
        self.balance = Balancer(urls, self.random)
        self.observer = None if observer is None else Guarded(observer)
        allowed = retries or Retries()
        self.retry_budget = TokenBucket(allowed.budget, per_s=allowed.min_per_s, burst=_BURST, initial=_INITIAL)
        if hedge is not None:
            self.latencies = RecentLatencies(hedge.percentile, hedge.min_samples)
            self.hedge_budget = TokenBucket(hedge.max_share, per_s=0.0, burst=10.0, initial=0.0)

    def tell(self, event: str, **facts: object) -> None:
        """Pass an event on to the observer, if there is one."""
        if self.observer is not None:
            self.observer.tell(event, **facts)


@dataclass(slots=True, eq=False)
class Attempt:
    """One time that a request is sent."""

    address: Address
    number: int
    hedge: bool
    probe: bool
    began: float
    timeouts: AttemptTimeouts


class Attempts:
    """One request from its first attempt to its answer.

    >>> attempts = Attempts(traffic, deadline)                                  # doctest: +SKIP
    >>> step = attempts.step()      # an `Attempt` to start now, or seconds to wait (or until an attempt ends)
    >>> attempts.answered(step)     # its answer is the answer; or
    >>> attempts.failed(step, error)   # raises what the call raises, unless there is more to `step`
    """

    def __init__(self, traffic: Traffic, deadline: Deadline, retries: Retries | None) -> None:
        self._traffic, self._deadline, self._retries = traffic, deadline, retries
        self._running: list[Attempt] = []
        self._tried: list[Address] = []
        self._refused: EmbstoreError | None = None  # by one of two, which need not be what the other one brings
        self._number = 0
        self._hedges = 0
        self._due: tuple[float, Address] | None = None
        self._hedge_at: float | None = None

    def step(self) -> Attempt | float:
        """The attempt to start now, or the seconds to wait for what runs; less where something is due earlier."""
        now = self._traffic.clock()
        left = self._deadline.end - now
        if left <= 0:
            self._late(now)
        if self._number == 0:
            return self._first(now)
        if self._due is not None:
            at, address = self._due
            if now < at:
                return at - now
            self._due = None
            return self._start(now, address)
        if self._hedge_at is None:
            return left
        if now < self._hedge_at:
            return min(self._hedge_at - now, left)
        self._hedge_at = None
        return self._hedge(now) or left

    def answered(self, attempt: Attempt) -> None:
        """`attempt` brought the answer: nothing else is waited for."""
        traffic = self._traffic
        now = traffic.clock()
        seconds = now - attempt.began
        self._running.remove(attempt)
        with traffic.lock:
            traffic.balance.ended(attempt.address, probe=attempt.probe)
            restored = traffic.balance.answered(attempt.address, now, seconds)
            if traffic.hedge is not None:
                traffic.latencies.add(seconds)
        if traffic.observer is not None:
            if restored:
                traffic.tell("restored", address=attempt.address.url)
            self._ended(attempt, 200, seconds, "ok")

    def failed(self, attempt: Attempt, error: EmbstoreError) -> None:
        """`attempt` brought no answer; raises `error` where no other attempt is made or still runs."""
        traffic = self._traffic
        now = traffic.clock()
        self._judge(attempt, error, now)
        if not _may_end_better(error):
            self._refused = self._refused or error
        if self._running:
            if now >= self._deadline.end:
                self._late(now)
            return
        retries = self._retries
        if retries is None or not _may_end_better(error) or self._number - self._hedges >= retries.max_attempts:
            raise self._refused or error
        with traffic.lock:
            address = traffic.balance.choose(now, self._tried)
            backoff = min(retries.base_s * 2.0 ** (self._number - self._hedges - 1), retries.max_s)
            at = max(now, address.disliked_until)
            if address is attempt.address:
                at = max(at, now + _retry_after_s(error))
            at += traffic.random.uniform(0.0, backoff)
            if at >= self._deadline.end or not traffic.retry_budget.take(now):
                raise self._refused or error
        self._due = (at, address)
        traffic.tell("retry", address=address.url, wait_s=at - now, reason=reason_of(error))

    def dropped(self, attempt: Attempt) -> None:
        """`attempt` was given up, because another one brought the answer or nobody waits for one."""
        if attempt not in self._running:
            return  # it ended before, or was late
        traffic = self._traffic
        now = traffic.clock()
        seconds = now - attempt.began
        self._running.remove(attempt)
        with traffic.lock:
            traffic.balance.ended(attempt.address, probe=attempt.probe)
            if not attempt.timeouts.queues:
                traffic.balance.overtaken(attempt.address, now, seconds)
            if traffic.hedge is not None:
                traffic.latencies.add(seconds)  # it would have taken longer, but to forget it would flatter the rest
        self._ended(attempt, None, seconds, "cancelled")

    def _first(self, now: float) -> Attempt:
        traffic = self._traffic
        with traffic.lock:
            traffic.retry_budget.deposit()
            if traffic.hedge is not None:
                traffic.hedge_budget.deposit()
        return self._start(now)

    def _hedge(self, now: float) -> Attempt | None:
        """A second attempt beside the slow one, where the share of extra requests allows it."""
        traffic = self._traffic
        with traffic.lock:
            if not traffic.hedge_budget.take(now):
                return None
        self._hedges += 1
        return self._start(now, hedge=True)

    def _start(self, now: float, address: Address | None = None, *, hedge: bool = False) -> Attempt:
        traffic = self._traffic
        with traffic.lock:  # chosen and started at once, so that no two probe the same address
            address = address or traffic.balance.choose(now, self._tried)
            probe = traffic.balance.started(address, now)
        if hedge:
            traffic.tell("hedge", address=address.url, after_s=now - self._running[0].began)
        several = len(traffic.balance.addresses) > 1 and self._retries is not None
        timeouts = AttemptTimeouts(self._deadline, _CONNECT_SHARE if several else 1.0)
        self._number += 1
        attempt = Attempt(address, self._number, hedge, probe, now, timeouts)
        self._running.append(attempt)
        self._tried.append(address)
        if traffic.hedge is not None and not self._hedges:
            after = traffic.latencies.percentile()
            self._hedge_at = None if after is None else now + traffic.hedge.bounded(after)
        traffic.tell("attempt_started", address=address.url, number=self._number, hedge=hedge)
        return attempt

    def _late(self, now: float) -> NoReturn:
        """The time is over: who was asked and has not answered has failed."""
        error = late(self._tried[-1] if self._tried else None, self._deadline)
        for attempt in list(self._running):
            self._judge(attempt, error, now)
        raise self._refused or error

    def _judge(self, attempt: Attempt, error: EmbstoreError, now: float) -> None:
        """Ends an attempt that failed, with what that says about its address."""
        traffic, address = self._traffic, attempt.address
        seconds, pause, restored = now - attempt.began, None, False
        self._running.remove(attempt)
        with traffic.lock:
            traffic.balance.ended(address, probe=attempt.probe)
            if attempt.timeouts.queues or attempt.timeouts.cancelled:
                pass  # it never reached the address, or was ended from here
            elif isinstance(error, ConnectionFailed | Timeout | Unavailable) or _from_a_gateway(error):
                pause = traffic.balance.failed(address, now, attempt.began)
            else:  # an answer, if not the one hoped for; a refusal is quick, so it tells nothing about the speed
                restored = traffic.balance.answered(address, now, None)
            if _retry_after_s(error):
                traffic.balance.asked_to_wait(address, now, _retry_after_s(error))
        if traffic.observer is not None:
            self._ended(attempt, getattr(error, "status", None), seconds, reason_of(error))
            if pause is not None:
                traffic.tell("ejected", address=address.url, pause_s=pause)
            if restored:
                traffic.tell("restored", address=address.url)

    def _ended(self, attempt: Attempt, status: int | None, seconds: float, reason: str) -> None:
        self._traffic.tell(
            "attempt_ended",
            address=attempt.address.url,
            number=attempt.number,
            hedge=attempt.hedge,
            status=status,
            seconds=seconds,
            reason=reason,
        )


class EachAddress(Attempts):
    """One attempt at each address in turn, each with its share of the time; apart from what lookups cause and learn."""

    def __init__(self, traffic: Traffic, deadline: Deadline) -> None:
        super().__init__(traffic, deadline, None)
        self._untried = list(traffic.balance.addresses)

    def step(self) -> Attempt | float:
        now = self._traffic.clock()
        left = self._deadline.end - now
        if left <= 0:
            raise self._refused or late(self._tried[-1] if self._tried else None, self._deadline)
        if self._running:
            return left
        timeouts = AttemptTimeouts(Deadline(left / len(self._untried), self._traffic.clock))
        address = self._untried.pop(0)
        attempt = Attempt(address, len(self._tried) + 1, hedge=False, probe=False, began=now, timeouts=timeouts)
        self._running.append(attempt)
        self._tried.append(address)
        self._traffic.tell("attempt_started", address=address.url, number=attempt.number, hedge=False)
        return attempt

    def answered(self, attempt: Attempt) -> None:
        self._over(attempt, 200, "ok")

    def failed(self, attempt: Attempt, error: EmbstoreError) -> None:
        self._over(attempt, getattr(error, "status", None), reason_of(error))
        if not _may_end_better(error):
            self._refused = self._refused or error
        if not self._untried:
            raise self._refused or error

    def dropped(self, attempt: Attempt) -> None:
        self._over(attempt, None, "cancelled")

    def _over(self, attempt: Attempt, status: int | None, reason: str) -> None:
        self._running.remove(attempt)
        self._ended(attempt, status, self._traffic.clock() - attempt.began, reason)


def late(address: Address | None, deadline: Deadline) -> Timeout:
    """The error of a call whose time is over; None where no address was asked."""
    seconds, whose = deadline.timeout_s, "" if address is None else f" from {address.url}"
    return Timeout(f"no whole answer{whose} within {seconds:g} s", timeout_s=seconds)


def _may_end_better(error: EmbstoreError) -> bool:
    """Whether another attempt may: lookups only read, so what was not answered may be asked again."""
    return isinstance(error, ConnectionFailed | Overloaded | Unavailable | Timeout) or _from_a_gateway(error)


def _retry_after_s(error: EmbstoreError) -> float:
    """How long the server asks to be left alone."""
    return error.retry_after_s or 0.0 if isinstance(error, Overloaded | Unavailable) else 0.0


def _from_a_gateway(error: EmbstoreError) -> bool:
    """A 504 without a code of ours; the service's own says that this very deadline has passed."""
    return isinstance(error, ServiceError) and error.status == 504 and not error.code


def reason_of(error: BaseException | None) -> str:
    """Why something ended, as one word of a small set."""
    if error is None:
        return "ok"
    if isinstance(error, ServiceError):
        return error.code or str(error.status)
    kinds = ((Timeout, "timeout"), (ConnectionFailed, "connection"), (ProtocolError, "protocol"))
    return next((word for kind, word in kinds if isinstance(error, kind)), "cancelled")
