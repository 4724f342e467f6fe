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
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from loadtest.errors import LoadError, ScenarioError
from loadtest.results.figures import figure
from loadtest.results.result import Result
from loadtest.results.validity import only_generator_lag
from loadtest.scenario.conditions import Condition, parse
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

    min_rate, max_rate: no rate outside is tried. runs: no more of them. cool_down: seconds between runs.
    """

    repeats: int = 3
    tolerance: float = 0.025
    min_rate: float = 1.0
    max_rate: float = 1e6
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
    if not limits.min_rate <= start <= limits.max_rate:
        raise ScenarioError(
            f"a search begins between {limits.min_rate:g} and {limits.max_rate:g} requests/s, not at {start:g}"
        )
    search = _Search(scenario, slo, run, pause, limits, on_tried)
    try:
        search.bracket(start)
        while True:
            search.bisect()
            if search.confirm_ends():
                break
    except _Ended as ended:
        search.found.limit = ended.limit
    except KeyboardInterrupt:
        search.found.limit = "interrupted"
    except LoadError as error:
        if not search.found.runs:
            raise
        search.found.limit, search.found.failure = "failed", str(error)
    search.found.rate = _best_boundary(search.found)
    search.found.note = describe(search.found, min_rate=limits.min_rate, max_rate=limits.max_rate)
    return search.found


def whole_slo(slo: Sequence[Condition]) -> list[Condition]:
    """The conditions and, where none of them looks at failures, one that does: refusals are quick, and no success."""
    looks = any(condition.metric.startswith(("error_", "status_", "goodput")) for condition in slo)
    return list(slo) if looks else [*slo, parse("error_rate<1%")]


def pass_probability(passed: int, failed: int) -> float:
    """Probability that more than half of all runs keep the SLO, after these; every share was as likely before.

    The upper half of a Beta(1 + passed, 1 + failed): a sum of binomial terms.
    """
    runs = passed + failed + 1
    return sum(math.comb(runs, k) for k in range(passed + 1)) / float(2**runs)


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
        self.unreachable: float | None = None
        """The lowest rate that the generator cannot make, where it lies above all that keep the SLO."""
        self.low_confidence = self.high_confidence = 0.0

    def bracket(self, start: float) -> None:
        """Double the rate until it is too much, or halve it until it is not: by one run each, fresh ones confirm."""
        rate = start
        while (verdict := self.first_valid_run(rate)) == "pass" and rate < self.limits.max_rate:
            self.narrow(rate, verdict)
            rate = min(rate * 2, self.limits.max_rate)
        self.narrow(rate, verdict)
        while not self.found.low and rate > self.limits.min_rate:
            rate = max(rate / 2, self.limits.min_rate)
            self.narrow(rate, self.first_valid_run(rate))

    def bisect(self) -> None:
        """Halve the ratio between the two rates until it is small."""
        while self.found.low and (top := min(filter(None, (self.found.high, self.unreachable)), default=None)):
            if top <= self.found.low * (1 + self.limits.tolerance):
                return
            rate = math.sqrt(self.found.low * top)
            self.narrow(rate, self.majority(rate))

    def narrow(self, rate: float, verdict: Verdict) -> None:
        """Move the end that a verdict is about, and forget a rate that could not be made where it is in no way now."""
        if verdict == "pass":
            self.found.low = rate
        elif verdict == "fail":
            self.found.high = rate
        else:
            self.unreachable = rate
            return
        if self.unreachable and (self.unreachable <= rate) == (verdict == "pass"):
            self.unreachable = None

    def first_valid_run(self, rate: float) -> Verdict:
        """What the first valid run says. One that a late generator left open takes several that keep the SLO to make
        good: passed over, only the runs that suit the server would be looked at.
        """
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        while True:
            self.count(counts, rate, "search")
            if counts["fail"]:
                return "fail"
            if counts["pass"] == (self.limits.repeats if counts["inconclusive"] else 1):
                return "pass"
            if counts["inconclusive"] > 1 or counts["invalid"] == INVALID_RUNS:
                return "invalid"

    def majority(self, rate: float) -> Verdict:
        """The majority of a few runs, no more of them than it takes."""
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        wanted: int = self.limits.repeats // 2 + 1
        while True:
            self.count(counts, rate, "search")
            if wanted in (counts["pass"], counts["fail"]):
                return "pass" if counts["pass"] == wanted else "fail"
            judged = counts["pass"] + counts["fail"] + counts["inconclusive"]
            if counts["invalid"] == INVALID_RUNS or judged == self.limits.repeats:
                return "invalid"

    def confirm_ends(self) -> bool:
        """Fresh runs at both ends; an end that they do not confirm moves outwards. False: too far for an answer."""
        found, limits = self.found, self.limits
        low, high = found.low, found.high
        self.low_confidence = self.high_confidence = 0.0
        step = 1 + limits.tolerance
        while found.low and not self.low_confidence:
            rate, step = found.low, self.confirm(found.low, step)
            if not self.low_confidence:
                found.low = max(rate / step, limits.min_rate) if rate > limits.min_rate else 0.0
        step = 1 + limits.tolerance
        while found.high and not self.high_confidence:
            rate, step = found.high, self.confirm(found.high, step)
            if found.high and not self.high_confidence:
                found.high = min(rate * step, limits.max_rate) if rate < limits.max_rate else None
        if (low and found.low and low > found.low * FAR) or (high and found.high and found.high > high * FAR):
            return False
        if self.unreachable:
            found.limit = "generator"
        elif not found.high:
            found.limit = "highest"
        elif not found.low:
            found.limit = "lowest"
        found.confidence = (self.low_confidence if found.low else 1.0) * (self.high_confidence if found.high else 1.0)
        return True

    def confirm(self, rate: float, step: float) -> float:
        """Fresh runs of a rate, until they are clear, and what that means for the ends; the next step outwards."""
        counts: dict[Verdict, int] = dict.fromkeys(VERDICTS, 0)
        while True:
            self.count(counts, rate, "confirm")
            if counts["invalid"] == INVALID_RUNS:
                if rate == self.found.high:
                    self.drop_upper_bound(rate)
                return step * step
            passed, failed, inconclusive = counts["pass"], counts["fail"], counts["inconclusive"]
            if (chance := pass_probability(passed, failed + inconclusive)) >= CONFIRMED:
                self.narrow(rate, "pass")
                self.low_confidence = chance
                return step * step
            if (chance := 1 - pass_probability(passed + inconclusive, failed)) >= CONFIRMED:
                self.narrow(rate, "fail")
                self.high_confidence = chance
                return step * step
            if min(passed, failed) + inconclusive > CONTRARY_RUNS:
                return float(step**1.5)

    def drop_upper_bound(self, rate: float) -> None:
        """The upper end cannot be made any more: what was seen of it before has to do, if that says anything."""
        verdicts = [run.verdict for run in self.found.runs if run.rate == rate]
        passed, failed = verdicts.count("pass") + verdicts.count("inconclusive"), verdicts.count("fail")
        if failed > passed:
            self.high_confidence = 1 - pass_probability(passed, failed)
        else:
            self.found.high, self.unreachable = None, rate

    def count(self, counts: dict[Verdict, int], rate: float, stage: Stage) -> None:
        """One more run of a rate; invalid ones count only in a row."""
        verdict = self.once(rate, stage)
        counts["invalid"] *= verdict == "invalid"
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
        values = [figure(condition, total, result.seconds) for condition in self.slo]
        pairs = list(zip(self.slo, values, strict=True))
        verdict: Verdict = "pass" if all(condition.met_by(value) for condition, value in pairs) else "fail"
        if only_generator_lag(result):
            sure = verdict == "pass" and all(condition.sure(value) for condition, value in pairs)
            verdict = "pass" if sure else "inconclusive"
        elif result.invalid:
            verdict = "invalid"
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


def _best_boundary(found: SearchResult) -> float:
    """The rate between the two ends that the fewest runs contradict: broken below it, or kept from it on."""
    if not found.low or not found.high:
        return found.low
    runs = [run for run in found.runs if run.verdict in ("pass", "fail")]
    ends = sorted({found.low, found.high, *(run.rate for run in runs if found.low < run.rate < found.high)})
    gaps = list(pairwise(ends))
    wrong = [sum((run.rate <= low) != (run.verdict == "pass") for run in runs) for low, _ in gaps]
    best = [gap for gap, count in zip(gaps, wrong, strict=True) if count == min(wrong)]
    return math.sqrt(best[0][0] * best[-1][1])
