"""Runs cut into blocks of seconds that are drawn again and again: how far figures scatter by chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadtest.results.hgrm import steps
from loadtest.results.result import Result
from loadtest.results.tally import Tally

# Shapes: D draws, R runs, B blocks of seconds, K different times.

TIMES = {"p50": ("latency", 50.0), "p99": ("latency", 99.0), "service_p99": ("service", 99.0)}
MIN_FREE = 3
"""Fewer blocks than this beyond one a phase, and phases are not kept apart."""

Floats = NDArray[np.float64]


class Block(NamedTuple):
    """Seconds `begin` to before `end`, in one phase."""

    phase: int
    begin: int
    end: int


def make_blocks(windows: Sequence[tuple[str, float, float]], seconds: int) -> list[Block]:
    """Blocks as long as three quarters of the root of a phase's seconds: few enough to hardly depend on each other."""
    found = []
    for phase, (_, begin, end) in enumerate(windows):
        inside = range(math.ceil(begin), min(math.ceil(end), seconds))
        if inside:
            num = max(1, len(inside) // max(1, round(0.75 * math.sqrt(len(inside)))))
            edges = [inside.start + len(inside) * n // num for n in range(num + 1)]
            found += [Block(phase, a, b) for a, b in pairwise(edges)]
    if len(found) - len({block.phase for block in found}) < MIN_FREE:
        found = [Block(0, block.begin, block.end) for block in found]
    return found


def draw_blocks(blocks: Sequence[Block], draws: int, random: np.random.Generator) -> Floats:
    """As many blocks of each phase as it has, with replacement."""
    drawn_DB = np.zeros((draws, len(blocks)))
    phases = np.array([block.phase for block in blocks])
    for phase in set(phases.tolist()):
        (of_phase,) = np.nonzero(phases == phase)
        drawn_DB[:, of_phase] = random.multinomial(len(of_phase), [1 / len(of_phase)] * len(of_phase), size=draws)
    return drawn_DB


class Estimate(NamedTuple):
    """One figure of a side: of all its runs together, in each draw of blocks, and of each run."""

    whole: float
    drawn_D: Floats
    runs_R: Floats


def estimate(runs: Sequence[Result], blocks: Sequence[Block], drawn_DB: Floats) -> dict[str, Estimate]:
    """Every figure of one side."""
    side = Side(runs, blocks)
    whole, drawn = side.whole(), side.figures(drawn_DB)
    alone = [Side([run], blocks).whole() for run in runs] if len(runs) > 1 else [whole]
    return {name: Estimate(whole[name], drawn[name], np.array([one[name] for one in alone])) for name in whole}


class Side:
    """The runs of one side, counted by block."""

    def __init__(self, runs: Sequence[Result], blocks: Sequence[Block]) -> None:
        tallies = [[_between(run, block) for block in blocks] for run in runs]
        self.seconds_B = np.array([block.end - block.begin for block in blocks], dtype=np.float64)
        self.ok_RB = np.array([[tally.ok for tally in run] for run in tallies], dtype=np.float64)
        failed = [[tally.failures.total() for tally in run] for run in tallies]
        self.failed_RB = np.array(failed, dtype=np.float64)
        self.times = {name: _counts(tallies, name) for name in {name for name, _ in TIMES.values()}}

    def whole(self) -> dict[str, float]:
        """Every figure as it was."""
        return {name: float(value_D[0]) for name, value_D in self.figures(np.ones((1, len(self.seconds_B)))).items()}

    def figures(self, drawn_DB: Floats) -> dict[str, Floats]:
        """Every figure in every draw, of all runs together; a time is NaN where nothing was counted."""
        ok_D, failed_D = drawn_DB @ self.ok_RB.sum(axis=0), drawn_DB @ self.failed_RB.sum(axis=0)
        found = {name: self._percentiles(drawn_DB, *of) for name, of in TIMES.items()}
        found["goodput"] = ok_D / (drawn_DB @ self.seconds_B) / len(self.ok_RB)
        found["error_rate"] = failed_D / np.maximum(ok_D + failed_D, 1)
        return found

    def _percentiles(self, drawn_DB: Floats, histogram: str, percent: float) -> Floats:
        times_K, below_BK = self.times[histogram]
        if not len(times_K):
            return np.full(len(drawn_DB), np.nan)
        all_D = drawn_DB @ below_BK[:, -1]
        wanted_D = np.maximum(1, np.ceil(percent / 100 * all_D - 1e-9))
        low_D = np.zeros(len(drawn_DB), dtype=np.int64)
        high_D = np.full(len(drawn_DB), len(times_K) - 1)
        while (low_D < high_D).any():  # all draws at once halve where their percentile can be
            middle_D = (low_D + high_D) // 2
            enough_D = np.einsum("db,bd->d", drawn_DB, below_BK[:, middle_D]) >= wanted_D
            high_D = np.where(enough_D, middle_D, high_D)
            low_D = np.where(enough_D, low_D, middle_D + 1)
        return np.where(all_D > 0, times_K[np.minimum(low_D, len(times_K) - 1)], np.nan)


def _between(run: Result, block: Block) -> Tally:
    return run.total(since=block.begin, until=block.end)


def _counts(tallies: Sequence[Sequence[Tally]], name: str) -> tuple[Floats, Floats]:
    """The different times, and how many of each block, in all runs, took at most that."""
    counted: list[Counter[int]] = []
    for same in zip(*tallies, strict=True):
        counted.append(Counter())
        for tally in same:
            for time, count in steps(getattr(tally, name)):
                counted[-1][time] += count
    times = sorted(set().union(*counted))
    counts_BK = np.array([[block[time] for time in times] for block in counted], dtype=np.float64)
    return np.array(times, dtype=np.float64), np.cumsum(counts_BK, axis=1)
