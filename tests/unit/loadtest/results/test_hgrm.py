"""Percentile files say what the histogram says, in the form that HdrHistogram's tools read."""

from __future__ import annotations

import importlib
import math
import random
import re
from typing import Any

import pytest

from loadtest.results.hgrm import curve, to_hgrm
from loadtest.results.histogram import Histogram

LINE = re.compile(r" *(\d+\.\d+) +(\d\.\d+) +(\d+)(?: +(\d+\.\d\d))?")


def skewed(count: int) -> list[int]:
    drawn = random.Random(7)
    return [int(drawn.lognormvariate(14, 1.2)) for _ in range(count)]


def rows(text: str) -> list[tuple[float, float, int, float]]:
    """What a plotter takes from a file: value, percentile, count, 1 / (1 - percentile)."""
    found = []
    for line in text.splitlines()[2:]:
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            found.append((float(match[1]), float(match[2]), int(match[3]), float(match[4] or "inf")))
    return found


def test_every_row_is_a_percentile_of_the_histogram() -> None:
    """At each level the value is the histogram's own percentile, and the count is how many are at most that."""
    values = skewed(5000)
    histogram = Histogram(values)
    for value, level, seen, odds in rows(to_hgrm(histogram)):
        assert round(1e6 * value) == histogram.percentile(max(0.0, 100 * level - 1e-6))
        assert seen == sum(one <= round(1e6 * value) for one in values)
        assert odds == pytest.approx(1 / (1 - level) if level < 1 else math.inf, abs=0.006)


def test_the_file_ends_with_everything() -> None:
    """The last row is 100 %, and the last lines tell mean, deviation, maximum and number."""
    text = to_hgrm(Histogram([1_000_000, 2_000_000, 3_000_000]))
    assert text.startswith("       Value     Percentile TotalCount 1/(1-Percentile)\n\n")
    assert rows(text)[-1] == (3.0, 1.0, 3, math.inf)
    said = dict(re.findall(r"(\w[\w ]*?) += +([\d.]+)", text))
    assert said["Mean"] == "2.000000"
    assert float(said["StdDeviation"]) == pytest.approx(math.sqrt(2 / 3), abs=0.001)
    assert (said["Max"], said["Total count"]) == ("3.000000", "3")


def test_the_tail_is_as_fine_as_the_body() -> None:
    """Levels come closer as 100 % does, until every value is there: five for each halving of the rest."""
    levels = [point.level for point in curve(Histogram(range(2000)))]
    assert levels == sorted(levels)
    for halving in range(10):
        low, high = 1 - 0.5**halving, 1 - 0.5 ** (halving + 1)
        assert sum(low <= level < high for level in levels) == 5


def test_nothing_counted_is_a_file_without_rows() -> None:
    """An empty histogram gives head and end, and no division by nothing."""
    assert rows(to_hgrm(Histogram())) == []
    assert "Total count    =            0" in to_hgrm(Histogram())


@pytest.mark.parametrize("count", [1, 10, 20_000])
def test_percentiles_are_those_of_hdr_histogram(count: int) -> None:
    """HdrHistogram's own library, told the same values, reads the same percentiles to a thousandth."""
    try:
        hdrh: Any = importlib.import_module("hdrh.histogram")
    except ModuleNotFoundError:
        pytest.skip("hdrhistogram is not installed")
    values = skewed(count)
    theirs, ours = hdrh.HdrHistogram(1, 10**11, 3), Histogram(values)
    for value in values:
        theirs.record_value(value)
    for ms, _, seen, _ in rows(to_hgrm(ours)):
        assert 1e6 * ms == pytest.approx(theirs.get_value_at_percentile(100 * seen / count), rel=0.001)
    assert ours.mean() == pytest.approx(theirs.get_mean_value(), rel=0.001)
