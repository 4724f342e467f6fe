"""The highest rate that keeps an SLO: bracketed, bisected, and then confirmed by runs that did not choose it.

A rate keeps the SLO when more than half of its runs do. One run is enough to double or halve a rate; between the two
ends the search judges each rate by the majority of a few. It ends with two close rates, one that keeps the SLO and one
that breaks it. Chance had a hand in choosing both, so fresh runs then decide how sure that is; an end that they do not
confirm moves outwards. The limit lies in between, about where the fewest of all runs contradict it.
Runs that are invalid are evidence of nothing, neither for the server nor against it. One whose only fault is a late
generator keeps an SLO that it meets, since lag only makes latencies longer; where it does not, nobody knows, and it
counts against whatever is claimed of its rate: left out, only the runs that suit the server would be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from loadtest.errors import LoadError, ScenarioError
from loadtest.results.conditions import Condition, parse
from loadtest.results.result import Result
from loadtest.results.validity import only_generator_lag
from loadtest.scenario.model import Scenario
from loadtest.search.outcome import VERDICTS, Limit, SearchResult, Stage, Trial, Verdict, describe

CONFIRMED = 0.95
"""A rate is confirmed when its fresh runs leave this probability: four of four, or six of seven."""
CONTRARY_RUNS = 1
"""So many may say otherwise."""
FAR = 1.25
"""An end that moved by this factor was not near the limit."""
INVALID_RUNS = 3
"""So many invalid runs of one rate, one after the other: the generator cannot make it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a search goes: bisected by the majority of `repeats` runs, until two rates are within `tolerance`.

    least, most: no rate outside is tried. runs: no more of them. cool_down: seconds between runs.
    """

    repeats: int = 3
    tolerance: float = 0.025
    least: float = 1.0
    most: float = 1e6
    runs: int = 200
    cool_down: float = 1.0


def find_max(
    scenario: Scenario,
    slo: Sequence[Condition],
    *,
    run: Callable[[Scenario], Result],
    pause: Callable[[float], object],
    limits: Limits = Limits(),
    on_tried: Callable[[Trial], object] | None = None,
) -> SearchResult:
    """Search from the scenario's highest rate, all its rates in proportion; `run` makes a run, `pause` waits.

    A LoadError of the first run is raised; of a later one it ends the search, and what was found so far is kept.
    """
    start = peak_rate(scenario)
    if not slo:
        raise ScenarioError("a search for the highest rate needs an SLO, for example p99<10ms")
    if not limits.least <= start <= limits.most:
        raise ScenarioError(
            f"a search begins between {limits.least:g} and {limits.most:g} requests/s, not at {start:g}"
        )
    search = _Search(scenario, slo, run, pause, limits, on_tried)
    try:
        search.bracket(start)
        while True:
            search.bisect()
            if search.confirm():
                break
    except _Ended as ended:
        search.found.limit = ended.limit
    except KeyboardInterrupt:
        search.found.limit = "interrupted"
    except LoadError as error:
        if not search.found.runs:
            raise
        search.found.limit, search.found.failure = "failed", str(error)
    search.found.rate = _least_contradicted(search.found)
    search.found.note = describe(search.found, least=limits.least, most=limits.most)
    return search.found


def whole_slo(slo: Sequence[Condition]) -> list[Condition]:
    """The conditions and, where none of them looks at failures, one that does: refusals are quick, and no success."""
    looks = any(condition.metric.startswith(("error_", "status_", "goodput")) for condition in slo)
    return list(slo) if looks else [*slo, parse("error_rate<1%")]


def pass_probability(kept: int, broken: int) -> float:
    """Probability that more than half of all runs keep the SLO, after these; every share was as likely before.

    The upper half of a Beta(1 + kept, 1 + broken): a sum of binomial terms.
    """
    runs = kept + broken + 1
    return sum(math.comb(runs, k) for k in range(kept + 1)) / float(2**runs)


def peak_rate(scenario: Scenario) -> float:
    """The highest rate of a scenario; ScenarioError where rates do not say how hard it is."""
    if scenario.mode != "open":
        raise ScenarioError(
            "mode: a search for the highest rate needs an open loop: in a closed one the server sets it"
        )
    if any(spec.ids.kind == "replay" and spec.ids.time_column for spec in scenario.requests):
        raise ScenarioError(
            "requests: a recording with times has its own rate: leave out time_column to search for one"
        )
    peak = max(max(phase.rate, phase.rate_to or 0.0) for phase in scenario.phases)
    if peak <= 0:
        raise ScenarioError("phases: a search for the highest rate needs a rate above 0 to begin with")
    return peak


def at_rate(scenario: Scenario, rate: float, turn: int = 0) -> Scenario:
    """The scenario with `rate` as its highest rate, the others in proportion; every turn draws anew."""
    factor = rate / peak_rate(scenario)
    phases = tuple(
        replace(phase, rate=phase.rate * factor, rate_to=None if phase.rate_to is None else phase.rate_to * factor)
        for phase in scenario.phases
    )
    return replace(scenario, phases=phases, seed=scenario.seed + turn * scenario.processes)


class _Ended(Exception):
    """The search ended before its end, for the reason `limit`."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit


