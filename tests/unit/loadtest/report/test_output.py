"""What a load test shows: tables, summary, live lines and the HTML page all say what the result says, and no more."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console, RenderableType

from loadtest.report import terminal
from loadtest.report.html import to_html
from loadtest.report.live import Live, PlainLines, Terminal, make_live, sparkline
from loadtest.results import server_metrics
from loadtest.results.histogram import Histogram
from loadtest.results.result import Generator, Mark, Result, Sample, Seen
from loadtest.results.summary import to_summary
from loadtest.results.tally import Tally
from loadtest.results.validity import GENERATOR_LAG, generator_lag
from loadtest.run.progress import Progress
from loadtest.scenario.model import Phase, RequestSpec, Scenario

MS = 1_000_000
SECONDS = 6


def a_second(ms: int, *, refused: int = 0, timeouts: int = 0) -> Tally:
    """100 requests due, those not refused or lost answered in 1 to `ms` milliseconds, half of that service."""
    good = range(100 - refused - timeouts)
    return Tally(
        offered=100,
        num_bytes=100_000,
        retry_after=refused,
        statuses=Counter({200: len(good)}) + Counter({429: refused}),
        errors=Counter({"timeout": timeouts}),
        latency=Histogram((1 + (ms - 1) * k // 99) * MS for k in good),
        service=Histogram((1 + (ms - 1) * k // 99) * MS // 2 for k in good),
        lag=Histogram([20_000] * 100),
    )


def a_sample(second: int) -> Sample:
    """100 lookups a second, 99 of them within 1 ms, the last within 5; 3 of 4 ids were in the cache."""
    name, labels = server_metrics.DURATION, 'protocol="json",table="item"'
    return Sample(
        at=float(second),
        values={
            f'{name}_bucket{{le="0.001",{labels}}}': 99.0 * second,
            f'{name}_bucket{{le="0.005",{labels}}}': 100.0 * second,
            f'{name}_bucket{{le="+Inf",{labels}}}': 100.0 * second,
            f"{name}_count{{{labels}}}": 100.0 * second,
            'embstore_cache_ids_total{result="hit",table="item",tier="local"}': 300.0 * second,
            'embstore_cache_ids_total{result="miss",table="item",tier="local"}': 100.0 * second,
            'embstore_rejected_total{reason="overloaded"}': 5.0 * second,
            "embstore_queue_depth": float(second % 3),
        },
    )


def a_result(**changed: Any) -> Result:
    """Two phases of three seconds, two kinds of requests; refusals and timeouts in the second phase."""
    phases = (
        Phase(name="warm", seconds=1, warmup=True),
        Phase(name="calm", seconds=3, rate=200),
        Phase(name="<storm>", seconds=3, rate=200),
    )
    scenario = Scenario(
        name="<b>Night & day</b>",
        phases=phases,
        requests=(RequestSpec(), RequestSpec(protocol="json", name="json & all")),
        fail_if=("p99>10ms", "error_rate>50%"),
    )
    made: dict[str, Any] = {
        "scenario": scenario,
        "machine": {"cpu": "<CPU> & co", "cores": 2},
        "began": 1_760_000_000.0,
        "seconds": float(SECONDS),
        "generator": Generator(engine="httpx", processes=2, busy=0.5, ceiling=5000.0),
        "tallies": {
            (second, kind): a_second(8) if second < 3 else a_second(40, refused=10, timeouts=2)
            for second in range(SECONDS)
            for kind in ("octet item", "json & all")
        },
        "marks": [
            Mark(at=2.0, name="publish", seconds=1.0),
            Mark(at=4.0, name="</svg> kill", detail="<nobody>", ok=False),
        ],
        "samples": [a_sample(second) for second in range(SECONDS + 1)],
        "versions": [Seen(table="item", version="7", first=0.0, last=5.9, count=1128)],
    }
    return Result(**made | changed)


def printed(what: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, force_terminal=False)
    console.print(what, highlight=False)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def nothing() -> Result:
    """A run in which nothing was answered, interrupted in its first second."""
    tally = Tally(offered=3, errors=Counter({"connect": 3}))
    changed: dict[str, Any] = {"tallies": {(0, "octet item"): tally}, "marks": [], "samples": [], "versions": []}
    return a_result(**changed, seconds=0.5, partial=True)


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "onload")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_summary_has_the_figures_by_phase_and_by_kind() -> None:
    """Rates, times, errors of everything and of its parts, as plain JSON."""
    summary = json.loads(json.dumps(to_summary(a_result())))
    assert summary["total"]["offered"] == 1200
    assert summary["total"]["ok_per_s"] == pytest.approx((600 + 528) / SECONDS)
    assert summary["errors"] == {"429": 60, "timeout": 12}
    calm, storm = summary["phases"]
    assert (calm["name"], calm["begin"], calm["end"], calm["error_rate"]) == ("calm", 0, 3, 0)
    assert storm["error_rate"] == pytest.approx(0.12)
    assert calm["latency_ms"]["max"] == 8
    assert storm["service_ms"]["p99"] == pytest.approx(storm["latency_ms"]["p99"] / 2, rel=0.002)
    assert list(summary["kinds"]) == ["json & all", "octet item"]
    assert summary["kinds"]["octet item"]["offered"] == 600
    assert [one["holds"] for one in summary["fail_if"]] == [True, False]
    assert summary["events"][1]["ok"] is False


def test_the_server_speaks_for_itself() -> None:
    """Its own percentiles come from its buckets, rates and hits from its counters."""
    view = to_summary(a_result())["server"]
    assert (view["lookups"], view["rejected"], view["cache_hits"]) == (600, {"overloaded": 30}, {"local": 0.75})
    assert view["p50_ms"] == pytest.approx(50 / 99)
    assert view["p99_ms"] == pytest.approx(1.0)
    assert view["queue_depth_max"] == 2
    assert to_summary(nothing())["server"] == {}


def test_a_server_that_began_anew_is_counted_on() -> None:
    """Counters that fell back to less grew from 0."""
    values = [{"embstore_swaps_total": float(value)} for value in (5, 9, 2, 3)]
    samples = [Sample(at=float(at), values=value) for at, value in enumerate(values)]
    assert server_metrics.increase(samples, "embstore_swaps_total") == {"": 7.0}
    assert server_metrics.rates(samples, "embstore_swaps_total") == {"": [(0.5, 4.0), (1.5, 2.0), (2.5, 1.0)]}


def test_a_peak_between_the_samples_of_a_plot_is_counted() -> None:
    """However long the run was, maxima and counts are those of all samples."""
    samples = [Sample(at=float(at), values={"embstore_queue_depth": float(at == 1001)}) for at in range(2000)]
    assert len(server_metrics.thinned(samples)) < 1000
    assert server_metrics.view(samples) == {"samples": 2000, "queue_depth_max": 1.0}


def test_labels_may_hold_anything() -> None:
    """Quotes, commas and backslashes inside of a label are part of it."""
    assert server_metrics.series(r'a_total{table="x\"},y\\",le="0.1"}') == (
        "a_total",
        (("table", 'x"},y\\'), ("le", "0.1")),
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_what_matters_at_any_width(width: int) -> None:
    """Figures by phase and kind, errors, versions, events, the server's view, conditions."""
    text = printed(terminal.report(a_result()), width)
    for expected in (
        "everything",
        "calm, 3 s",
        "<storm>, 3 s",
        "json & all",
        "429",
        "12.0 %",
        "publish",
        "</svg> kill",
    ):
        assert expected in text
    assert "fail  p99>10ms: p99 is 34.0 ms" in text
    assert "pass  error_rate>50%: error_rate is 6.0 %" in text
    assert "600 lookups" in text
    assert text.rstrip().endswith("valid: the generator kept up")
    assert all(len(line) <= width for line in text.splitlines())


