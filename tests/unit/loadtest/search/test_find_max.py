"""The search for the highest rate, against servers whose limit is known: it finds it, or says why it cannot."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from loadtest.errors import LoadError, ScenarioError
from loadtest.report.terminal import searched
from loadtest.results.histogram import Histogram
from loadtest.results.result import Generator, Result
from loadtest.results.tally import Tally
from loadtest.results.validity import GENERATOR_LAG
from loadtest.scenario.conditions import parse
from loadtest.scenario.model import IdDistribution, Phase, RequestSpec, Scenario
from loadtest.search.find_max import Limits, at_rate, find_max, pass_probability, peak_rate, whole_slo
from loadtest.search.outcome import SearchResult, describe

pytestmark = pytest.mark.slow

SLO = [parse("p99<10ms")]
KNEE = 900.0
SEEDS = 60
START = Scenario(phases=(Phase(seconds=10, rate=100),))


class Server:
    """One thousand requests/s at most, 1 ms each without load; its p99 reaches 10 ms at `knee`, give or take `noise`.

    ceiling: the generator makes no more than this, and says so; what it then measures is nonsense.
    glitches: the share of all runs that something else spoils, which the generator notices.
    """

    def __init__(
        self, seed: int, knee: float = KNEE, noise: float = 0.1, ceiling: float = math.inf, glitches: float = 0.0
    ) -> None:
        self.draw, self.knee, self.noise = random.Random(seed), knee, noise
        self.ceiling, self.glitches = ceiling, glitches
        self.rates: list[float] = []

    def __call__(self, scenario: Scenario) -> Result:
        rate = peak_rate(scenario)
        self.rates.append(rate)
        most = self.knee / 0.9
        p99_ms = 1 / (1 - rate / most) if rate < most else 1e3 * rate / most
        p99_ms *= math.exp(self.draw.gauss(0, self.noise))
        invalid = []
        if rate > self.ceiling:
            invalid, p99_ms = ["the generator's ceiling"], self.draw.choice([0.1, 1e4])
        elif self.draw.random() < self.glitches:
            invalid, p99_ms = ["the clock jumped"], self.draw.choice([0.1, 1e4])
        return ran(scenario, p99_ms, invalid)


def ran(scenario: Scenario, p99_ms: float, invalid: list[str] | None = None, *, partial: bool = False) -> Result:
    """A run in which 95 of 100 requests took a tenth of the other five."""
    times = [int(p99_ms * 1e5)] * 95 + [int(p99_ms * 1e6)] * 5
    tally = Tally(offered=100, latency=Histogram(times))
    tally.statuses[200] = 100
    return Result(
        scenario=scenario,
        machine={},
        began=0.0,
        seconds=scenario.seconds,
        generator=Generator(engine="httpx", processes=1),
        partial=partial,
        tallies={(0, "octet item"): tally},
        invalid=invalid or [],
    )


def search(run: Callable[[Scenario], Result], scenario: Scenario = START, **limits: float) -> SearchResult:
    """A search that waits for nothing."""
    return find_max(scenario, SLO, run=run, pause=no_pause, limits=Limits(**limits))  # type: ignore[arg-type]


def no_pause(seconds: float) -> bool:
    """Nobody waits, and nobody interrupts."""
    return False


def share(of: list[bool]) -> float:
    """How many are true."""
    return sum(of) / len(of)


@pytest.mark.parametrize(("start", "noise"), [(100.0, 0.0), (3.0, 0.1), (5000.0, 0.1), (100.0, 0.3)])
def test_the_limit_of_a_noisy_server_is_found(start: float, noise: float) -> None:
    """Wherever it begins, the search is within 5 % of the limit and its interval holds it, for over 90 % of seeds."""
    scenario = Scenario(phases=(Phase(rate=start),))
    found = [search(Server(seed, noise=noise), scenario) for seed in range(SEEDS)]
    assert all(one.limit == "" for one in found)
    assert share([abs(one.rate / KNEE - 1) < 0.05 for one in found]) > 0.9
    assert share([one.low <= KNEE <= (one.high or 0) for one in found]) > 0.9
    assert all(one.confidence > 0.9 for one in found)
    assert all(len(one.runs) < 80 for one in found)


def test_what_is_invalid_is_no_evidence() -> None:
    """A tenth of the runs is spoilt and shows nonsense: the limit found is as good as without them."""
    found = [search(Server(seed, glitches=0.1)) for seed in range(SEEDS)]
    assert share([abs(one.rate / KNEE - 1) < 0.05 for one in found]) > 0.9
    invalid = [run for one in found for run in one.runs if run.verdict == "invalid"]
    assert invalid
    assert {run.reason for run in invalid} == {"the clock jumped"}


def test_a_late_generator_is_evidence_for_the_server_and_not_against_it() -> None:
    """Lag is a part of every latency: what is below the limit with it is below it without, and nothing else is said."""

    def run(scenario: Scenario) -> Result:
        rate = peak_rate(scenario)
        return ran(scenario, 5.0 if rate < 300 else 15.0 if rate < 600 else 50.0, [GENERATOR_LAG] if rate < 600 else [])

    found = search(run)
    assert {one.verdict for one in found.runs if one.rate < 300} == {"pass"}
    assert {one.verdict for one in found.runs if 300 <= one.rate < 600} == {"inconclusive"}
    assert (found.limit, found.high) == ("generator", None)
    assert 0.9 * 300 < found.low < 300

    def refusing(scenario: Scenario) -> Result:
        result = ran(scenario, 5.0, [GENERATOR_LAG])
        for tally in result.tallies.values():
            tally.statuses[503] = 50
        return result

    found = find_max(START, whole_slo(SLO), run=refusing, pause=no_pause, limits=Limits(min_rate=50))
    assert {one.verdict for one in found.runs} == {"inconclusive"}
    assert not found.low


@pytest.mark.parametrize("share", [0.2, 0.35])
def test_runs_that_a_late_generator_leaves_open_are_not_left_out(share: float) -> None:
    """Rates whose runs keep the SLO by chance are confirmed as rarely as with a generator that is not late."""

    def confirmed(late: bool, seed: int) -> bool:
        draw = random.Random(seed)

        def run(scenario: Scenario) -> Result:
            good = peak_rate(scenario) <= 10 or draw.random() < share
            return ran(scenario, 5.0 if good else 15.0, [GENERATOR_LAG] if late else [])

        found = search(run, min_rate=10.0)
        return found.low > 10 and found.confidence >= 0.9

    late, valid = (sum(confirmed(late, seed) for seed in range(200)) for late in (True, False))
    assert late <= valid + 20  # of 200: what chance may do


def test_a_limit_of_the_generator_is_said_to_be_that() -> None:
    """Where the generator ends before the server, the highest rate it can make is found, and nothing said to break."""
    for seed in range(20):
        found = search(Server(seed, ceiling=500))
        assert (found.limit, found.high) == ("generator", None)
        assert 475 < found.rate <= 500
        assert "the server may do more" in found.note
        assert not any(run.verdict == "pass" and run.rate > 500 for run in found.runs)


def test_a_generator_that_can_make_no_rate_finds_nothing() -> None:
    """When every run is invalid, no rate is named: neither as kept nor as broken."""
    found = search(Server(1, ceiling=0), min_rate=50)
    assert (found.rate, found.high, found.limit) == (0.0, None, "generator")
    assert found.note.startswith("no rate could be judged")


def test_rates_that_cannot_be_judged_do_not_hide_one_that_breaks() -> None:
    """Runs next to the limit are invalid: what is known on either side of them stays, and is confirmed."""

    def run(scenario: Scenario) -> Result:
        rate = peak_rate(scenario)
        return ran(scenario, 1.0 if rate < 500 else 99.0, ["the clock jumped"] if 450 < rate < 700 else None)

    found = search(run)
    assert (found.limit, found.high) == ("generator", 800.0)
    assert 430 < found.low <= 450
    assert found.confidence > 0.9
    assert "800 requests/s violates it" in found.note
    assert "20,000 requests/s meets" in describe(
        SearchResult(slo=["p99<1s"], low=2e4, limit="generator"), min_rate=1, max_rate=1e6
    )
    assert "runs in between were invalid" in found.note


def test_a_limit_that_can_no_longer_be_made_keeps_what_was_seen_of_it() -> None:
    """Runs that broke the SLO are invalid when they are repeated: the rate stays the upper end, less surely."""
    num_broken = 0

    def run(scenario: Scenario) -> Result:
        nonlocal num_broken
        if peak_rate(scenario) < 150:
            return ran(scenario, 1.0)
        num_broken += 1
        return ran(scenario, 99.0, ["the machine is busy"] if num_broken > 2 else None)

    found = search(run, tolerance=1.0)
    assert (found.low, found.high) == (100.0, 200.0)
    assert found.confidence == pass_probability(4, 0) * (1 - pass_probability(0, 2))


def test_a_search_without_an_end_is_given_up() -> None:
    """After so many runs it tells what it knows, and does not call it confirmed."""
    found = search(Server(1), runs=4)
    assert (found.limit, len(found.runs), found.low, found.confidence) == ("runs", 4, 800.0, 0.0)
    assert found.note == "no end after 4 runs: 800 requests/s passed p99<10ms so far, not confirmed"


def test_a_run_that_fails_does_not_lose_the_others() -> None:
    """The server is gone in the fifth run: the four before it are in the result; gone in the first, there is none."""
    server = Server(1)

    def run(scenario: Scenario) -> Result:
        if len(server.rates) == 4:
            raise LoadError("cannot connect")
        return server(scenario)

    found = search(run)
    assert (found.limit, found.failure, len(found.runs)) == ("failed", "cannot connect", 4)
    assert found.note == "a run failed (cannot connect): 800 requests/s passed p99<10ms so far, not confirmed"
    with pytest.raises(LoadError, match="cannot connect"):
        search(run)


def test_a_server_that_is_always_too_slow_is_said_to_be_so() -> None:
    """Even the lowest rate breaks the SLO: the answer is that, with the rate."""
    found = search(Server(1, knee=2), min_rate=10)
    assert (found.rate, found.high, found.limit) == (0.0, 10.0, "lowest")
    assert "SLO not met: 10 requests/s already violates" in found.note
    assert found.confidence >= 0.95


def test_a_server_that_is_never_too_slow_is_said_to_be_so() -> None:
    """The highest rate that may be tried keeps the SLO: the answer is that, and no rate is said to break it."""
    found = search(Server(1, knee=1e5), max_rate=2000)
    assert (found.low, found.high, found.limit) == (2000.0, None, "highest")
    assert found.confidence >= 0.95


def test_one_unlucky_rate_does_not_end_the_search_there() -> None:
    """Two spoilt runs that nobody noticed make a low rate look bad; confirmation finds that it is not."""
    server = Server(5, noise=0.02)
    spoilt = iter([True, True])
    found = search(lambda scenario: ran(scenario, 500.0) if next(spoilt, False) else server(scenario))
    assert found.high is not None
    assert found.low <= KNEE <= found.high
    assert abs(found.rate / KNEE - 1) < 0.05


def test_doubling_and_halving_take_one_run_each() -> None:
    """The ends of the bracket are confirmed later, by fresh runs; between them two of three decide."""
    server = Server(1, noise=0.0)
    found = search(server)
    assert server.rates[:5] == pytest.approx([100, 200, 400, 800, 1600])
    assert server.rates[5] == server.rates[6] == pytest.approx(math.sqrt(800 * 1600))
    assert len(found.runs) < 25
    server = Server(1, noise=0.0, knee=200)
    search(server, Scenario(phases=(Phase(rate=1600),)))
    assert server.rates[:4] == pytest.approx([1600, 800, 400, 200])


def test_an_invalid_run_does_not_end_the_doubling() -> None:
    """A rate whose first run is spoilt is run again; one that a late generator left open must keep it three times."""
    for reason, times in (("the clock jumped", 2), (GENERATOR_LAG, 4)):
        spoilt = iter([True])

        def run(scenario: Scenario, reason: str = reason, spoilt: Iterator[bool] = spoilt) -> Result:
            if next(spoilt, False):
                return ran(scenario, 500.0, [reason])
            return ran(scenario, 1.0 if peak_rate(scenario) < 300 else 99.0)

        found = search(run)
        assert [round(one.rate) for one in found.runs[: times + 2]] == [100] * times + [200, 400]
        assert found.limit == ""


def test_every_run_is_told() -> None:
    """Each run is in the result and was announced when it ended, with its rate, verdict and figures; all of it JSON."""
    server, told = Server(3), []
    found = find_max(START, SLO, run=server, pause=no_pause, on_tried=told.append)
    assert [run.rate for run in found.runs] == pytest.approx(server.rates)
    assert told == found.runs
    assert {run.stage for run in found.runs} == {"search", "confirm"}
    for run in found.runs:
        assert run.verdict == ("pass" if run.p99_ms < 10 else "fail")
        assert run.figures[0].startswith("p99 is ")
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["slo"] == ["p99<10ms"]
    assert searched(found) is not None


def test_why_runs_were_invalid_is_said_once_and_fits_a_narrow_terminal() -> None:
    """Eighty columns: each reason stands below the table, with the figures of the first run that it stopped."""
    times = iter(range(1, 100))

    def run(scenario: Scenario) -> Result:
        spoilt = peak_rate(scenario) > 150
        return ran(scenario, 5.0, [f"the clock was set: {next(times)} times"] if spoilt else [])

    shown = io.StringIO()
    Console(file=shown, width=80).print(searched(search(run)))
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if "the clock" in line] == ["[1]  the clock was set: 1 times"]
    rows = [line for line in lines if "search" in line or "confirm" in line]
    assert all(("invalid" in row) == row.rstrip().endswith("[1]") for row in rows)
    assert len(rows) > 3


def test_it_pauses_between_runs_and_draws_anew() -> None:
    """Every run after the first waits for the server to recover, and none repeats another's arrivals and ids."""
    pauses, seeds = [], []
    server = Server(3)

    def run(scenario: Scenario) -> Result:
        seeds.append(scenario.seed)
        return server(scenario)

    found = find_max(START, SLO, run=run, pause=pauses.append, limits=Limits(cool_down=0.25))
    assert pauses == [0.25] * (len(found.runs) - 1)
    assert len(set(seeds)) == len(found.runs)