class _Search:
    """What is known so far: the highest rate that kept the SLO, and one above it that did not."""

    def __init__(
        self,
        scenario: Scenario,
        slo: Sequence[Condition],
        run: Callable[[Scenario], Result],
        pause: Callable[[float], object],
        limits: Limits,
        on_tried: Callable[[Trial], object] | None,
    ) -> None:
        self.scenario, self.slo, self.run, self.pause = scenario, slo, run, pause
        self.limits, self.on_tried = limits, on_tried
        self.found = SearchResult(slo=[str(condition) for condition in slo])
        self.cannot: float | None = None
        """The lowest rate that the generator cannot make, where it lies above all that keep the SLO."""
        self.low_chance = self.high_chance = 0.0

    def bracket(self, start: float) -> None:
        """Double the rate until it is too much, or halve it until it is not: by one run each, fresh ones confirm."""
        rate = start
        while (verdict := self.glance(rate)) == "kept" and rate < self.limits.most:
            self.settle(rate, verdict)
            rate = min(rate * 2, self.limits.most)
        self.settle(rate, verdict)
        while not self.found.low and rate > self.limits.least:
            rate = max(rate / 2, self.limits.least)
            self.settle(rate, self.glance(rate))

    def bisect(self) -> None:
        """Halve the ratio between the two rates until it is small."""
        while self.found.low and (top := min(filter(None, (self.found.high, self.cannot)), default=None)):
            if top <= self.found.low * (1 + self.limits.tolerance):
                return
            rate = math.sqrt(self.found.low * top)
            self.settle(rate, self.judge(rate))

    def settle(self, rate: float, verdict: Verdict) -> None:
        """Move the end that a verdict is about, and forget a rate that could not be made where it is in no way now."""
        if verdict == "kept":
            self.found.low = rate
        elif verdict == "broken":
            self.found.high = rate
        else:
            self.cannot = rate
            return
        if self.cannot and (self.cannot <= rate) == (verdict == "kept"):
            self.cannot = None

    def glance(self, rate: float) -> Verdict:
        """What the first valid run says. One that a late generator left open takes several that keep the SLO to make
        good: passed over, only the runs that suit the server would be looked at.
        """
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        while True:
            self.count(counts, rate, "search")
            if counts["broken"]:
                return "broken"
            if counts["kept"] == (self.limits.repeats if counts["late"] else 1):
                return "kept"
            if counts["late"] > 1 or counts["unknown"] == INVALID_RUNS:
                return "unknown"

    def judge(self, rate: float) -> Verdict:
        """The majority of a few runs, no more of them than it takes."""
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        wanted: int = self.limits.repeats // 2 + 1
        while True:
            self.count(counts, rate, "search")
            if wanted in (counts["kept"], counts["broken"]):
                return "kept" if counts["kept"] == wanted else "broken"
            judged = counts["kept"] + counts["broken"] + counts["late"]
            if counts["unknown"] == INVALID_RUNS or judged == self.limits.repeats:
                return "unknown"

    def confirm(self) -> bool:
        """Fresh runs at both ends; an end that they do not confirm moves outwards. False: too far for an answer."""
        found, limits = self.found, self.limits
        low, high = found.low, found.high
        self.low_chance = self.high_chance = 0.0
        step = 1 + limits.tolerance
        while found.low and not self.low_chance:
            rate, step = found.low, self.learn(found.low, step)
            if not self.low_chance:
                found.low = max(rate / step, limits.least) if rate > limits.least else 0.0
        step = 1 + limits.tolerance
        while found.high and not self.high_chance:
            rate, step = found.high, self.learn(found.high, step)
            if found.high and not self.high_chance:
                found.high = min(rate * step, limits.most) if rate < limits.most else None
        if (low and found.low and low > found.low * FAR) or (high and found.high and found.high > high * FAR):
            return False
        if self.cannot:
            found.limit = "generator"
        elif not found.high:
            found.limit = "highest"
        elif not found.low:
            found.limit = "lowest"
        found.confidence = (self.low_chance if found.low else 1.0) * (self.high_chance if found.high else 1.0)
        return True

    def learn(self, rate: float, step: float) -> float:
        """Fresh runs of a rate, until they are clear, and what that means for the ends; the next step outwards."""
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        while True:
            self.count(counts, rate, "confirm")
            if counts["unknown"] == INVALID_RUNS:
                if rate == self.found.high:
                    self.unmade(rate)
                return step * step
            kept, broken, late = counts["kept"], counts["broken"], counts["late"]
            if (chance := pass_probability(kept, broken + late)) >= CONFIRMED:
                self.settle(rate, "kept")
                self.low_chance = chance
                return step * step
            if (chance := 1 - pass_probability(kept + late, broken)) >= CONFIRMED:
                self.settle(rate, "broken")
                self.high_chance = chance
                return step * step
            if min(kept, broken) + late > CONTRARY_RUNS:
                return float(step**1.5)

    def unmade(self, rate: float) -> None:
        """The upper end cannot be made any more: what was seen of it before has to do, if that says anything."""
        verdicts = [run.verdict for run in self.found.runs if run.rate == rate]
        kept, broken = verdicts.count("kept") + verdicts.count("late"), verdicts.count("broken")
        if broken > kept:
            self.high_chance = 1 - pass_probability(kept, broken)
        else:
            self.found.high, self.cannot = None, rate

    def count(self, counts: dict[Verdict, int], rate: float, stage: Stage) -> None:
        """One more run of a rate; invalid ones count only in a row."""
        verdict = self.once(rate, stage)
        counts["unknown"] *= verdict == "unknown"
        counts[verdict] += 1

    def once(self, rate: float, stage: Stage) -> Verdict:
        """One run, and what it says."""
        turn = len(self.found.runs)
        if turn == self.limits.runs:
            raise _Ended("runs")
        if turn and self.pause(self.limits.cool_down):
            raise _Ended("interrupted")
        result = self.run(at_rate(self.scenario, rate, turn))
        if result.partial:
            raise _Ended("interrupted")
        total = result.total()
        values = [condition.of(total, result.seconds) for condition in self.slo]
        pairs = list(zip(self.slo, values, strict=True))
        verdict: Verdict = "kept" if all(condition.met_by(value) for condition, value in pairs) else "broken"
        if only_generator_lag(result):
            sure = verdict == "kept" and all(condition.sure(value) for condition, value in pairs)
            verdict = "kept" if sure else "late"
        elif result.invalid:
            verdict = "unknown"
        tried = Trial(
            rate=rate,
            stage=stage,
            verdict=verdict,
            figures=[condition.describe(value) for condition, value in pairs],
            p50_ms=total.latency.percentile(50) / 1e6,
            p99_ms=total.latency.percentile(99) / 1e6,
            error_rate=total.error_rate,
            goodput=result.goodput,
            reason="; ".join(result.invalid),
        )
        self.found.runs.append(tried)
        if self.on_tried is not None:
            self.on_tried(tried)
        return verdict


def _least_contradicted(found: SearchResult) -> float:
    """The rate between the two ends that the fewest runs contradict: broken below it, or kept from it on."""
    if not found.low or not found.high:
        return found.low
    runs = [run for run in found.runs if run.verdict in ("kept", "broken")]
    ends = sorted({found.low, found.high, *(run.rate for run in runs if found.low < run.rate < found.high)})
    gaps = list(pairwise(ends))
    wrong = [sum((run.rate <= low) != (run.verdict == "kept") for run in runs) for low, _ in gaps]
    best = [gap for gap, count in zip(gaps, wrong, strict=True) if count == min(wrong)]
    return math.sqrt(best[0][0] * best[-1][1])
