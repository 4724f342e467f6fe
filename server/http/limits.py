"""What one request, and one connection, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the server; each is a setting of the same name."""

    max_ids: int
    max_body_bytes: int
    max_reply_bytes: int
    max_connections: int
    request_seconds: float
    keepalive_seconds: float
    shutdown_seconds: float
