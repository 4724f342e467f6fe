"""What reports are made of: figures as text, axes, plots, and templates that escape what they are given."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from embstore.common.report.axes import between, from_zero, of_names, of_percentiles, of_times
from embstore.common.report.page import render
from embstore.common.report.svg import Frame, bar_plot
from embstore.common.units import bytes_text, plain_text, seconds_text, share_text, time_text


def test_figures_have_three_digits_and_a_unit() -> None:
    """Nothing that is there reads as 0, nothing that is missing as everything."""
    assert [time_text(ns) for ns in (0, 832, 999_499, 999_500, 1_240_000, 2.1e9)] == [
        *("0", "0.832 us", "999 us", "1.00 ms", "1.24 ms", "2.10 s"),
    ]
    assert [share_text(x) for x in (0, 1e-6, 0.001, 0.5, 0.99999, 1)] == [
        *("0 %", "<0.01 %", "0.10 %", "50.0 %", ">99.9 %", "100 %"),
    ]
    assert [bytes_text(x) for x in (12, 1234, 5.6e9)] == ["12 B", "1.23 kB", "5.6 GB"]
    assert [seconds_text(x) for x in (2.5, 119, 200, 3661, -3)] == ["2.5 s", "119 s", "3:20", "1:01:01", "-3 s"]
    assert [plain_text(x) for x in (0, 0.5, 1500, 20)] == ["0", "0.5", "1,500", "20"]


def test_axes_have_round_ticks_around_their_values() -> None:
    """Every value lies on its axis, and every tick has a short text."""
    times = of_times([230_000, 41_000_000], "latency")
    assert (times.low, times.high) == (200_000, 50_000_000)
    assert [times.text(tick) for tick in times.ticks] == [
        *("200 us", "500 us", "1 ms", "2 ms", "5 ms", "10 ms", "20 ms", "50 ms"),
    ]
    rates = from_zero([1234.0], "rate", plain_text)
    assert (rates.low, rates.high, rates.at(rates.high)) == (0, 1500, 1)
    nines = of_percentiles(5000)
    assert [nines.text(tick) for tick in nines.ticks] == ["0 %", "50 %", "90 %", "99 %", "99.9 %"]


@pytest.mark.parametrize(("low", "high"), [(0.87, 0.999), (-0.31, 0.02), (1.0, 1.0), (0.0, 0.0)])
def test_an_axis_between_two_values_holds_both(low: float, high: float) -> None:
    """An axis reaches from a round value below to one above, also where both values are one."""
    scale = between(low, high, "cosine", str)
    assert scale.low <= low <= high <= scale.high
    assert scale.low < scale.high
    assert 2 <= len(scale.ticks) <= 10
    assert {scale.ticks[0], scale.ticks[-1]} == {scale.low, scale.high}


def test_a_bar_stands_over_its_name() -> None:
    """A bar has its value as height, its text above it, and is well-formed whatever its name."""
    frame = Frame(name="<&>", x=of_names(["a & b", "c"], "which"), y=from_zero([4.0], "how many", str), height=100)
    svg = bar_plot(frame, [(4.0, "4 > 3"), (0.0, "0")], 2)
    first, second = (one for one in ElementTree.fromstring(svg).iter("rect") if one.get("class") == "area c2")
    assert float(first.get("height", 0)) == pytest.approx(100 - frame.up(4.0), abs=0.1)
    assert float(second.get("height", 1)) == 0
    assert [round(frame.across(n)) for n in (0, 1)] == [
        round(float(one.get("x", 0)) + float(one.get("width", 0)) / 2) for one in (first, second)
    ]


def test_a_template_escapes_values_and_refuses_to_miss_one(tmp_path: Path) -> None:
    """Text in a value stays text, the page has the style sheet, and a value that is missing is an error."""
    template = tmp_path / "page.html.j2"
    template.write_text('{% extends "base.html.j2" %}{% block body %}{{ said }}{% endblock %}')
    page = render(template, title="a < b", said="</main><script>")
    assert "<title>a &lt; b</title>" in page
    assert "&lt;/main&gt;&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    with pytest.raises(UndefinedError, match="said"):
        render(template, title="")
