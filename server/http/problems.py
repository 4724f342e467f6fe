"""From errors to HTTP: one table of statuses, one shape of body (RFC 9457, application/problem+json)."""

from __future__ import annotations

import orjson

from embstore.errors import EmbstoreError

STATUS = {
    "malformed_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "table_not_found": 404,
    "version_not_found": 404,
    "label_not_found": 404,
    "release_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "conflict": 409,
    "too_many_ids": 413,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "unprocessable": 422,
    "wrong_dtype": 422,
    "id_out_of_range": 422,
    "overloaded": 429,
    "head_too_large": 431,
    "internal": 500,
    "store_failed": 503,
    "not_ready": 503,
    "draining": 503,
    "device_failed": 503,
    "deadline_exceeded": 504,
}
TITLE = {
    "malformed_request": "Malformed request",
    "unauthorized": "API key required",
    "forbidden": "Forbidden",
    "table_not_found": "Unknown table",
    "version_not_found": "Unknown version",
    "label_not_found": "Unknown label",
    "release_not_found": "Unknown release",
    "not_found": "Not found",
    "method_not_allowed": "Method not allowed",
    "request_timeout": "Request timeout",
    "conflict": "Conflict",
    "too_many_ids": "Too many ids",
    "body_too_large": "Body too large",
    "unsupported_media_type": "Unsupported media type",
    "unprocessable": "Value not allowed",
    "wrong_dtype": "Invalid id dtype",
    "id_out_of_range": "Id out of range",
    "overloaded": "Overloaded",
    "head_too_large": "Request header fields too large",
    "internal": "Internal error",
    "store_failed": "Store failed",
    "not_ready": "Not ready",
    "draining": "Shutting down",
    "device_failed": "Device failed",
    "deadline_exceeded": "Deadline exceeded",
}
_REASONS = {
    "table_not_found": "not_found",
    "version_not_found": "not_found",
    "label_not_found": "not_found",
    "release_not_found": "not_found",
    "too_many_ids": "too_large",
    "body_too_large": "too_large",
    "id_out_of_range": "id_out_of_range",
    "not_ready": "not_ready",
    "device_failed": "not_ready",
    "draining": "draining",
    "internal": "internal",
    "overloaded": "overloaded",
    "deadline_exceeded": "deadline",
    "unauthorized": "unauthorized",
    "forbidden": "unauthorized",
}
"""What a problem counts as; whatever is not here is the request's own fault: malformed."""
MEDIA_TYPE = b"application/problem+json"


def problem(
    code: str, detail: str, instance: str, facts: dict[str, str | int] | None = None, *, on_v2: bool = False
) -> tuple[int, bytes]:
    """Status and body of a problem. `instance` is the request's id; clients of /v2 read the text at `error`."""
    status = STATUS[code]
    body = {
        "type": f"urn:embstore:problem:{code}",
        "title": TITLE[code],
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
    }
    return status, orjson.dumps((facts or {}) | body | ({"error": detail} if on_v2 else {}))


def problem_of(error: EmbstoreError, instance: str, *, on_v2: bool = False) -> tuple[int, bytes]:
    """Status and body for an error of ours; what has no place in a reply becomes a plain 500."""
    if error.code not in STATUS:
        return problem("internal", "the server failed to answer this request", instance, on_v2=on_v2)
    return problem(error.code, str(error), instance, error.facts, on_v2=on_v2)


def reason_of(code: str) -> str:
    """What `embstore_rejected_total` calls an error of this code."""
    return _REASONS.get(code, "internal" if code not in STATUS else "malformed")


def clip(text: str, length: int = 40) -> str:
    """What a client sent, quoted, and no more of it than a reader wants."""
    return repr(text if len(text) <= length else text[:length] + "...")