def test_a_run_that_says_nothing_says_so_in_every_output() -> None:
    """An invalid run is called that at the end of the table, and first in the page; its conditions are open."""
    reasons = ["generator lag: p99 lag is 9 ms", "a generator process was held up for 1.5 s"]
    run = a_result(invalid=reasons)
    assert "INVALID: these figures say nothing about the server" in printed(terminal.report(run))
    assert "pass" not in printed(terminal.report(run))
    assert (to_summary(run)["invalid"], to_summary(run)["upper_bounds"]) == (reasons, False)
    page = to_html(run)
    assert page.index("Invalid: these figures say nothing about the server") < page.index("<table")
    assert reasons[0] in page
    assert "the generator kept up" not in page


def test_a_run_of_a_late_generator_shows_upper_bounds() -> None:
    """It is not called invalid: what lies below a limit does so surely, what lies above is open."""
    reasons = [f"{GENERATOR_LAG}: p99 lag is 9 ms"]
    run = a_result(invalid=reasons)
    text, page, summary = printed(terminal.report(run)), to_html(run), to_summary(run)
    assert (summary["upper_bounds"], summary["invalid"]) == (True, reasons)
    assert [one["verdict"] for one in summary["fail_if"]] == ["inconclusive", "pass"]
    assert "GENERATOR LAG: latencies are upper bounds, because\n  generator lag: p99" in text
    assert "inconclusive  p99>10ms: p99 is 34.0 ms" in text
    assert "pass          error_rate>50%: " in text
    assert '<div class="verdict warn"><strong>Generator lag: latencies are upper bounds</strong>' in page
    assert reasons[0] in page
    assert "invalid" not in (text + page.split("<table")[0]).lower()
    assert to_summary(a_result())["upper_bounds"] is False


