"""Replies that leave together: while a slice of requests is answered, their replies wait and are then sent in a row.

Code stays in the processor's caches, and the peer is woken once rather than for every reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from server.http.buffer_pool import Floats
from server.http.messages import Buffer

log = structlog.get_logger()
MAX_BYTES = 1 << 20
"""Bytes of replies held back at most: they shall still be in the processor's cache when they are sent."""


class Sender(Protocol):
    """A connection."""

    transport: asyncio.Transport

    def write(self, parts: Sequence[Buffer], num_bytes: int, leases: Sequence[Floats]) -> None:
        """Send bytes, and give back the memory behind them."""


class Outbox:
    """The replies of one event loop that wait, while it is open, for `flush` or `close`."""

    def __init__(self) -> None:
        self._replies: list[tuple[Sender, Sequence[Buffer], int, Sequence[Floats]]] = []
        self._num_bytes = 0
        self.is_open = False

    def open(self) -> None:
        """Hold replies back from now on."""
        self.is_open = True

    def close(self) -> None:
        """Send what was held back, and hold no more."""
        self.flush()
        self.is_open = False

    def send(self, sender: Sender, parts: Sequence[Buffer], num_bytes: int, leases: Sequence[Floats]) -> None:
        """Send a reply with the others of this slice."""
        self._replies.append((sender, parts, num_bytes, leases))
        self._num_bytes += num_bytes
        if self._num_bytes >= MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is held back."""
        if not self._replies:
            return
        replies, self._replies, self._num_bytes = self._replies, [], 0
        for sender, parts, num_bytes, leases in replies:
            try:
                sender.write(parts, num_bytes, leases)
            except Exception:  # one connection's trouble is not the others'
                log.exception("a reply could not be sent")
                sender.transport.abort()
