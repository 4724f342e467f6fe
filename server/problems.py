"""From errors to HTTP: one table of statuses, one shape of body (RFC 9457, application/problem+json)."""

from __future__ import annotations

import orjson

from embstore.errors import EmbstoreError

STATUS = {
    "malformed_request": 400,
    "table_not_found": 404,
    "version_not_found": 404,
    "label_not_found": 404,
    "release_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "too_many_ids": 413,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "unprocessable": 422,
    "id_out_of_range": 422,
    "internal": 500,
    "not_ready": 503,
    "draining": 503,
}
TITLE = {
    "malformed_request": "The request cannot be understood",
    "table_not_found": "No such table",
    "version_not_found": "No such version",
    "label_not_found": "No such label",
    "release_not_found": "No such release",
    "not_found": "No such resource",
    "method_not_allowed": "Method not allowed",
    "conflict": "Conflict with the present state",
    "too_many_ids": "Too many ids",
    "body_too_large": "Body too large",
    "unsupported_media_type": "Unsupported media type",
    "unprocessable": "A value is not allowed",
    "id_out_of_range": "Id out of range",
    "internal": "Internal error",
    "not_ready": "Not ready",
    "draining": "Shutting down",
}
MEDIA_TYPE = b"application/problem+json"


def problem(code: str, detail: str, instance: str, facts: dict[str, str | int] | None = None) -> tuple[int, bytes]:
    """Status and body of a problem. `instance` is the request's id."""
    status = STATUS[code]
    body = {
        "type": f"urn:embstore:problem:{code}",
        "title": TITLE[code],
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
    }
    return status, orjson.dumps((facts or {}) | body)


def problem_of(error: EmbstoreError, instance: str) -> tuple[int, bytes]:
    """Status and body for an error of ours; what has no place in a reply becomes a plain 500."""
    if error.code not in STATUS:
        return problem("internal", "the server failed to answer this request", instance)
    return problem(error.code, str(error), instance, error.facts)


def clip(text: str, length: int = 40) -> str:
    """What a client sent, quoted, and no more of it than a reader wants."""
    return repr(text if len(text) <= length else text[:length] + "...")
