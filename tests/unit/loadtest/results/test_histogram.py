"""The histogram's percentiles are right to a thousandth, and merging loses nothing."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.results.histogram import Histogram

VALUES = st.lists(st.integers(0, 10**13), max_size=60)


@given(VALUES.filter(bool), st.floats(0, 100))
def test_a_percentile_is_at_most_a_thousandth_too_high(values: list[int], percent: float) -> None:
    """Never below the true value, at most 0.1 % above it, never above the largest."""
    exact = sorted(values)[max(1, math.ceil(Fraction(str(percent)) * len(values) / 100)) - 1]
    found = Histogram(values).percentile(percent)
    assert exact <= found <= min(exact * 1.001, max(values))


@given(VALUES, VALUES)
def test_merging_is_counting_both(left: list[int], right: list[int]) -> None:
    """A merged histogram equals the one that saw every value, and the other is left alone."""
    merged, other = Histogram(left), Histogram(right)
    merged.merge(other)
    assert merged == Histogram(left + right)
    assert other == Histogram(right)
    assert merged.num == len(left) + len(right)


@given(VALUES)
def test_json_gives_an_equal_histogram(values: list[int]) -> None:
    """What is written is read back."""
    histogram = Histogram(values)
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram


@given(st.lists(st.integers(0, 2047), min_size=1))
def test_small_values_are_exact(values: list[int]) -> None:
    """Below 2,048 every value has a bucket of its own."""
    histogram = Histogram(values)
    assert histogram.percentile(50) == sorted(values)[math.ceil(len(values) / 2) - 1]
    assert histogram.mean() == sum(values) / len(values)
    assert (histogram.min, histogram.max) == (min(values), max(values))


@pytest.mark.parametrize(
    ("percent", "expected"), [(99.9, 999), (99.99, 1000), (99, 990), (0.1, 1), (0, 1), (100, 1000)]
)
def test_a_percentile_is_taken_as_it_is_written(percent: float, expected: int) -> None:
    """99.9 % of a thousand values are 999 of them, although the number 99.9 in binary is not that."""
    assert Histogram(range(1, 1001)).percentile(percent) == expected


def test_nothing_counted_is_zero() -> None:
    """No values: no percentile but 0, no mean, no least."""
    empty = Histogram()
    assert (empty.percentile(99), empty.mean(), empty.min, empty.max, empty.num) == (0, 0.0, None, 0, 0)


def test_a_time_before_the_start_counts_as_none() -> None:
    """A negative value is 0."""
    assert Histogram([-5]) == Histogram([0])


@pytest.mark.parametrize("percent", [-1, 100.5])
def test_a_percentile_outside_of_a_hundred_is_refused(percent: float) -> None:
    """The message says what is right."""
    with pytest.raises(ValueError, match="between 0 and 100"):
        Histogram([1]).percentile(percent)
