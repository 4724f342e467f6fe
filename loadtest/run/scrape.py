"""The server's own metrics beside the client's view: /metrics once a second, the series that matter kept."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from ssl import SSLContext
from typing import TYPE_CHECKING

from loadtest.results.result import Mark, Sample

if TYPE_CHECKING:
    import httpx

EVERY_SECONDS = 1.0
TIMEOUT_SECONDS = 2.0
MAX_BYTES = 16 << 20
KEPT = ("embstore_", "process_")
BUCKETS = "embstore_lookup_duration_seconds_bucket"
"""The one histogram whose buckets are kept: they give the server's own percentiles."""

_SERIES = re.compile(r'([A-Za-z_:][A-Za-z0-9_:]*)(\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)')


class ScrapeFailed(Exception):
    """No metrics this time; the message is one line."""


def parse(text: str) -> dict[str, float]:
    """Series as the server prints them, with their labels -> finite values; of Prometheus' text format, what is kept.

    Lines that are no series are left out: what one does not understand is no reason to lose the others.
    """
    found = {}
    for line in text.splitlines():
        if not line.startswith(KEPT) or (match := _SERIES.match(line)) is None:
            continue
        name, labels, number = match.groups()
        if name.endswith("_created") or (name.endswith("_bucket") and name != BUCKETS):
            continue
        try:
            value = float(number)
        except ValueError:
            continue
        if math.isfinite(value):
            found[name + (labels or "")] = value
    return found


class Scraper:
    """Samples of one run: `begin` when second 0 is known, `end` when the run is over. A failure is counted, not raised.

    verify: whether certificates are checked, or against which.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, *, verify: SSLContext | bool = True) -> None:
        self.url, self.headers, self.verify = f"{url.rstrip('/')}/metrics", dict(headers or {}), verify
        self.tried = self.failed = 0
        self._first_failure: Mark | None = None
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, begin_ns: int) -> None:
        """Take a sample at second 0 after `begin_ns`, and one every second from then on."""
        self._thread = threading.Thread(target=self._run, args=(begin_ns,), name="scraper", daemon=True)
        self._thread.start()

    def end(self, *, wait: bool = True) -> list[Sample]:
        """Take the last sample; all of them, in order, or without waiting for the last."""
        self._over.set()
        if wait and self._thread is not None:
            self._thread.join(3 * TIMEOUT_SECONDS)
        return list(self._samples)

    @property
    def failure(self) -> Mark | None:
        """Where the first scrape failed, how many did and why that one; None when all went well."""
        first = self._first_failure
        return first and replace(first, detail=f"{self.failed} of {self.tried} scrapes failed: {first.detail}")

    def _run(self, begin_ns: int) -> None:
        import httpx

        def now() -> float:
            return (time.perf_counter_ns() - begin_ns) / 1e9

        with httpx.Client(headers=self.headers, verify=self.verify, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            due = 0.0
            while not self._over.wait(max(0.0, due - now())):
                self._sample(client, now)
                due = max(due + EVERY_SECONDS, math.ceil(now()))  # a slow answer costs samples, it does not shift them
            if now() >= 0:  # else the run ended before it began to count
                self._sample(client, now)

    def _sample(self, client: httpx.Client, now: Callable[[], float]) -> None:
        at = now()
        self.tried += 1
        try:
            values = parse(_get(client, self.url))
            if not values:
                raise ScrapeFailed(f"no series that begins with {' or '.join(KEPT)}")
        except ScrapeFailed as error:
            self.failed += 1
            self._first_failure = self._first_failure or Mark(at=at, name="no metrics", detail=str(error), ok=False)
        else:
            self._samples.append(Sample(at=now(), values=values))


def _get(client: httpx.Client, url: str) -> str:
    """The text of a page; ScrapeFailed when there is none, or too much of it, or too slowly."""
    import httpx

    text, until = bytearray(), time.monotonic() + TIMEOUT_SECONDS
    try:
        with client.stream("GET", url) as reply:
            if reply.status_code != 200:
                raise ScrapeFailed(f"{url} answers {reply.status_code}")
            for piece in reply.iter_bytes():
                text += piece
                if len(text) > MAX_BYTES or time.monotonic() > until:
                    raise ScrapeFailed(f"{url} sends more than {MAX_BYTES >> 20} MiB, or for {TIMEOUT_SECONDS:g} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ScrapeFailed(f"{url}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return text.decode("utf-8", "replace")