def test_a_lag_over_its_limit_reads_so() -> None:
    """0.2 ms is the limit: what is just above it is not rounded to it."""
    assert generator_lag(Tally(lag=Histogram([200_500]), latency=Histogram([1_234_567])), 99) == (
        "0.2005 ms",
        "1.23 ms",
    )


def test_ids_that_the_server_does_not_have_are_told() -> None:
    """A load that asks for what is not there is another one than it seems; a few such ids are none."""
    for missing, said in ((900.0, ["90.0 % of the ids"]), (50.0, [])):
        ids = {"found": 1000.0 - missing, "missing": missing}
        samples = [
            Sample(at=at, values={f'embstore_ids_total{{status="{name}"}}': at * n for name, n in ids.items()})
            for at in (0.0, 1.0)
        ]
        notes = [line for line in to_summary(a_result(samples=samples))["warnings"] if "did not have" in line]
        assert [part in line for part, line in zip(said, notes, strict=True)] == [True] * len(said)


def test_what_does_not_fit_goes_on_below_its_text() -> None:
    """Eighty columns: no line of a note begins where the word `note` does."""
    lines = printed(terminal.report(nothing()), 80).splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("fail"))
    words = ("fail", "pass", "note", "partial: ", " " * 8)
    assert all(line.startswith(words) for line in lines[begin:] if line.strip())
    reason = "a generator process used 99% of its core; " * 4
    lines = printed(terminal.report(a_result(invalid=[reason])), 80).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("INVALID"))
    assert len(lines) > first + 2
    assert all(line.startswith("  ") for line in lines[first + 1 :])


def test_a_run_without_an_answer_has_no_times() -> None:
    """Interrupted, nothing answered: no figure is made up, and the outputs say why."""
    summary = to_summary(nothing())
    assert summary["total"]["latency_ms"]["p99"] is None
    assert summary["warnings"][:2] == [
        "interrupted: 0.5 s of 6 s were measured",
        "not one 2xx reply: there are no latencies",
    ]
    text = printed(terminal.report(nothing()))
    assert "partial: the run was interrupted" in text
    assert "p99 is infinite: no 2xx reply" in text
    assert "Errors" in to_html(nothing())


