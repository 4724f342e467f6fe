"""An error answer -> the exception that is its twin: RFC 9457 problem documents, or what a proxy sends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from embstore_client._errors import BY_CODE, BY_STATUS, ServiceError

_LONGEST_EXCERPT = 200


def parse_problem(status: int, headers: Mapping[str, str], body: bytes) -> ServiceError:
    """The exception for an answer with `status` >= 400; never fails, whatever the body holds."""
    problem = _document(headers, body)
    code = _text(problem, "code") or ""
    title = _text(problem, "title") or _phrase(status)
    detail = _text(problem, "detail") or ("" if problem else _excerpt(headers, body))
    request_id = headers.get("x-request-id")
    about = ", ".join(part for part in (str(status), code, request_id and f"request {request_id}") if part)
    cls = BY_CODE.get(code) or BY_STATUS.get(status) or ServiceError
    return cls(
        f"{detail or title} ({about})",
        status=status,
        code=code,
        title=title,
        detail=detail,
        table=_text(problem, "table"),
        version=_integer(problem, "version"),
        limit=_integer(problem, "limit"),
        request_id=request_id,
        retry_after_s=parse_retry_after(headers),
    )


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """`Retry-After` in seconds: a number, or a date counted from the answer's own `Date`."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            until, now = parsedate_to_datetime(text), parsedate_to_datetime(headers["date"])
            seconds = max(0.0, (until - now).total_seconds())
        except (ValueError, TypeError, KeyError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _document(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The problem's members; empty where the body is none."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/problem+json", "application/json"):
        return {}
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _text(problem: dict[str, Any], name: str) -> str | None:
    value = problem.get(name)
    return value if isinstance(value, str) else None


def _integer(problem: dict[str, Any], name: str) -> int | None:
    value = problem.get(name)
    return value if type(value) is int else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"


def _excerpt(headers: Mapping[str, str], body: bytes) -> str:
    """The start of a body that is no problem document: most often the page of a proxy."""
    text = " ".join(body[: 4 * _LONGEST_EXCERPT].decode("utf-8", "replace").split())[:_LONGEST_EXCERPT]
    return f"not an embstore answer but {headers.get('content-type', 'bytes')}: {text}" if text else ""
