"""From errors to HTTP: one table of statuses, one shape of body (RFC 9457, application/problem+json)."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from embstore.errors import EmbstoreError


class Kind(NamedTuple):
    """What an error of one code is: its status and title, and what `embstore_rejected_total` counts it as."""

    status: int
    title: str
    reason: str = "malformed"


KINDS = {
    "malformed_request": Kind(400, "Malformed request"),
    "unauthorized": Kind(401, "API key required", "unauthorized"),
    "forbidden": Kind(403, "Forbidden", "unauthorized"),
    "table_not_found": Kind(404, "Unknown table", "not_found"),
    "version_not_found": Kind(404, "Unknown version", "not_found"),
    "label_not_found": Kind(404, "Unknown label", "not_found"),
    "release_not_found": Kind(404, "Unknown release", "not_found"),
    "not_found": Kind(404, "Not found"),
    "method_not_allowed": Kind(405, "Method not allowed"),
    "request_timeout": Kind(408, "Request timeout"),
    "conflict": Kind(409, "Conflict"),
    "too_many_ids": Kind(413, "Too many ids", "too_large"),
    "body_too_large": Kind(413, "Body too large", "too_large"),
    "unsupported_media_type": Kind(415, "Unsupported media type"),
    "unprocessable": Kind(422, "Value not allowed"),
    "wrong_dtype": Kind(422, "Invalid id dtype"),
    "id_out_of_range": Kind(422, "Id out of range", "id_out_of_range"),
    "overloaded": Kind(429, "Overloaded", "overloaded"),
    "head_too_large": Kind(431, "Request header fields too large"),
    "internal": Kind(500, "Internal error", "internal"),
    "store_failed": Kind(503, "Store failed", "not_ready"),
    "not_ready": Kind(503, "Not ready", "not_ready"),
    "draining": Kind(503, "Shutting down", "draining"),
    "device_failed": Kind(503, "Device failed", "not_ready"),
    "deadline_exceeded": Kind(504, "Deadline exceeded", "deadline"),
}
MEDIA_TYPE = b"application/problem+json"


def problem(
    code: str, detail: str, instance: str, facts: dict[str, str | int] | None = None, *, on_v2: bool = False
) -> tuple[int, bytes]:
    """Status and body of a problem. `instance` is the request's id; clients of /v2 read the text at `error`."""
    kind = KINDS[code]
    body = {
        "type": f"urn:embstore:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": instance,
        "code": code,
    }
    return kind.status, orjson.dumps((facts or {}) | body | ({"error": detail} if on_v2 else {}))


def problem_of(error: EmbstoreError, instance: str, *, on_v2: bool = False) -> tuple[int, bytes]:
    """Status and body for an error of ours; what has no place in a reply becomes a plain 500."""
    if error.code not in KINDS:
        return problem("internal", "the server failed to answer this request", instance, on_v2=on_v2)
    return problem(error.code, str(error), instance, error.facts, on_v2=on_v2)


def reason_of(code: str) -> str:
    """What `embstore_rejected_total` calls an error of this code."""
    return KINDS[code].reason if code in KINDS else "internal"


def clip(text: str, length: int = 40) -> str:
    """What a client sent, quoted, and no more of it than a reader wants."""
    return repr(text if len(text) <= length else text[:length] + "...")
