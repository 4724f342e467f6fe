"""Two sides of load tests against each other: what changed, how sure that is, and whether it is large enough to report.

Seconds that follow each other are alike, so whole blocks of seconds are drawn again and again (block bootstrap, within
each phase, the same for both sides: they had the same load). Runs differ by more than their seconds do, so with repeats
an interval also reaches as far as the scatter between runs says (Student's t; it takes four runs). Each interval holds
with 99 %, so that all five together do with 95 %; what differs between runs moves all five alike, and is taken at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from loadtest.results.bootstrap import TIMES, Block, Estimate, Floats, draw_blocks, estimate, make_blocks
from loadtest.results.result import Result
from loadtest.scenario.model import Scenario

Verdict = Literal["better", "worse", "no difference seen", "too small to matter", "not measured"]
Overall = Literal["better", "worse", "mixed", "no difference seen"]

FIGURES = ("p50", "p99", "service_p99", "goodput", "error_rate")
CONFIDENCE = 0.95
THRESHOLD = 0.02
"""Report threshold: a smaller relative change is called too small to matter."""
THRESHOLD_RATE = 0.001
"""The same for the share of errors, of which the difference is looked at."""
DRAWS = 1000
QUANTILES = (0.005, 0.5, 0.995)
MIN_FREE_RUNS = 2
STUDENT_99 = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.25, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947)
STUDENT_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131)
"""Student's t, two-sided, with 1, 2, ... degrees of freedom."""
NORMAL_99, NORMAL_95 = 2.576, 1.96
"""The same with many."""
NOT_LOAD = {
    "": {"name", "url", "processes", "seed", "api_key_file", "insecure", "ca", "scrape", "fail_if"},
    "events": {"name", "store", "pid", "pid_file", "version"},
    "phases": {"name"},
    "requests": {"name"},
}
"""What of a scenario may differ: where the load goes, who makes it, what things are called."""


FORCE = "--force does it all the same"


class CompareError(ValueError):
    """Runs that cannot be compared; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure on both sides: times in milliseconds, `goodput` a second, `error_rate` as a share.

    change: after / before (of `error_rate`: after - before), low, high: the interval that it lies in. None where
        nothing was counted.
    """

    name: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changed. runs: how many on either side; warnings: why to be careful; differences: of the load, if forced."""

    figures: list[Figure]
    runs: tuple[int, int]
    warnings: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Overall:
        """All figures in a word."""
        found = {figure.verdict for figure in self.figures}
        if {"better", "worse"} <= found:
            return "mixed"
        return "worse" if "worse" in found else "better" if "better" in found else "no difference seen"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"verdict": self.verdict, "confidence": CONFIDENCE} | asdict(self)


def compare_runs(
    before: Sequence[Result], after: Sequence[Result], *, force: bool = False, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """What changed from the runs `before` to the runs `after`, invalid ones left out.

    CompareError when their loads differ or a side has no valid run, unless forced: it then counts all runs it has.
    """
    if not before or not after:
        raise CompareError("there must be a run on either side")
    warned = _doubts(before, after)
    before, after = (_valid(side, runs, force=force) for side, runs in (("before", before), ("after", after)))
    first, *others = [*before, *after]
    found = [line for other in others for line in differences(first.scenario, other.scenario)]
    different = list(dict.fromkeys(found))
    if different and not force:
        raise CompareError(f"the loads differ, so figures cannot be compared ({FORCE}): " + "; ".join(different))
    seconds = min(math.floor(run.seconds + 1e-6) for run in (first, *others))
    blocks = make_blocks([("", 0.0, float(seconds))] if different else first.windows(), seconds)
    if len(blocks) < 2:
        raise CompareError("runs of less than two whole seconds cannot be compared")
    drawn_DB = draw_blocks(blocks, draws, np.random.default_rng(seed))
    old, new = (estimate(runs, blocks, drawn_DB) for runs in (before, after))
    wider = _wider(blocks)
    figures = [_figure(name, old[name], new[name], wider) for name in FIGURES]
    warned += _warnings(before, after, seconds)
    return Comparison(figures=figures, runs=(len(before), len(after)), warnings=warned, differences=different)


def differences(before: Scenario, after: Scenario) -> list[str]:
    """What of the load differs, a line each; where it goes to and who makes it do not count."""
    old, new = (_flat(scenario.to_json()) for scenario in (before, after))
    return [
        f"{name} {old.get(name, 'none')} before, {new.get(name, 'none')} after"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of what makes the load, by its dotted path."""
    if isinstance(value, Mapping):
        parts = [(name, one) for name, one in value.items() if name not in NOT_LOAD.get(path.split(".")[0], ())]
    elif isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value):
        parts = [(str(n), one) for n, one in enumerate(value)]
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    found: dict[str, Any] = {}
    for name, one in parts:
        found |= _flat(one, f"{path}.{name}".lstrip("."))
    return found


