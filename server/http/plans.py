"""Heads seen before: a request whose head is known, byte for byte, needs no parsing.

Clients send the same head thousands of times: the same path, options, key and length. When a request has been parsed
and answered the general way, and its head and body were all that one read brought, its head is kept with what parsing
it gave. What differs in every request (a request id, a trace) makes heads that never come again: the map is bounded,
and they push each other out, not those in use.
"""

from __future__ import annotations

from typing import Any

from server.http.routing import INFER, LOOKUP, LOOKUP_MANY, Route

MAX_HEADS = 512
"""Of a generation, of which there are two."""
MAX_HEAD_BYTES = 4096
_UNUSUAL = (b"transfer-encoding", b"upgrade", b"expect", b"content-encoding", b"trailer", b"te")
"""With any of these headers a request goes the general way."""


class Plan:
    """What the head of a request says, checked."""

    __slots__ = ("content_length", "headers", "prepared", "request_id", "route", "timeout_s")

    def __init__(
        self,
        route: Route,
        headers: dict[bytes, bytes],
        request_id: bytes | None,
        timeout_s: float,
    ) -> None:
        self.route, self.headers = route, headers
        self.content_length = int(headers[b"content-length"])
        self.request_id = request_id
        """The caller's own, None where the server makes one."""
        self.timeout_s = timeout_s
        """Seconds from the head's arrival that the caller waits; inf where it does not say."""
        self.prepared: Any = None
        """What the handler keeps of it."""


class Plans:
    """Plans by head. Those used lately stay: a full generation becomes the old one, and what is found there moves."""

    def __init__(self) -> None:
        self._young: dict[bytes, Plan] = {}
        self._old: dict[bytes, Plan] = {}

    def __len__(self) -> int:
        """Plans that are kept."""
        return len(self._young) + len(self._old)

    def find(self, head: bytes) -> Plan | None:
        """The plan of a head, None where it has none."""
        plan = self._young.get(head)
        if plan is None and self._old:
            plan = self._old.get(head)
            if plan is not None:
                self.keep(head, plan)
        return plan

    def keep(self, head: bytes, plan: Plan) -> None:
        """Remember a plan."""
        if len(self._young) >= MAX_HEADS:
            self._old, self._young = self._young, {}
        self._young[head] = plan

    def clear(self) -> None:
        """Forget all: what a plan was checked against has changed."""
        self._young, self._old = {}, {}


def is_usual(head: bytes, method: bytes, route: Route, headers: dict[bytes, bytes]) -> bool:
    """Whether requests with this head can be answered by a plan.

    Bare line feeds are excluded: where the head ends must be beyond doubt.
    """
    return (
        len(head) <= MAX_HEAD_BYTES
        and method == b"POST"
        and route.kind in (LOOKUP, LOOKUP_MANY, INFER)
        and not route.wrong
        and b" HTTP/1.1\r\n" in head
        and head.count(b"\n") == head.count(b"\r\n")
        and headers.get(b"content-length", b"").isdigit()
        and headers.get(b"connection", b"keep-alive").lower() == b"keep-alive"
        and not any(name in headers for name in _UNUSUAL)
    )
