"""Requests counted: how many, how they ended, how long they took. Tallies of parts add up to that of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtest.results.histogram import Histogram

NUMBERS = ("offered", "num_bytes", "retry_after")
HISTOGRAMS = ("latency", "service", "refused", "queued", "lag")


@dataclass(kw_only=True)
class Tally:
    """Counts and times of some requests. Times are nanoseconds.

    offered: requests whose intended start fell into the measurement (closed loop: requests sent).
    statuses: replies by status; errors: requests without a good reply, by kind: `timeout`, `connect`, `closed`,
        `reset`, `tls`, `protocol` (no HTTP), `truncated` (fewer bytes than said), `mislabelled` (a 2xx reply that is
        not the answer to this request; not among the statuses), `unanswered` (the run ended).
    latency: of 2xx replies, refused: of all others; in an open loop both run from the intended start.
    service: of 2xx replies, from when the request was sent: what server and network took.
    queued: of requests that found no connection free, how long they waited for one, a part of their latency.
    lag: how much after its intended start the generator got to a request.
    """

    offered: int = 0
    num_bytes: int = 0
    retry_after: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)
    service: Histogram = field(default_factory=Histogram)
    refused: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)

    @property
    def ok(self) -> int:
        """2xx replies."""
        return self.latency.num

    @property
    def failures(self) -> Counter[str]:
        """Everything else by what went wrong: a status as text, or the kind of an error."""
        found = Counter({str(status): count for status, count in self.statuses.items() if not 200 <= status < 300})
        found.update(self.errors)
        return found

    @property
    def error_rate(self) -> float:
        """Share of the requests that got no 2xx reply; 0 when there were none."""
        failed = self.failures.total()
        return failed / (failed + self.ok) if failed else 0.0

    def merge(self, other: Tally) -> None:
        """Add what `other` counted."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.statuses.update(other.statuses)
        self.errors.update(other.errors)
        for name in HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Plain values, histograms whole; `from_json` gives an equal tally."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(sorted(self.errors.items())),
            "histograms": {name: getattr(self, name).to_json() for name in HISTOGRAMS if getattr(self, name).num},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """What `to_json` gave."""
        histograms: dict[str, Any] = {name: Histogram.from_json(of) for name, of in value["histograms"].items()}
        return cls(
            **{name: value[name] for name in NUMBERS},
            statuses=Counter({int(status): count for status, count in value["statuses"].items()}),
            errors=Counter(value["errors"]),
            **histograms,
        )
