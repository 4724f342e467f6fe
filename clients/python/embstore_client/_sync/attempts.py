"""Carries plans out for the sync client: blocking sockets, and threads where several things travel at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import httpx

from embstore_client._core.attempts import Attempt, Attempts
from embstore_client._core.client_core import FAULTS, ClientCore, given_up_by_close
from embstore_client._core.deadline import Deadline
from embstore_client._core.plan import Plan
from embstore_client._core.protocol import Request
from embstore_client._errors import EmbstoreError, Timeout, TooLarge

T = TypeVar("T")
_Outcome = tuple[Attempt, T | None, BaseException | None]

_PARTS_AT_ONCE = 32
_ATTEMPTS_AT_ONCE = 200  # two for every connection: a hedged call that has to wait for a thread is late already


class _Group:
    """Attempts under way that another thread may end together."""

    def __init__(self, outer: _Group | None = None) -> None:
        self._outer = outer
        self._attempts: set[Attempt] = set()
        self.ended = False

    def add(self, attempt: Attempt) -> None:
        """`attempt` sets out; it is cancelled at once where the group has ended."""
        self._attempts.add(attempt)
        if self.ended:  # asked after the adding, for `end` looks at the attempts after it has said so
            attempt.timeouts.cancel()
        if self._outer is not None:
            self._outer.add(attempt)

    def remove(self, attempt: Attempt) -> None:
        """`attempt` is back."""
        self._attempts.discard(attempt)
        if self._outer is not None:
            self._outer.remove(attempt)

    def end(self) -> None:
        """Cancel what is under way and what ever sets out."""
        self.ended = True
        for attempt in tuple(self._attempts):
            attempt.timeouts.cancel()


class Executor:
    """What carries the plans of one client out, attempt by attempt."""

    def __init__(self, core: ClientCore, transport: httpx.BaseTransport) -> None:
        self._core, self._transport = core, transport
        self._all = _Group()
        # A thread starts when there is work for it and none is idle, so an unused pool costs nothing.
        self._parts = ThreadPoolExecutor(_PARTS_AT_ONCE, "embstore-part")
        self._attempts = ThreadPoolExecutor(_ATTEMPTS_AT_ONCE, "embstore-attempt")

    def close(self) -> None:
        """End all calls under way, and all connections."""
        self._all.end()
        self._parts.shutdown(wait=False)  # what is queued still runs, and is given up at once
        self._attempts.shutdown(wait=False)
        self._transport.close()

    def call(
        self,
        operation: str,
        make: Callable[[], Plan[T]],
        timeout_s: float | None,
        attempts: Callable[[Deadline], Attempts] | None = None,
    ) -> T:
        """What the plan of a call makes, within the deadline."""
        if self._all.ended:
            raise RuntimeError("the client is closed")
        with self._core.call(operation, timeout_s) as deadline:
            return self._execute(self._core.plan(make), deadline, attempts or self._core.attempts)

    def _execute(self, plan: Plan[T], deadline: Deadline, attempts: Callable[[Deadline], Attempts]) -> T:
        """Carry out a plan and those that follow from it; in smaller chunks where the server refuses large ones."""
        while True:
            try:
                if len(plan.requests) > 1:
                    answers = self._send_all(plan.requests, deadline, attempts)
                else:  # none where the near-cache knows everything
                    answers = [self._send(request, deadline, attempts, self._all) for request in plan.requests]
            except TooLarge as error:
                plan = plan.smaller(error)
                continue
            merged = plan.merge(answers)
            if not isinstance(merged, Plan):
                return merged
            plan = replace(merged, smaller=plan.smaller)

    def _send_all(
        self, requests: Sequence[Request[Any]], deadline: Deadline, attempts: Callable[[Deadline], Attempts]
    ) -> list[Any]:
        """The answers to requests that travel at the same time; the first error ends the call."""
        group = _Group(self._all)
        futures: list[Future[Any]] = []
        try:
            futures.extend(
                self._submit(self._parts, self._send, request, deadline, attempts, group) for request in requests
            )
            done, late = wait(futures, max(deadline.left(), 0.0), FIRST_EXCEPTION)
            failed = next((future for future in futures if future in done and future.exception()), None)
            if failed is not None:
                failed.result()
            if late:
                raise Timeout(f"no whole answer within {deadline.timeout_s:g} s", timeout_s=deadline.timeout_s)
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            if deadline.left() > 0:  # otherwise they are late, which says something about their addresses
                group.end()

    def _send(
        self,
        request: Request[T],
        deadline: Deadline,
        make_attempts: Callable[[Deadline], Attempts],
        group: _Group,
    ) -> T:
        attempts = make_attempts(deadline)
        if self._core.traffic.hedge is not None:
            return self._send_hedged(request, deadline, attempts, group)
        while True:
            step = attempts.step()
            if not isinstance(step, Attempt):
                time.sleep(step)
                continue
            try:
                answer = self._try(request, step, deadline, group)
            except EmbstoreError as error:
                attempts.failed(step, error)
            except BaseException:
                attempts.dropped(step)
                raise
            else:
                attempts.answered(step)
                return answer

    def _send_hedged(self, request: Request[T], deadline: Deadline, attempts: Attempts, group: _Group) -> T:
        """Attempts in threads of their own, so that a second one can start while the first waits."""
        ended: SimpleQueue[_Outcome[T]] = SimpleQueue()

        def send(attempt: Attempt) -> None:
            try:
                ended.put((attempt, self._try(request, attempt, deadline, group), None))
            except BaseException as error:
                ended.put((attempt, None, error))

        running: list[Attempt] = []
        try:
            while True:
                step = attempts.step()
                if isinstance(step, Attempt):
                    running.append(step)
                    self._submit(self._attempts, send, step)
                    continue
                try:
                    attempt, answer, error = ended.get(timeout=step)
                except Empty:
                    continue
                if isinstance(error, EmbstoreError):
                    running.remove(attempt)
                    attempts.failed(attempt, error)
                elif error is not None:
                    raise error
                else:
                    running.remove(attempt)
                    attempts.answered(attempt)
                    return answer  # type: ignore[return-value] # an attempt without an error has its answer
        finally:
            for attempt in running:
                attempt.timeouts.cancel()
                attempts.dropped(attempt)

    def _try(self, request: Request[T], attempt: Attempt, deadline: Deadline, group: _Group) -> T:
        core, timeouts, chunks = self._core, attempt.timeouts, []
        group.add(attempt)
        try:
            if timeouts.cancelled:
                raise given_up_by_close()
            response = self._transport.handle_request(core.http_request(request, attempt))
            try:
                for chunk in response.iter_bytes():
                    timeouts.check()
                    chunks.append(chunk)
            finally:
                response.close()
        except FAULTS as fault:
            raise core.error_of(fault, attempt, deadline, closed=timeouts.cancelled) from fault
        finally:
            group.remove(attempt)
        return core.parse(request, response, chunks)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> Future[T]:
        try:
            return pool.submit(copy_context().run, work, *arguments)
        except RuntimeError as error:
            if self._all.ended:
                raise given_up_by_close() from error
            raise
