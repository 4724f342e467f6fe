"""What one load found: how many requests, how they ended, how long they took, and how well the generator kept up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadtest.histogram import Histogram

BUSY = 0.95
"""A closed loop that takes more of its core than this may be what limits the throughput."""
LAG_NS, LAG_SHARE = 200_000, 0.1
"""An open loop whose p99 of lag is above both, a time and a share of the p99 latency, adds to what it measures."""
HISTOGRAMS = ("latency", "service", "refused", "queued", "lag")


@dataclass(kw_only=True)
class Report:
    """Counts and times of one measurement; warm-up left out. Times are nanoseconds.

    offered: requests whose intended start fell into it (closed loop: requests sent).
    in_time, ok_in_time: replies, and 2xx replies, that came before its end.
    statuses: replies by status; errors: requests without a reply, by kind (timeout, closed, reset, protocol,
    connect, unanswered); an attempt to connect that fails counts as `connect`, though no request was in it.
    latency: of 2xx replies; refused: of all others. In an open loop both run from the intended start.
    service: of 2xx replies, from when the request was sent: what the server itself took.
    queued: of requests that found no connection free, the time they waited for one here, a part of their latency.
    lag: how much after its intended start the generator got to a request; busy: share of a core that it used.
    """

    mode: str
    seconds: float
    connections: int
    rate: float | None = None
    offered: int = 0
    in_time: int = 0
    ok_in_time: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    reconnects: int = 0
    retry_after: int = 0
    latency: Histogram = field(default_factory=Histogram)
    service: Histogram = field(default_factory=Histogram)
    refused: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)
    busy: float = 0.0

    @property
    def requests_per_s(self) -> float:
        """Replies of any status a second."""
        return self.in_time / self.seconds

    @property
    def goodput(self) -> float:
        """2xx replies a second."""
        return self.ok_in_time / self.seconds

    @property
    def bottleneck(self) -> str | None:
        """Why the generator, not the server, may have set the figures; None: it kept up."""
        if self.mode == "closed":
            if self.busy <= BUSY:
                return None
            return f"the generator used {self.busy:.0%} of its core: the server may do more than this"
        lag, latency = self.lag.percentile(99), self.latency.percentile(99)
        if lag <= LAG_NS or lag <= LAG_SHARE * latency:
            return None
        late, whole = f"{lag / 1e6:.2f} ms", f"{latency / 1e6:.2f} ms"
        return f"the generator was late itself: p99 of its lag is {late}, of the latency {whole}"

    def merge(self, other: Report) -> None:
        """Add what another process found at the same time; `busy` is that of the busier one."""
        self.connections += other.connections
        self.rate = self.rate + other.rate if self.rate is not None and other.rate is not None else None
        for name in ("offered", "in_time", "ok_in_time", "num_bytes", "reconnects", "retry_after"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.statuses.update(other.statuses)
        self.errors.update(other.errors)
        for name in HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))
        self.busy = max(self.busy, other.busy)

    def to_json(self) -> dict[str, Any]:
        """Plain values, histograms whole, and the figures that people ask for first; `from_json` reads it back."""
        times = {name: getattr(self, name) for name in HISTOGRAMS}
        return {
            "mode": self.mode,
            "seconds": self.seconds,
            "connections": self.connections,
            "rate": self.rate,
            "offered": self.offered,
            "in_time": self.in_time,
            "ok_in_time": self.ok_in_time,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(sorted(self.errors.items())),
            "num_bytes": self.num_bytes,
            "reconnects": self.reconnects,
            "retry_after": self.retry_after,
            "busy": round(self.busy, 3),
            "requests_per_s": round(self.requests_per_s, 1),
            "goodput": round(self.goodput, 1),
            "bottleneck": self.bottleneck,
            "p50_us": self.latency.percentile(50) / 1000,
            "p99_us": self.latency.percentile(99) / 1000,
            "service_p99_us": self.service.percentile(99) / 1000,
            "lag_p99_us": self.lag.percentile(99) / 1000,
            "histograms": {name: histogram.to_json() for name, histogram in times.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        """What `to_json` gave."""
        plain = ("mode", "seconds", "connections", "rate", "offered", "in_time", "ok_in_time", "num_bytes")
        given: dict[str, Any] = {name: value[name] for name in (*plain, "reconnects", "retry_after", "busy")}
        given |= {name: Histogram.from_json(counts) for name, counts in value["histograms"].items()}
        given["statuses"] = Counter({int(status): count for status, count in value["statuses"].items()})
        return cls(**given, errors=Counter(value["errors"]))