def test_the_page_stands_alone() -> None:
    """One file: every element is closed, nothing is fetched, nothing is run, light and dark are there."""
    page, text = Page(), to_html(a_result())
    page.feed(text)
    assert page.open == []
    assert page.outside == []
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not re.search(r"url\(|@import|https?://(?!127\.0\.0\.1)", text)
    assert "prefers-color-scheme: dark" in text
    sheet = text[text.index("<style>") : text.index("</style>")]
    assert sheet.count("{") == sheet.count("}")
    assert page.tags["svg"] == 11  # a plot for everything that there is
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_text_of_others_stays_text() -> None:
    """Names, details and machines cannot become elements."""
    page = Page()
    page.feed(to_html(a_result()))
    assert page.tags["b"] == 6  # the figures on top
    said = "".join(page.text)
    for text in ("<b>Night & day</b>", "<storm>", "<nobody>", "</svg> kill", "<CPU> & co"):
        assert text in said


@pytest.mark.parametrize("seconds", [0, 1, 700])
def test_a_page_of_any_length(seconds: int) -> None:
    """No second at all, one, or so many that several share a point: plots stay small and whole."""
    one = {(second, "octet item"): a_second(5) for second in range(seconds)}
    text = to_html(a_result(tallies=one, seconds=float(seconds), samples=[], marks=[]))
    Page().feed(text)
    assert len(text) < 300_000
    assert ("in each 3 seconds" in text) is (seconds == 700)


def progress(**changed: Any) -> Progress:
    made: dict[str, Any] = {"at": 1.0, "seconds": 6.0, "phase": "calm", "offered": 200, "ok": 190}
    return Progress(**made | {"failed": Counter({"429": 4}), "rate": 195.0, "p50_ms": 1.2, "p99_ms": 8.5} | changed)


def test_a_log_gets_a_line_for_each_phase_and_the_end() -> None:
    """Reports in between are left out, so that a log stays short."""
    out = io.StringIO()
    with make_live(a_result().scenario, stream=out) as live:
        assert isinstance(live, PlainLines)
        live(progress(at=-0.5, phase="calm", ok=0, failed=Counter(), p50_ms=0.0, p99_ms=0.0))
        live(progress(at=1.0, ok=150))
        live(progress(at=2.0, ok=340))
        live.note("publish item")
        live(progress(at=6.0, ok=740, phase="<storm>"))
    lines = out.getvalue().splitlines()
    assert lines == [
        "0 s before the first of 6 s, calm: warming up",
        "1 s of 6 s, calm: 2xx 100/s of 200/s, p50 1.20 ms, p99 8.50 ms, 4 x 429",
        "publish item",
        "6 s of 6 s, <storm>: 2xx 100/s of 0/s, p50 1.20 ms, p99 8.50 ms, 4 x 429",
    ]


def test_a_terminal_shows_rates_times_and_errors() -> None:
    """What is asked, what comes back, how long it takes and what fails, with a bar of the whole."""
    live = Terminal(a_result().scenario, io.StringIO())
    for at in (1.0, 2.0, 3.0):
        live.pace.add(progress(at=at, ok=int(190 * at)))
    text = printed(live.picture(progress(at=3.5)), 100)
    for expected in ("4 s of 6 s", "190/s", "of 200/s", "1.20 ms", "8.50 ms", "429 4"):
        assert expected in text
    warm = printed(live.picture(progress(at=-2, phase="warm")), 100)
    assert "warming up" in warm
    assert "2xx" not in warm
    live.live.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with live:
        live(progress(at=4.0))
        live.note("an [event]")


def test_programs_get_nothing_live() -> None:
    """What a program reads gets no live lines."""
    live = make_live(Scenario(), silent=True)
    live(progress())
    assert type(live) is Live


def test_a_sparkline_goes_from_nothing_to_the_most() -> None:
    """Zeros are the lowest bar, the largest the highest."""
    assert sparkline([0, 1, 2, 4, 8]) == "▁▂▃▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
