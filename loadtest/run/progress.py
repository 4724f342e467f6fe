"""How a run goes, while it goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.generator.recorder import SECOND
from loadtest.results.histogram import Histogram
from loadtest.scenario.model import Scenario

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a run goes: `at` of `seconds` (negative: warm-up), counts so far, rate and times since the last one.

    rate: replies and failures a second; lag_ms: p99 of the generator's lag.
    """

    at: float
    seconds: float
    phase: str
    offered: int
    ok: int
    failed: Counter[str] = field(default_factory=Counter)
    rate: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    lag_ms: float = 0.0


OnProgress = Callable[[Progress], None]


class Meter:
    """Progress of all processes in one."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.latest: dict[int, dict[str, Any]] = {}
        self.latency, self.lag = Histogram(), Histogram()
        self.shown, self.settled = time.monotonic(), 0

    def add(self, share: int, progress: dict[str, Any]) -> None:
        """What one process says."""
        self.latest[share] = progress
        self.latency.merge(Histogram.from_json(progress["latency"]))
        self.lag.merge(Histogram.from_json(progress["lag"]))

    def show(self, begin: int, on_progress: OnProgress) -> None:
        """Pass it on, if it is time."""
        now = time.monotonic()
        if now - self.shown < PROGRESS_SECONDS:
            return
        at = (time.perf_counter_ns() - begin) / SECOND
        ok = sum(progress["ok"] for progress in self.latest.values())
        failed: Counter[str] = Counter()
        for progress in self.latest.values():
            failed.update(progress["failed"])
        settled = ok + failed.total()
        made = Progress(
            at=at,
            seconds=self.scenario.seconds,
            phase=self._phase(at),
            offered=sum(progress["offered"] for progress in self.latest.values()),
            ok=ok,
            failed=failed,
            rate=(settled - self.settled) / (now - self.shown),
            p50_ms=self.latency.percentile(50) / 1e6,
            p99_ms=self.latency.percentile(99) / 1e6,
            lag_ms=self.lag.percentile(99) / 1e6,
        )
        self.shown, self.settled = now, settled
        self.latency, self.lag = Histogram(), Histogram()
        on_progress(made)

    def _phase(self, at: float) -> str:
        """The name of the phase in second `at`."""
        end, name = -self.scenario.warmup_seconds, ""
        for phase in self.scenario.phases:
            end, name = end + phase.seconds, phase.name
            if at < end:
                break
        return name