@pytest.mark.parametrize("how", ["partial run", "pause", "interrupt"])
def test_an_interrupted_search_tells_what_it_knows(how: str) -> None:
    """Stopped in its fifth run, or before it, it gives the runs there were and the best rate so far."""
    server = Server(1)

    def run(scenario: Scenario) -> Result:
        if len(server.rates) == 4 and how == "interrupt":
            raise KeyboardInterrupt
        result = server(scenario)
        result.partial = len(server.rates) == 5
        return result

    found = find_max(START, SLO, run=run, pause=lambda _: how == "pause" and len(server.rates) == 4)
    assert found.limit == "interrupted"
    assert len(found.runs) == 4
    assert found.low == 800.0
    assert found.note == "interrupted: 800 requests/s passed p99<10ms so far, not confirmed"


def test_all_rates_of_a_scenario_move_together() -> None:
    """The highest rate becomes the one that is tried; warm-up, ramps and quiet phases keep their proportion to it."""
    phases = (Phase(rate=50, warmup=True), Phase(rate=0), Phase(rate=100, rate_to=200))
    scenario = Scenario(phases=phases, processes=4, seed=7)
    moved = at_rate(scenario, 1000, turn=3)
    assert peak_rate(scenario) == 200
    assert [(phase.rate, phase.rate_to) for phase in moved.phases] == [(250, None), (0, None), (500, 1000)]
    assert moved.seed == 7 + 3 * 4


