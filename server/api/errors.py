"""Errors of FastAPI's routes as the same problem bodies that lookups answer with."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from embstore.errors import EmbstoreError
from server.api.repository import unsupported
from server.http.problems import KINDS, MEDIA_TYPE, problem

log = structlog.get_logger()


def add_errors(api: FastAPI) -> None:
    """Answer every exception of a route with a problem."""

    @api.exception_handler(EmbstoreError)
    def known(request: Request, error: EmbstoreError) -> Response:
        if error.code not in KINDS:
            return unexpected(request, error)
        return _reply(request, error.code, str(error), error.facts)

    @api.exception_handler(HTTPException)
    def unrouted(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "malformed_request")
        path = request.url.path
        if code == "not_found" and path.startswith("/v2"):
            detail = unsupported(path)
        else:
            detail = f"{request.method} {path} is not a call of this server; see /docs"
        answer = _reply(request, code, detail)
        answer.headers.update(error.headers or {})
        return answer

    @api.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        log.error("request failed", path=request.url.path, exc_info=error)
        return _reply(request, "internal", "the server failed to answer this request")


def _reply(request: Request, code: str, detail: str, facts: dict[str, str | int] | None = None) -> Response:
    on_v2 = request.url.path.startswith("/v2")
    status, body = problem(code, detail, request.scope["request_id"], facts, on_v2=on_v2)
    return Response(body, status, media_type=MEDIA_TYPE.decode())
