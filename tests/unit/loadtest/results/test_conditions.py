"""Conditions are read as people write them, mean what they say, and say what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from loadtest.results.figures import figure
from loadtest.results.histogram import Histogram
from loadtest.results.result import Generator, Result
from loadtest.results.tally import Tally
from loadtest.scenario.conditions import Condition, ConditionError, parse
from loadtest.scenario.model import Scenario

MS = 1_000_000


def figure_of(condition: Condition, of: Result) -> float:
    """The condition's figure of a run."""
    return figure(condition, of.total(), of.seconds)


def is_met(condition: Condition, of: Result) -> bool:
    """Whether the figure of a run is on the condition's side of the limit."""
    return condition.met_by(figure_of(condition, of))


def result(tally: Tally, seconds: float = 2.0) -> Result:
    generator = Generator(engine="raw", processes=1)
    return Result(
        scenario=Scenario(), machine={}, began=0.0, seconds=seconds, generator=generator, tallies={(0, "a"): tally}
    )


RUN = result(
    Tally(
        offered=108,
        statuses=Counter({200: 100, 429: 3, 503: 2}),
        errors=Counter({"timeout": 3}),
        latency=Histogram([k * MS for k in range(1, 101)]),
        service=Histogram([k * 1000 for k in range(1, 101)]),
        lag=Histogram([500] * 100),
    )
)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("p50>50.1ms", 50 * MS, False),
        ("p50>=50ms", 50 * MS, True),
        ("P99 < 0.1 s", 99 * MS, True),
        ("p99.9<=99.9ms", 100 * MS, False),
        ("max>.1001s", 100 * MS, False),
        ("mean>50.4ms", 50.5 * MS, True),
        ("service_p99>99.2us", 99_000, False),
        ("service_mean>1e-5s", 50_500, True),
        ("lag_p99>1us", 500, False),
        ("queued_max>0us", 0, False),
        ("error_rate>7.4%", 8 / 108, True),
        ("error_rate>0.0741", 8 / 108, False),
        ("goodput<50", 50, False),
        ("goodput<=50/s", 50, True),
        ("offered>54/s", 54, False),
        ("status_503>1", 2, True),
        ("status_200<100", 100, False),
        ("error_timeout>=3", 3, True),
        ("error_connect>0", 0, False),
    ],
)
def test_a_condition_says_whether_it_holds(text: str, value: float, holds: bool) -> None:
    """Its figure is that of the run, in nanoseconds, shares, or a number; the limit is on its own side of it."""
    condition = parse(text)
    assert figure_of(condition, RUN) == pytest.approx(value, rel=1e-3)
    assert is_met(condition, RUN) is holds


@pytest.mark.parametrize(
    ("text", "bound", "sure"),
    [
        ("p99>10ms", 9e6, True),
        ("p99>10ms", 11e6, False),
        ("p99<10ms", 9e6, True),
        ("p99<10ms", 11e6, False),
        ("max<=10ms", 10e6, True),
        ("mean>=10ms", 10e6, False),
        ("service_p99>10ms", 11e6, False),
        ("lag_p99>1ms", 2e6, True),
        ("error_rate>1%", 0.5, False),
        ("error_rate>1%", 0.005, True),
        ("status_503>0", 3, False),
        ("goodput<100/s", 90, False),
        ("goodput<100/s", 110, True),
        ("status_200>10", 20, True),
        ("offered<100/s", 90, True),
    ],
)
def test_what_a_late_generator_leaves_sure(text: str, bound: float, sure: bool) -> None:
    """Lag makes times longer, failures more and successes fewer: figures on the better side of a limit are there."""
    assert parse(text).sure(bound) is sure


@pytest.mark.parametrize(
    "text", ["p99>10ms", "service_p99.9<=2s", "error_rate>0.1%", "goodput<500/s", "status_503>0", "lag_mean>=5us"]
)
def test_a_condition_reads_what_it_writes(text: str) -> None:
    """Its text is the one it came from."""
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p99 10ms", "write a figure, one of > >= < <=, and a limit, like p99>10ms"),
        ("p99==10ms", "one of > >= < <="),
        ("p99>", "no condition"),
        ("p99>10", "p99 is a time in us, ms or s, 10 of what"),
        ("p99>10min", "in us, ms or s, not 'min'"),
        ("p101>1ms", "between 0 and 100, got 101"),
        ("p99>-1ms", "cannot be below 0"),
        ("error_rate>5", "at most 100%"),
        ("error_rate>5ms", "a share, like 0.1% or 0.001, not 'ms'"),
        ("goodput<5ms", "a number a second, like 500/s, not 'ms'"),
        ("status_99>0", "a status lies between 100 and 599"),
        ("status_503>1%", "a number of requests, not '%'"),
        ("error_slow>0", "'slow' is no kind of error; there are timeout, connect"),
        ("latency>1ms", "no figure 'latency'; there are p50, p99, p99.9"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    """The message quotes it and names what is possible."""
    with pytest.raises(ConditionError) as raised:
        parse(text)
    assert repr(text) in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["p99>10ms", "service_max>1s", "mean>1us"])
def test_a_run_without_one_good_reply_is_infinitely_slow(text: str) -> None:
    """Nothing was answered: a limit from above is broken, and one from below is not kept by accident."""
    dead = result(Tally(offered=5, errors=Counter({"connect": 5})))
    condition = parse(text)
    assert figure_of(condition, dead) == math.inf
    assert is_met(condition, dead)
    assert not is_met(parse(text.replace(">", "<")), dead)
    assert condition.describe(figure_of(condition, dead)).endswith("is infinite: no 2xx reply")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p99>1ms", "p99 is 99.0 ms"),
        ("error_rate>1%", "error_rate is 7.4 %"),
        ("goodput>1/s", "goodput is 50/s"),
        ("status_429>1", "status_429 is 3"),
    ],
)
def test_a_figure_is_told_in_its_unit(text: str, said: str) -> None:
    """People read what was found, not nanoseconds."""
    condition = parse(text)
    assert condition.describe(figure_of(condition, RUN)) == said


def test_a_run_of_no_time_has_no_goodput() -> None:
    """Interrupted before the first second: 0, no division."""
    assert is_met(Condition("goodput", "<", 1.0), result(Tally(), seconds=0.0))
