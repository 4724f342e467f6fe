"""Carries plans out for the async client: tasks, under asyncio or trio."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import httpx

from embstore_client._core.attempts import Attempt, Attempts
from embstore_client._core.client_core import FAULTS, ClientCore, given_up_by_close
from embstore_client._core.deadline import Deadline
from embstore_client._core.plan import Plan
from embstore_client._core.protocol import Request
from embstore_client._errors import EmbstoreError, TooLarge

T = TypeVar("T")


class Executor:
    """What carries the plans of one client out, attempt by attempt."""

    def __init__(self, core: ClientCore, transport: httpx.AsyncBaseTransport) -> None:
        self._core, self._transport = core, transport
        self._closed = False
        self._under_way: set[anyio.CancelScope] = set()

    async def aclose(self) -> None:
        """End all calls under way, and all connections."""
        self._closed = True
        for attempt in self._under_way:
            attempt.cancel()
        await self._transport.aclose()

    async def call(
        self,
        operation: str,
        make: Callable[[], Plan[T]],
        timeout_s: float | None,
        attempts: Callable[[Deadline], Attempts] | None = None,
    ) -> T:
        """What the plan of a call makes, within the deadline."""
        if self._closed:
            raise RuntimeError("the client is closed")
        with self._core.call(operation, timeout_s) as deadline:
            return await self._execute(self._core.plan(make), deadline, attempts or self._core.attempts)

    async def _execute(self, plan: Plan[T], deadline: Deadline, attempts: Callable[[Deadline], Attempts]) -> T:
        """Carry out a plan and those that follow from it; in smaller chunks where the server refuses large ones."""
        while True:
            try:
                if len(plan.requests) > 1:
                    answers = await self._send_all(plan.requests, deadline, attempts)
                else:  # none where the near-cache knows everything
                    answers = [await self._send(request, deadline, attempts) for request in plan.requests]
            except TooLarge as error:
                plan = plan.smaller(error)
                continue
            merged = plan.merge(answers)
            if not isinstance(merged, Plan):
                return merged
            plan = replace(merged, smaller=plan.smaller)

    async def _send_all(
        self, requests: Sequence[Request[Any]], deadline: Deadline, attempts: Callable[[Deadline], Attempts]
    ) -> list[Any]:
        """The answers to requests that travel at the same time; the first error ends the call."""
        answers: list[Any] = [None] * len(requests)
        errors: list[Exception] = []

        async def send(i: int, request: Request[Any]) -> None:
            try:
                answers[i] = await self._send(request, deadline, attempts)
            except Exception as error:
                errors.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for i, request in enumerate(requests):
                group.start_soon(send, i, request)
        if errors:
            raise errors[0]
        return answers

    async def _send(self, request: Request[T], deadline: Deadline, make_attempts: Callable[[Deadline], Attempts]) -> T:
        attempts = make_attempts(deadline)
        if self._core.traffic.hedge is not None:
            return await self._send_hedged(request, deadline, attempts)
        while True:
            step = attempts.step()
            if not isinstance(step, Attempt):
                await anyio.sleep(step)
                continue
            try:
                answer = await self._try(request, step, deadline)
            except EmbstoreError as error:
                attempts.failed(step, error)
            except BaseException:
                attempts.dropped(step)
                raise
            else:
                attempts.answered(step)
                return answer

    async def _send_hedged(self, request: Request[T], deadline: Deadline, attempts: Attempts) -> T:
        """Attempts in tasks of their own, so that a second one can start while the first waits."""
        ended: deque[tuple[Attempt, T | None, Exception | None]] = deque()
        news = anyio.Event()

        async def send(attempt: Attempt) -> None:
            try:
                ended.append((attempt, await self._try(request, attempt, deadline), None))
            except Exception as error:
                ended.append((attempt, None, error))
            news.set()

        running: list[Attempt] = []
        result: list[T] = []
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as group:
                while not result and failure is None:
                    try:
                        step = attempts.step()
                        if isinstance(step, Attempt):
                            running.append(step)
                            group.start_soon(send, step)
                            continue
                        with anyio.move_on_after(step):
                            await news.wait()
                        while ended and not result:
                            attempt, answer, error = ended.popleft()
                            if error is None:
                                running.remove(attempt)
                                attempts.answered(attempt)
                                result.append(answer)  # type: ignore[arg-type] # without an error there is an answer
                            elif isinstance(error, EmbstoreError):
                                running.remove(attempt)
                                attempts.failed(attempt, error)
                            else:
                                raise error
                        news = anyio.Event()
                    except Exception as error:
                        failure = error
                group.cancel_scope.cancel()
        finally:
            for attempt in running:
                attempts.dropped(attempt)
        if failure is not None:
            raise failure
        return result[0]

    async def _try(self, request: Request[T], attempt: Attempt, deadline: Deadline) -> T:
        core, timeouts, chunks = self._core, attempt.timeouts, []
        if self._closed:
            raise given_up_by_close()
        try:
            with anyio.fail_after(timeouts.left()) as scope:
                self._under_way.add(scope)
                try:
                    response = await self._transport.handle_async_request(core.http_request(request, attempt))
                    try:
                        async for chunk in response.aiter_bytes():
                            timeouts.check()
                            chunks.append(chunk)
                    finally:
                        await response.aclose()
                finally:
                    self._under_way.discard(scope)
        except (*FAULTS, TimeoutError) as fault:
            raise core.error_of(fault, attempt, deadline, closed=self._closed) from fault
        if scope.cancelled_caught:
            raise given_up_by_close()
        return core.parse(request, response, chunks)
