"""Two sides of runs: the same is not called different, what changed is found, and nothing is compared blindly."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from loadtest.report import terminal
from loadtest.results.bootstrap import make_blocks
from loadtest.results.compare import CompareError, Comparison, Figure, compare_runs, differences
from loadtest.results.histogram import Histogram
from loadtest.results.result import Generator, Result
from loadtest.results.tally import Tally
from loadtest.scenario.model import Batch, Event, IdDistribution, Phase, RequestSpec, Scenario

pytestmark = pytest.mark.slow

NUM_RUNS = 16
RATE = 50
LOAD = Scenario(phases=(Phase(name="calm", seconds=12, rate=RATE), Phase(name="busy", seconds=12, rate=2 * RATE)))


def a_run(seed: int, *, slower: float = 1.0, errors: float = 0.0, **changed: Any) -> Result:
    """24 seconds of lognormal times whose middle wanders from second to second, as that of real servers does."""
    random = np.random.default_rng(seed)
    wander, tallies = 0.0, {}
    for second in range(24):
        wander = 0.4 * wander + random.normal(0, 0.05)
        count = int(random.poisson(RATE if second < 12 else 2 * RATE))
        failed = int(random.binomial(count, errors))
        service = slower * random.lognormal(np.log(2e6) + wander, 0.3, count - failed)
        waited = random.exponential(2e5, count - failed)
        tallies[second, "octet item"] = Tally(
            offered=count,
            statuses=Counter({200: count - failed}) + Counter({503: failed}),
            latency=Histogram((service + waited).astype(np.int64).tolist()),
            service=Histogram(service.astype(np.int64).tolist()),
        )
    made: dict[str, Any] = {"scenario": LOAD, "machine": {"cpu": "one"}, "began": 0.0, "seconds": 24.0}
    made |= {"generator": Generator(engine="raw", processes=1), "tallies": tallies}
    return Result(**made | changed)


def found(comparison: Comparison) -> dict[str, Figure]:
    return {figure.name: figure for figure in comparison.figures}


@functools.cache
def pool() -> list[Result]:
    """Runs of one and the same server."""
    return [a_run(1000 + n) for n in range(NUM_RUNS)]


@pytest.mark.parametrize("repeats", [1, 3])
def test_equal_sides_are_rarely_called_different(repeats: int) -> None:
    """Of comparisons of a server with itself, more than nine in ten find no figure better or worse."""
    random, wrong, comparisons = np.random.default_rng(repeats), 0, 30 // repeats
    for seed in range(comparisons):
        drawn = [pool()[n] for n in random.permutation(NUM_RUNS)[: 2 * repeats]]
        comparison = compare_runs(drawn[:repeats], drawn[repeats:], draws=300, seed=seed)
        wrong += comparison.verdict != "no difference seen"
    assert wrong < 0.1 * comparisons


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("slower", "verdict"), [(1.2, "worse"), (1 / 1.2, "better")])
def test_a_fifth_more_or_less_is_found(slower: float, verdict: str, repeats: int) -> None:
    """Times shift by a fifth: that is what the figures say, within their intervals, and goodput stays."""
    before = [a_run(n) for n in range(repeats)]
    after = [a_run(50 + n, slower=slower) for n in range(repeats)]
    comparison = compare_runs(before, after)
    figure = found(comparison)["p50"]
    assert comparison.verdict == figure.verdict == verdict
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < slower < figure.high
    assert found(comparison)["goodput"].verdict == "no difference seen"


def test_errors_are_compared_by_their_difference() -> None:
    """From none at all to three in ten: no ratio tells that, percentage points do; goodput falls with it."""
    comparison = compare_runs([a_run(1)], [a_run(2, errors=0.3)])
    figure = found(comparison)["error_rate"]
    assert (figure.before, figure.verdict) == (0.0, "worse")
    assert figure.change == figure.after == pytest.approx(0.3, abs=0.02)
    assert found(comparison)["goodput"].verdict == "worse"


def test_a_sure_difference_of_a_hundredth_is_too_small_to_matter() -> None:
    """The same run a hundredth slower throughout: certain, and not reported."""
    sides = []
    for factor in (10_000, 10_100):
        tallies = {}
        for key, tally in a_run(1).tallies.items():
            times = [factor * at for at, count in tally.latency.counts.items() for _ in range(count)]
            tallies[key] = dataclasses.replace(tally, latency=Histogram(times))
        sides.append([a_run(1, tallies=tallies)])
    comparison = compare_runs(*sides)
    assert found(comparison)["p50"].verdict == "too small to matter"
    assert found(comparison)["p50"].change == pytest.approx(1.01, abs=0.001)
    assert comparison.verdict == "no difference seen"


def test_the_same_runs_give_the_same_answer() -> None:
    """Draws are seeded: comparing again changes nothing."""
    before, after = [a_run(1)], [a_run(2)]
    assert compare_runs(before, after).to_json() == compare_runs(before, after).to_json()
    assert compare_runs(before, after, seed=1).to_json() != compare_runs(before, after).to_json()


def test_a_dead_side_has_no_times_and_less_goodput() -> None:
    """Nothing was answered after: worse, and no ratio is made up."""
    dead = {key: Tally(offered=60, errors=Counter({"connect": 60})) for key in a_run(1).tallies}
    comparison = compare_runs([a_run(1)], [a_run(2, tallies=dead)])
    assert comparison.verdict == "worse"
    assert found(comparison)["goodput"].verdict == "worse"
    p99 = found(comparison)["p99"]
    assert (p99.verdict, p99.change, p99.after) == ("not measured", None, None)
    assert found(compare_runs([a_run(2, tallies=dead)], [a_run(1)]))["goodput"].verdict == "better"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"mode": "closed"}, "mode open before, closed after"),
        ({"connections": 8}, "connections 64 before, 8 after"),
        ({"phases": (Phase(seconds=24, rate=9),)}, "phases.0.rate 50 before, 9 after"),
        (
            {"requests": (RequestSpec(ids=IdDistribution(exponent=2.0)),)},
            "requests.0.ids.exponent 1.05 before, 2.0 after",
        ),
        (
            {"requests": (RequestSpec(batch=Batch(kind="choice", sizes=(1, 2))),)},
            "requests.0.batch.sizes none before, [1, 2] after",
        ),
        (
            {"requests": (RequestSpec(tables=("user", "item")),)},
            "requests.0.tables ['item'] before, ['user', 'item'] after",
        ),
        ({"events": (Event(at=3, kind="signal"),)}, "events.0.at none before, 3 after"),
    ],
)
def test_another_load_is_refused(changed: dict[str, Any], line: str) -> None:
    """The message names what differs; forced, it is part of the comparison."""
    other = a_run(2, scenario=replace(LOAD, **changed))
    assert line in differences(LOAD, other.scenario)
    with pytest.raises(CompareError) as raised:
        compare_runs([a_run(1)], [other])
    assert line in str(raised.value)
    assert "--force" in str(raised.value)
    assert line in compare_runs([a_run(1)], [other], force=True).differences


def test_where_the_load_goes_may_differ() -> None:
    """Another server, another name, another seed: that is what comparisons are for."""
    event = Event(at=1, kind="signal", pid=1)
    there = {"name": "b", "url": "http://other:1", "seed": 9, "processes": 2, "fail_if": ("p99>1s",), "insecure": True}
    after = replace(LOAD, **there, events=(replace(event, pid=2),))  # type: ignore[arg-type]
    assert differences(replace(LOAD, events=(event,)), after) == []


def test_doubtful_runs_are_named() -> None:
    """Interrupted, of another machine, or alone: the comparison says so."""
    partial = a_run(2, seconds=20.0, partial=True, machine={"cpu": "two"})
    assert compare_runs([a_run(1), a_run(3)], [partial]).warnings == [
        "after: interrupted after 20 s",
        "only the first 20 s of each run are compared: the shortest has no more",
        "the machines of the generators differ in cpu",
        "fewer than four runs in all: what differs from start to start is not in the intervals",
    ]
    assert compare_runs([a_run(1), a_run(3)], [a_run(2), a_run(4)]).warnings == []


def test_an_invalid_run_is_left_out() -> None:
    """Its figures count neither for its side nor against it; the comparison says which run it is."""
    sound, spoilt = [a_run(2), a_run(4)], a_run(3, slower=9.0, invalid=["the generator was late"])
    comparison = compare_runs([a_run(1)], [sound[0], spoilt, sound[1]])
    assert comparison.figures == compare_runs([a_run(1)], sound).figures
    assert comparison.runs == (1, 2)
    assert comparison.warnings[0] == "after, run 2: invalid and left out: the generator was late"


def test_a_side_of_invalid_runs_is_refused() -> None:
    """Nothing can be said about the server then; forced, all of them count, with a warning."""
    spoilt = [a_run(2, invalid=["the generator was late"])]
    with pytest.raises(CompareError, match=r"every run after is invalid, .*--force.*: the generator was late"):
        compare_runs([a_run(1)], spoilt)
    comparison = compare_runs([a_run(1)], spoilt, force=True)
    assert comparison.runs == (1, 1)
    assert comparison.warnings[0] == "after: invalid: the generator was late"


def test_scatter_between_runs_widens_what_is_said() -> None:
    """Runs of one side that differ by half from each other leave no room for a verdict on a fifth."""
    before = [a_run(n, slower=slower) for n, slower in enumerate((1.0, 1.5, 1.0))]
    after = [a_run(10 + n, slower=1.2 * slower) for n, slower in enumerate((1.5, 1.0, 1.5))]
    assert found(compare_runs(before, after))["p50"].verdict == "no difference seen"
    assert found(compare_runs(before[:1], after[1:2]))["p50"].verdict == "worse"


@pytest.mark.parametrize("runs", [([], [a_run(1)]), ([a_run(1)], []), ([a_run(1, seconds=1.0)], [a_run(2)])])
def test_too_little_is_refused(runs: tuple[list[Result], list[Result]]) -> None:
    """No run on a side, or nothing to draw blocks from."""
    with pytest.raises(CompareError, match=r"a run on either side|less than two whole seconds"):
        compare_runs(*runs)


def test_blocks_cover_every_second_once_and_no_two_phases() -> None:
    """What is drawn is the whole run, and phases keep their part of it."""
    blocks = make_blocks([("a", 0.0, 30.0), ("b", 30.0, 34.5), ("c", 34.5, 60.0)], 50)
    assert [second for block in blocks for second in range(block.begin, block.end)] == list(range(50))
    assert {block.phase for block in blocks if block.begin < 30} == {0}
    assert {block.phase for block in blocks if block.begin >= 35} == {2}


def test_the_table_says_what_changed_and_how_sure_that_is() -> None:
    """Both sides, the change with its interval, a word for each figure and one for all; JSON says the same."""
    comparison = compare_runs([a_run(1)], [a_run(2, slower=1.5, errors=0.05)])
    out = io.StringIO()
    Console(file=out, width=110, markup=False).print(terminal.compared(comparison), highlight=False)
    text = out.getvalue()
    for expected in ("1 run before, 1 run after", "p50", "service p99", "error rate", " pts", "worse", "note"):
        assert expected in text
    assert text.rstrip().endswith("verdict: worse")
    value = json.loads(json.dumps(comparison.to_json()))
    assert (value["verdict"], value["confidence"], value["runs"]) == ("worse", 0.95, [1, 1])
    assert [figure["name"] for figure in value["figures"]] == ["p50", "p99", "service_p99", "goodput", "error_rate"]


def test_the_table_fits_eighty_columns() -> None:
    """Every figure has its line, and words stay whole, with verdicts and intervals as long as they get."""
    figures = [
        Figure(name=name, before=12.3, after=12.3, change=1.1, low=0.898, high=2.153, verdict="no difference seen")
        for name in ("p50", "service_p99", "goodput")
    ]
    points = {"change": -0.12, "low": -0.1534, "high": 0.2517}
    figures.append(Figure(name="error_rate", before=0.123, after=0.121, **points, verdict="too small to matter"))  # type: ignore[arg-type]
    out = io.StringIO()
    shown = terminal.compared(Comparison(figures=figures, runs=(5, 5), warnings=["word " * 40]))
    Console(file=out, width=80, markup=False).print(shown, highlight=False)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = set(out.getvalue().split())
    assert {"service", "p99", "difference", "seen", "small", "matter", "-10.2", "+115.3", "+25.17", "pts"} <= words
    assert words.isdisjoint({"…", "differe", "nce"})
    assert "service p99" in out.getvalue()
    assert all(line.startswith(("note  word", "      word")) for line in lines if "word" in line)