def _figure(name: str, old: Estimate, new: Estimate, wider: float) -> Figure:
    """The change, its interval, and what to make of it."""
    scale = 1e-6 if name in TIMES else 1.0
    shown: dict[str, Any] = {"name": name, "before": _known(old.whole * scale), "after": _known(new.whole * scale)}
    if name == "error_rate":
        change, low, high = _interval(old, new, wider)
        verdict = _judged(change, low, high, THRESHOLD_RATE, more_is="worse")
        return Figure(**shown, change=change, low=max(low, -1.0), high=min(high, 1.0), verdict=verdict)
    if not (old.whole > 0 and new.whole > 0):
        lost: Verdict = "worse" if old.whole > 0 else "better" if new.whole > 0 else "not measured"
        return Figure(**shown, change=None, low=None, high=None, verdict=lost if name == "goodput" else "not measured")
    change, low, high = _interval(_logarithm(old), _logarithm(new), wider)
    verdict = _judged(change, low, high, math.log1p(THRESHOLD), more_is="better" if name == "goodput" else "worse")
    change, low, high = (float(value) for value in np.exp(np.minimum([change, low, high], 700)))
    return Figure(**shown, change=change, low=low, high=high, verdict=verdict)


def _interval(old: Estimate, new: Estimate, wider: float) -> tuple[float, float, float]:
    """The difference, and where it lies: as far as either the blocks or the runs scatter."""
    change = new.whole - old.whole
    scatter_D = new.drawn_D - old.drawn_D
    low, middle, high = np.quantile(scatter_D[np.isfinite(scatter_D)], QUANTILES).tolist()
    between = _between_runs(old.runs_R, new.runs_R)
    return change, change - max(wider * (middle - low), between), change + max(wider * (high - middle), between)


def _between_runs(old_R: Floats, new_R: Floats) -> float:
    """Half of the interval that the scatter between runs says; 0 where there are too few to know it."""
    free = len(old_R) + len(new_R) - 2
    if free < MIN_FREE_RUNS:
        return 0.0
    if not (np.isfinite(old_R).all() and np.isfinite(new_R).all()):
        return math.inf
    squares = sum(float(((side_R - side_R.mean()) ** 2).sum()) for side_R in (old_R, new_R))
    student = STUDENT_95[free - 1] if free <= len(STUDENT_95) else NORMAL_95
    return student * math.sqrt(squares / free * (1 / len(old_R) + 1 / len(new_R)))


def _wider(blocks: Sequence[Block]) -> float:
    """By what intervals grow because there are few blocks."""
    free = len(blocks) - len({block.phase for block in blocks})
    student = STUDENT_99[free - 1] if free <= len(STUDENT_99) else NORMAL_99
    return student / NORMAL_99 * math.sqrt(len(blocks) / free)


def _logarithm(of: Estimate) -> Estimate:
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(math.log(of.whole), np.log(of.drawn_D), np.log(of.runs_R))


def _judged(
    change: float, low: float, high: float, threshold: float, *, more_is: Literal["better", "worse"]
) -> Verdict:
    if low <= 0 <= high:
        return "no difference seen"
    if abs(change) < threshold:
        return "too small to matter"
    less_is: Literal["better", "worse"] = "worse" if more_is == "better" else "better"
    return more_is if change > 0 else less_is


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _valid(side: str, runs: Sequence[Result], *, force: bool) -> Sequence[Result]:
    """The runs that say something about the server; all of them where none does and it is forced."""
    valid = [run for run in runs if not run.invalid]
    if not valid and not force:
        raise CompareError(
            f"every run {side} is invalid, so that there is nothing to compare ({FORCE}): {runs[0].invalid[0]}"
        )
    return valid or runs


def _doubts(before: Sequence[Result], after: Sequence[Result]) -> list[str]:
    """Which runs are invalid, and whether they are left out, or were interrupted."""
    found = []
    for side, runs in (("before", before), ("after", after)):
        for number, run in enumerate(runs, 1):
            which = f"{side}, run {number}" if len(runs) > 1 else side
            left_out = "" if all(run.invalid for run in runs) else " and left out"
            found += [f"{which}: invalid{left_out}: {reason}" for reason in run.invalid]
            found += [f"{which}: interrupted after {run.seconds:.4g} s"] * run.partial
    return found


def _warnings(before: Sequence[Result], after: Sequence[Result], seconds: int) -> list[str]:
    """Why to be careful with the runs that are compared."""
    runs, found = [*before, *after], []
    if seconds < math.floor(max(run.seconds for run in runs)):
        found.append(f"only the first {seconds} s of each run are compared: the shortest has no more")
    about = [{name: value for name, value in run.machine.items() if name != "load"} for run in runs]
    names = {name for one in about for name in {*one, *about[0]} if one.get(name) != about[0].get(name)}
    if names:
        found.append(f"the machines of the generators differ in {', '.join(sorted(names))}")
    if len(runs) - 2 < MIN_FREE_RUNS:
        found.append("fewer than four runs in all: what differs from start to start is not in the intervals")
    return found
