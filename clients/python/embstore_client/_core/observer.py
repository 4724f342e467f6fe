"""What a client tells about itself while it works: the place for metrics and tracing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

log = logging.getLogger("embstore_client")

_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_NOT_TO_ADD = frozenset(
    (
        *("accept", "accept-encoding", "authorization", "content-type", "user-agent", "x-request-timeout-ms"),
        *("connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade"),
    )
)
"""The client's own headers, and those that say how HTTP goes on: a second one would break the call."""


class Observer:
    """Hooks that do nothing: derive from it and write those you need; what they raise never breaks a call.

    They run inside the call, in its thread or task (parallel and hedged requests of the sync client have worker
    threads, with the call's context variables), so they must be quick, and safe to run in several threads at once.

    `reason` is one of a small set, fit for a metric's label: `"ok"`, `"cancelled"`, `"timeout"`, `"connection"`,
    `"protocol"`, or the `code` of the server's error (`"overloaded"`, `"not_ready"`, ...; its status where it has
    none).
    """

    def headers(self) -> Mapping[str, str]:
        """Extra headers for one attempt, for example `{"traceparent": ...}`; none that the client sets itself."""
        return {}

    def attempt_started(self, *, address: str, number: int, hedge: bool) -> None:
        """A request goes out to `address`; `number` counts the attempts of this request from 1."""

    def attempt_ended(
        self, *, address: str, number: int, hedge: bool, status: int | None, seconds: float, reason: str
    ) -> None:
        """An attempt was answered (`status`), failed, or was given up."""

    def retry(self, *, address: str, wait_s: float, reason: str) -> None:
        """After an attempt that ended with `reason`, another goes to `address` in `wait_s` seconds."""

    def hedge(self, *, address: str, after_s: float) -> None:
        """A request has waited `after_s` seconds, so a second attempt goes to `address`; the first answer wins."""

    def ejected(self, *, address: str, pause_s: float) -> None:
        """An address failed repeatedly and is left alone for `pause_s` seconds."""

    def restored(self, *, address: str) -> None:
        """An address that had been ejected answers again."""

    def near_cache(self, *, hits: int, misses: int) -> None:
        """So many of a lookup's ids were found in the near-cache, so many were not."""

    def call_ended(self, *, operation: str, seconds: float, reason: str) -> None:
        """A whole call (`"lookup"`, `"lookup_many"`, `"tables"`, `"ready"`) returned (`"ok"`) or raised."""


class Guarded:
    """An observer that cannot break a call: the first of its own errors is logged, all are swallowed."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._complained = False

    def tell(self, event: str, **facts: object) -> None:
        """Pass one event on."""
        self._guarded(lambda: getattr(self._observer, event)(**facts))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers to add to one attempt; all or none, for what cannot stand in a header is an error too."""
        added: list[tuple[bytes, bytes]] = []
        self._guarded(lambda: added.extend([_header(*header) for header in self._observer.headers().items()]))
        return added

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            if not self._complained:
                self._complained = True
                log.exception("an embstore_client observer failed; its further failures are not logged")


def _header(name: str, value: str) -> tuple[bytes, bytes]:
    if not _TOKEN.fullmatch(name) or name.lower() in _NOT_TO_ADD:
        raise ValueError(f"a header's name must be a token, and none that the client sets itself, got {name!r}")
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        raise ValueError(f"a header must be printable ASCII without spaces around it, got {name!r}: {value!r}")
    return name.encode("ascii"), value.encode("ascii")