def test_failures_count_against_a_rate_unless_the_slo_says_otherwise() -> None:
    """A server that refuses quickly keeps every latency: an SLO of latencies gets a limit of failures with it."""
    assert [str(one) for one in whole_slo(SLO)] == ["p99<10ms", "error_rate<1%"]
    for own in ("error_rate<0.1%", "status_503<=0", "goodput>100/s"):
        assert whole_slo([*SLO, parse(own)]) == [*SLO, parse(own)]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Scenario(mode="closed"), "mode: "),
        (Scenario(phases=(Phase(rate=0),)), "phases: "),
        (
            Scenario(requests=(RequestSpec(ids=IdDistribution(kind="replay", file="a.parquet", time_column="time")),)),
            "requests: ",
        ),
        (Scenario(phases=(Phase(rate=1e9),)), "between 1 and 1e"),
    ],
    ids=["closed", "zero", "recording", "beyond"],
)
def test_what_has_no_rate_to_search_for_is_refused(scenario: Scenario, message: str) -> None:
    """Closed loops, no rate, a recording with its own times: one line names the field, before any run."""
    with pytest.raises(ScenarioError, match=message):
        search(Server(1), scenario)


def test_the_confidence_is_that_of_a_fair_bet() -> None:
    """Four of four, or six of seven, make it 95 % probable that most runs keep the SLO; three of three do not."""
    assert pass_probability(0, 0) == 0.5
    assert pass_probability(3, 0) == 15 / 16
    assert pass_probability(4, 0) == 31 / 32
    assert pass_probability(0, 4) == 1 / 32
    assert pass_probability(6, 1) == pytest.approx(247 / 256)
