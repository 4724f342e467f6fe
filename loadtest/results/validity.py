"""Whether a run says something about the server, or only about the generator and its machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.results.result import Result
from loadtest.results.tally import Tally
from loadtest.scenario.conditions import Condition

BUSY = 0.95
"""A generator that takes more of its core than this may be what limits the throughput."""
GENERATOR_LAG = "generator lag"
LAG_NS, LAG_SHARE = 200_000, 0.1
"""Lag above both, a time and a share of the latency by the same percentile, adds to what is measured."""
ENOUGH = 10_000
"""Requests from which on p99.9 is no chance."""
OFFERED = 0.95
OF_CEILING = 0.9
ADVICE = "more processes, or engine raw, reach further"


def generator_lag(tally: Tally, percent: float) -> tuple[str, str] | None:
    """This percentile of lag and latency, for people, of a generator that was late by it; None where it was not."""
    lag, latency = tally.lag.percentile(percent), tally.latency.percentile(percent)
    if lag <= LAG_NS or lag <= LAG_SHARE * latency:
        return None
    return _ms(lag), _ms(latency)


def _ms(ns: int) -> str:
    """Milliseconds, with the digits that tell a lag from its limit."""
    return f"{ns / 1e6:.4f} ms" if ns < 1_000_000 else f"{ns / 1e6:.2f} ms"


def invalid_reasons(result: Result, parts: Sequence[dict[str, Any]]) -> list[str]:
    """Why a result is invalid, one line each; `parts` are what the generator processes reported."""
    found, total, scenario = [], result.total(), result.scenario
    for percent in (99, 99.9) if total.lag.num >= ENOUGH else (99,):
        if late := generator_lag(total, percent):
            name, (lag, latency) = f"p{percent:g}", late
            found.append(f"{GENERATOR_LAG}: {name} lag is {lag}, {name} latency {latency}")
            break
    if result.generator.busy > BUSY:
        found.append(f"a generator process used {result.generator.busy:.0%} of its core; {ADVICE}")
    unsent = sum(part["unsent"] for part in parts)
    due = total.offered + unsent
    if total.offered < OFFERED * due or (found and unsent):
        found.append(f"only {total.offered:,} of {due:,} requests that were due were sent: {ADVICE}")
    offered, ceiling = _peak_rate(result), result.generator.ceiling
    if scenario.mode == "open" and ceiling and offered > OF_CEILING * ceiling:
        found.append(
            f"{offered:,.0f} requests/s is more than {OF_CEILING:.0%} of what this generator can do ({ceiling:,.0f})"
        )
    if jumps := result.generator.clock_jumps:
        found.append(f"the clock was set {jumps} time{'s' * (jumps > 1)} during the run")
    if paused := max((part["paused"] for part in parts), default=0.0):
        found.append(f"a generator process was held up for {paused:.1f} s")
    return found


def only_generator_lag(result: Result) -> bool:
    """Whether all that is wrong with a run is that the generator was late: its latencies are then upper bounds."""
    return bool(result.invalid) and all(reason.startswith(GENERATOR_LAG) for reason in result.invalid)


def decides(result: Result, condition: Condition, value: float) -> bool:
    """Whether a run, whose figure is `value`, says for sure on which side of the condition's limit that lies."""
    return not result.invalid or (only_generator_lag(result) and condition.sure(value))


def _peak_rate(result: Result) -> float:
    """The highest rate of any phase, of a recording with a clock that of any second."""
    if result.scenario.clock is not None:
        return max((tally.offered for tally in result.series()), default=0)
    return max(max(phase.rate, phase.rate_to or 0.0) for phase in result.scenario.phases)
