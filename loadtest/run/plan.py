"""What load to make: where, how hard, how long, and when each request is due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtest.scenario.model import Phase, Scenario
from loadtest.workload.schedule import due_offsets


class LoadError(Exception):
    """The load could not be made; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One load: where, how long, how hard.

    rate: requests due a second (None: closed loop); arrivals: `poisson` or `constant` gaps between them.
    connections: how many, open loop too: a request that finds none free waits for one.
    timeout: seconds after which a request has failed, from its due time (None: none, but `LINGER_SECONDS` at the end).
    warmup: seconds before the measurement, under the same load.
    """

    url: str
    seconds: float
    connections: int = 8
    rate: float | None = None
    arrivals: str = "poisson"
    timeout: float | None = None
    warmup: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url must begin with http:// and a host, got {self.url!r}")
        if self.seconds <= 0 or self.warmup < 0 or self.connections < 1:
            raise ValueError("seconds must be above 0, warmup at least 0, connections at least 1")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout must be above 0, got {self.timeout}")
        if self.arrivals not in ("poisson", "constant"):
            raise ValueError(f"arrivals must be poisson or constant, got {self.arrivals!r}")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return str(parts.hostname), parts.port or 80


def due_times(plan: Plan, begin: int, end: int) -> Iterator[int]:
    """Due times in nanoseconds from `begin` until before `end`: even, the first at once, or a Poisson process."""
    assert plan.rate is not None
    arrivals: Any = plan.arrivals
    whole = Phase(seconds=(end - begin) / 1e9, rate=plan.rate)
    return (begin + offset for offset in due_offsets(Scenario(phases=(whole,), arrivals=arrivals, seed=plan.seed)))
