"""What one load found: how many requests, how they ended, how long they took, and how well the generator kept up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.results.tally import HISTOGRAMS, Tally

BUSY = 0.95
"""A closed loop that takes more of its core than this may be what limits the throughput."""
LATE = "the generator was late itself"
LAG_NS, LAG_SHARE = 200_000, 0.1
"""Lag above both, a time and a share of the latency by the same percentile, adds to what is measured."""


def lateness(tally: Tally, percent: float) -> tuple[str, str] | None:
    """This percentile of lag and latency, for people, of a generator that was late by it; None where it was not."""
    lag, latency = tally.lag.percentile(percent), tally.latency.percentile(percent)
    if lag <= LAG_NS or lag <= LAG_SHARE * latency:
        return None
    return _ms(lag), _ms(latency)


def _ms(ns: int) -> str:
    """Milliseconds, with the digits that tell a lag from its limit."""
    return f"{ns / 1e6:.4f} ms" if ns < 1_000_000 else f"{ns / 1e6:.2f} ms"


@dataclass(kw_only=True)
class Report(Tally):
    """Everything that one load counted, warm-up left out, and what it was.

    in_time, ok_in_time: replies, and 2xx replies, that came during the measurement.
    reconnects: connections opened again; busy: share of a core that the generator used.
    An attempt to connect that fails is an error `connect`, in a closed loop also where no request was due.
    """

    mode: str
    seconds: float
    connections: int
    rate: float | None = None
    in_time: int = 0
    ok_in_time: int = 0
    reconnects: int = 0
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
        late = lateness(self, 99)
        return late and f"{LATE}: p99 of its lag is {late[0]}, of the latency {late[1]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, histograms whole, and the figures that people ask for first; `from_json` reads it back."""
        return super().to_json() | {
            "mode": self.mode,
            "seconds": self.seconds,
            "connections": self.connections,
            "rate": self.rate,
            "in_time": self.in_time,
            "ok_in_time": self.ok_in_time,
            "reconnects": self.reconnects,
            "busy": self.busy,
            "requests_per_s": round(self.requests_per_s, 1),
            "goodput": round(self.goodput, 1),
            "bottleneck": self.bottleneck,
            "p50_us": self.latency.percentile(50) / 1000,
            "p99_us": self.latency.percentile(99) / 1000,
            "service_p99_us": self.service.percentile(99) / 1000,
            "lag_p99_us": self.lag.percentile(99) / 1000,
            "histograms": {name: getattr(self, name).to_json() for name in HISTOGRAMS},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        """What `to_json` gave."""
        own = ("mode", "seconds", "connections", "rate", "in_time", "ok_in_time", "reconnects", "busy")
        return cls(**vars(Tally.from_json(value)), **{name: value[name] for name in own})
