"""When each request is due: fixed before the first is sent, whatever the server does."""

# Shapes: R requests.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loadtest.scenario.model import Phase, Scenario
from loadtest.workload.recording import read_offsets

BLOCK = 1024
"""Due times made at once: a pause too short to matter."""


def due_offsets(scenario: Scenario, share: int = 0, shares: int = 1) -> Iterator[int]:
    """Nanoseconds from the start of the run (warm-up included) at which share `share` of `shares` has requests due.

    Constant arrivals come when the rate adds up to the next whole request, the first at once; all shares together
    are as even as one would be. Poisson arrivals of a share come at its part of the rate, apart from the others.
    A replay with a clock is due as recorded, until the phases are over; the recording is read now.
    """
    clock = scenario.clock
    if clock is None:
        return _by_rate(scenario, share, shares)
    end = int(1e9 * (scenario.warmup_seconds + scenario.seconds))
    size = clock.batch.size
    offsets_R = read_offsets(clock.ids)[size - 1 :: size][share::shares]
    return iter(offsets_R[: np.searchsorted(offsets_R, end)].tolist())


def expected(scenario: Scenario) -> float | None:
    """About how many requests an open run is going to send; None where that is not known beforehand."""
    if scenario.mode == "closed" or scenario.clock is not None:
        return None
    return sum(map(_total, scenario.phases))


def _by_rate(scenario: Scenario, share: int, shares: int) -> Iterator[int]:
    begin, owed = 0.0, _owed(scenario, share, shares)
    due = next(owed)
    since = 0.0  # requests that the rate has added up to before this phase
    for phase in scenario.phases:
        total = _total(phase)
        while due[0] < since + total:
            num = int(np.searchsorted(due, since + total))
            yield from (1e9 * (begin + _when(phase, due[:num] - since))).astype(np.int64).tolist()
            due = due[num:] if num < len(due) else next(owed)
        since += total
        begin += phase.seconds


def _owed(scenario: Scenario, share: int, shares: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of what the whole rate has added up to when a share's next requests are due, without an end."""
    rng, last, count = np.random.default_rng([scenario.seed, share, 0xD0E]), 0.0, share
    while True:
        if scenario.arrivals == "constant":
            yield np.arange(count, count + BLOCK * shares, shares, dtype=np.float64)
            count += BLOCK * shares
        else:
            owed_R = last + np.cumsum(rng.exponential(shares, BLOCK))
            yield owed_R
            last = float(owed_R[-1])


def _total(phase: Phase) -> float:
    """Requests of a phase."""
    end = phase.rate if phase.rate_to is None else phase.rate_to
    return phase.seconds * (phase.rate + end) / 2


def _when(phase: Phase, owed_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds into a phase at which its rate has added up to `owed_R`."""
    end = phase.rate if phase.rate_to is None else phase.rate_to
    slope = (end - phase.rate) / phase.seconds
    root_R = np.sqrt(np.maximum(phase.rate**2 + 2 * slope * owed_R, 0.0))
    below_R = phase.rate + root_R
    return np.divide(2 * owed_R, below_R, out=np.zeros_like(owed_R), where=below_R > 0)
