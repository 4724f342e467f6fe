"""The one place where requests are counted, whichever engine sends them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from loadtest.results.histogram import Histogram
from loadtest.results.tally import Tally

SECOND = 1_000_000_000


class Recorder:
    """Counts what falls into a measurement, by second of the intended start and by kind of request.

    Times are nanoseconds of time.perf_counter_ns; `begin` is second 0. What was due before it or from its end on (the
    warm-up) is left out.
    seen: by table and version, first and last reply in seconds and how many; reconnects: connections opened again
    since `begin`; first_problem: second and text of the first reply that was not the answer to its request.
    """

    def __init__(self, begin: int, seconds: float) -> None:
        self.begin, self.end = begin, begin + round(seconds * SECOND)
        self.tallies: dict[tuple[int, str], Tally] = {}
        self.reconnects = 0
        self.seen: dict[tuple[str, str], tuple[float, float, int]] = {}
        self.first_problem: tuple[float, str] | None = None
        self.num_offered = self.num_ok = 0
        self.failures: Counter[str] = Counter()
        self.recent_latency, self.recent_lag = Histogram(), Histogram()

    def _tally(self, due: int, kind: str) -> Tally | None:
        """Where to count a request; None outside of the measurement."""
        if not self.begin <= due < self.end:
            return None
        key = ((due - self.begin) // SECOND, kind)
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        return tally

    def offered(self, due: int, kind: str) -> None:
        """A request was due, or in a closed loop sent."""
        if (tally := self._tally(due, kind)) is not None:
            tally.offered += 1
            self.num_offered += 1

    def lag(self, due: int, kind: str, nanoseconds: int) -> None:
        """The generator got to a request so much after it was due."""
        if (tally := self._tally(due, kind)) is not None:
            tally.lag.record(nanoseconds)
            self.recent_lag.record(nanoseconds)

    def queued(self, due: int, kind: str, nanoseconds: int) -> None:
        """A request waited so long for a connection."""
        if (tally := self._tally(due, kind)) is not None:
            tally.queued.record(nanoseconds)

    def replied(
        self, due: int, sent: int, done: int, kind: str, status: int, num_bytes: int, retry_after: bool = False
    ) -> None:
        """A whole reply is there."""
        ok = 200 <= status < 300
        if (tally := self._tally(due, kind)) is None:
            return
        tally.statuses[status] += 1
        tally.num_bytes += num_bytes
        tally.retry_after += retry_after
        if ok:
            tally.latency.record(done - due)
            tally.service.record(done - sent)
            self.recent_latency.record(done - due)
            self.num_ok += 1
        else:
            tally.refused.record(done - due)
            self.failures[str(status)] += 1

    def failed(self, due: int, kind: str, error: str) -> None:
        """A request got no good reply; `error` is one of those that Tally lists."""
        if (tally := self._tally(due, kind)) is not None:
            tally.errors[error] += 1
            self.failures[error] += 1

    def mislabelled(self, due: int, kind: str, problem: str) -> None:
        """A 2xx reply is not the answer to its request; `problem` says why."""
        self.failed(due, kind, "mislabelled")
        if self.first_problem is None and self.begin <= due < self.end:
            self.first_problem = ((due - self.begin) / SECOND, problem)

    def reconnected(self, now: int) -> None:
        """A connection was opened again."""
        self.reconnects += now >= self.begin

    def version(self, table: str, version: str, done: int) -> None:
        """A version answered."""
        if self.begin <= done < self.end:
            at = (done - self.begin) / SECOND
            first, _, count = self.seen.get((table, version), (at, at, 0))
            self.seen[table, version] = (first, at, count + 1)

    def progress(self) -> dict[str, Any]:
        """Counts so far, and times since the last call, as plain values."""
        latency, self.recent_latency = self.recent_latency, Histogram()
        lag, self.recent_lag = self.recent_lag, Histogram()
        return {
            "offered": self.num_offered,
            "ok": self.num_ok,
            "failed": dict(self.failures),
            "latency": latency.to_json(),
            "lag": lag.to_json(),
        }

    def total(self) -> Tally:
        """All of it in one."""
        found = Tally()
        for tally in self.tallies.values():
            found.merge(tally)
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything that was counted, as plain values."""
        return {
            "reconnects": self.reconnects,
            "first_problem": self.first_problem,
            "versions": [[*key, *value] for key, value in self.seen.items()],
            "tallies": [[second, kind, tally.to_json()] for (second, kind), tally in self.tallies.items()],
        }
