"""Errors as RFC 9457 problems: one shape for whatever is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ranker.schemas import Unprocessable

MEDIA_TYPE = "application/problem+json"
CODES = {
    400: ("malformed_request", "The request cannot be understood"),
    404: ("not_found", "No such resource"),
    405: ("method_not_allowed", "Method not allowed"),
    413: ("too_large", "The request is too large"),
    422: ("unprocessable", "A value is not allowed"),
    500: ("internal", "Internal error"),
}


class TooLarge(HTTPException):
    """More than one request may hold; `limit` is what it may."""

    def __init__(self, detail: str, limit: int) -> None:
        super().__init__(413, detail)
        self.limit = limit


def problem(status: int, detail: str, **facts: Any) -> JSONResponse:
    """A problem as a reply."""
    code, title = CODES.get(status, ("refused", "The request was refused"))
    body = {"type": f"urn:ranker:problem:{code}", "title": title, "status": status, "detail": detail, "code": code}
    return JSONResponse(body | facts, status, media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI, refused: Counter) -> None:
    """Make every error of the app a problem, and count those that are the caller's."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        refused.inc()
        faults = error.errors()
        unread = any(fault["type"] == "json_invalid" for fault in faults)
        return problem(400 if unread else 422, "; ".join(_in_words(fault) for fault in faults[:3]))

    @app.exception_handler(Unprocessable)
    async def unprocessable(_: Request, error: Unprocessable) -> JSONResponse:
        refused.inc()
        return problem(422, str(error))

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        refused.inc()
        facts = {"limit": error.limit} if isinstance(error, TooLarge) else {}
        reply = problem(error.status_code, error.detail, **facts)
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return problem(500, "the ranker failed to answer this request")


class LimitBody:
    """ASGI middleware: a body of more than `limit` bytes is not read to its end."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the bytes that the app receives."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise TooLarge(f"the body may have {self.limit:,} bytes", self.limit)
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


def _in_words(fault: dict[str, Any]) -> str:
    """One fault: the place, and what is wrong there."""
    place = _place(fault["loc"])
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault.get('ctx', {}).get('error', 'it cannot be read')}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}"


def _place(loc: Sequence[str | int]) -> str:
    """`candidates[3]` for ("body", "candidates", 3)."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[1:])
    return text.removeprefix(".") or "the body"
