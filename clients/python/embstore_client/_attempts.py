"""The attempts of one request, without IO: where each goes, when the next one starts, which answer counts.

A shell does what `step` says and reports how each attempt ended; both shells do, so they cannot disagree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ._balance import Address, Balance
from ._budget import Budget
from ._deadline import Deadline, Patience
from ._errors import (
    ConnectionFailed,
    EmbstoreError,
    Overloaded,
    ProtocolError,
    ServiceError,
    Timeout,
    Unavailable,
)
from ._latency import RecentLatencies
from ._observe import Guarded, Observer
from ._settings import Hedge, Retries

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
        self.balance = Balance(urls, self.random)
        self.observer = None if observer is None else Guarded(observer)
        allowed = retries or Retries()
        self.retry_budget = Budget(allowed.budget, per_s=allowed.min_per_s, burst=_BURST, initial=_INITIAL)
        if hedge is not None:
            self.latencies = RecentLatencies(hedge.percentile, hedge.min_samples)
            self.hedge_budget = Budget(hedge.max_share, per_s=0.0, burst=10.0, initial=0.0)

    def tell(self, event: str, **facts: object) -> None:
        """Pass an event on to the observer, if there is one."""
        if self.observer is not None:
            self.observer.tell(event, **facts)


@dataclass(slots=True, eq=False)
class Attempt:
    """One time that a request travels."""

    address: Address
    number: int
    hedge: bool
    began: float
    patience: Patience


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
        self._number = 0
        self._hedges = 0
        self._due: tuple[float, Address] | None = None
        self._hedge_at: float | None = None

    def step(self) -> Attempt | float:
        """The attempt to start now, or the seconds to wait for what runs; less where something is due earlier."""
        now = self._traffic.clock()
        if self._number == 0:
            return self._first(now)
        if self._due is not None:
            at, address = self._due
            if now < at:
                return at - now
            self._due = None
            return self._start(now, address)
        left = self._deadline.end - now
        if left <= 0:
            raise late(self._running[0].address, self._deadline)
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
        with traffic.lock:
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
        self._running.remove(attempt)
        self._judge(attempt, error, now)
        if now >= self._deadline.end or not _may_end_better(error):
            raise error
        if self._running:
            return
        retries = self._retries
        if retries is None or self._number - self._hedges >= retries.max_attempts:
            raise error
        with traffic.lock:
            address = traffic.balance.choose(now, self._tried)
            backoff = min(retries.base_s * 2.0 ** (self._number - self._hedges - 1), retries.max_s)
            at = max(now, address.disliked_until) + traffic.random.uniform(0.0, backoff)
            if at >= self._deadline.end or not traffic.retry_budget.take(now):
                raise error
        self._due = (at, address)
        traffic.tell("retry", address=address.url, wait_s=at - now, reason=reason_of(error))

    def dropped(self, attempt: Attempt) -> None:
        """`attempt` was given up, because another one brought the answer or nobody waits for one."""
        traffic = self._traffic
        seconds = traffic.clock() - attempt.began
        with traffic.lock:
            traffic.balance.dropped(attempt.address)
            if traffic.hedge is not None:
                traffic.latencies.add(seconds)  # it would have taken longer, but to forget it would flatter the rest
        self._ended(attempt, None, seconds, "cancelled")

    def _first(self, now: float) -> Attempt:
        traffic = self._traffic
        with traffic.lock:
            traffic.retry_budget.deposit()
            if traffic.hedge is not None:
                traffic.hedge_budget.deposit()
            address = traffic.balance.choose(now)
        return self._start(now, address)

    def _hedge(self, now: float) -> Attempt | None:
        """A second attempt beside the slow one, where the share of extra requests allows it."""
        traffic = self._traffic
        with traffic.lock:
            if not traffic.hedge_budget.take(now):
                return None
            address = traffic.balance.choose(now, self._tried)
        self._hedges += 1
        traffic.tell("hedge", address=address.url, after_s=now - self._running[0].began)
        return self._start(now, address, hedge=True)

    def _start(self, now: float, address: Address, *, hedge: bool = False) -> Attempt:
        traffic = self._traffic
        several = len(traffic.balance.addresses) > 1 and self._retries is not None
        patience = Patience(self._deadline, _CONNECT_SHARE if several else 1.0)
        self._number += 1
        attempt = Attempt(address, self._number, hedge, now, patience)
        self._running.append(attempt)
        self._tried.append(address)
        with traffic.lock:
            traffic.balance.started(address)
        if traffic.hedge is not None and not self._hedges:
            after = traffic.latencies.percentile()
            self._hedge_at = None if after is None else now + traffic.hedge.bounded(after)
        traffic.tell("attempt_started", address=address.url, number=self._number, hedge=hedge)
        return attempt

    def _judge(self, attempt: Attempt, error: EmbstoreError, now: float) -> None:
        """What the failure says about the address."""
        traffic, address = self._traffic, attempt.address
        seconds, pause, restored = now - attempt.began, None, False
        with traffic.lock:
            if isinstance(error, ConnectionFailed | Timeout | Unavailable) or _from_a_gateway(error):
                pause = traffic.balance.failed(address, now)
            else:  # an answer, if not the one hoped for; a refusal is quick, so it tells nothing about the speed
                restored = traffic.balance.answered(address, now, None)
            if isinstance(error, Overloaded | Unavailable) and error.retry_after_s:
                traffic.balance.asked_to_wait(address, now, error.retry_after_s)
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


def late(address: Address, deadline: Deadline) -> Timeout:
    """The error of a call whose time is over."""
    seconds = deadline.timeout_s
    return Timeout(f"no whole answer from {address.url} within {seconds:g} s", timeout_s=seconds)


def _may_end_better(error: EmbstoreError) -> bool:
    """Whether another attempt may: lookups only read, so what was not answered may be asked again."""
    return isinstance(error, ConnectionFailed | Overloaded | Unavailable | Timeout) or _from_a_gateway(error)


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
