"""The plots of a load test's report: which there are, and what of a result goes into each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from embstore.common.report.axes import Scale, from_zero, of_percentiles, of_shares, of_times, over_time
from embstore.common.report.svg import Chart, Event, Frame, Layer, Polyline, line_plot, span_plot, stacked_plot
from embstore.common.units import bytes_text, plain_text, rate_text, seconds_text, time_text
from loadtest.results import server_metrics
from loadtest.results.hgrm import curve
from loadtest.results.histogram import Histogram
from loadtest.results.result import Result
from loadtest.results.tally import Tally

MAX_BINS, MAX_KINDS, MAX_CODES, MAX_VERSIONS, MAX_EVENTS = 300, 5, 6, 16, 30
BLUE, GREEN, ORANGE, RED, PURPLE, SKY, GREY = range(7)
HALF_WIDTH = 500
NAME_CHARS = 12
"""So much of a name has room beside a plot."""
_TOLD = (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))


@dataclass(frozen=True)
class Bin:
    """Some seconds of the run in one."""

    begin: float
    end: float
    tally: Tally

    @property
    def middle(self) -> float:
        """Where a point for it lies."""
        return (self.begin + self.end) / 2

    def per_s(self, count: float) -> float:
        """A count of it as a rate."""
        return count / (self.end - self.begin)


class Charts:
    """All plots of one result; they share their axis of time."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.samples = server_metrics.thinned(result.samples)
        self.bins = _bins(result)
        self.seconds = max(result.seconds, self.bins[-1].end if self.bins else 0.0, 0.1)
        self.offered = "due" if result.scenario.mode == "open" else "sent"
        windows = result.windows()
        self.bands = windows if len(windows) > 1 else []
        self.events = [
            Event(at=mark.at, name=mark.name[:28], seconds=mark.seconds, failed=not mark.ok)
            for mark in result.marks[:MAX_EVENTS]
        ]

    def client(self) -> list[Chart]:
        """What the callers saw."""
        found = [self._latency(), self._percentiles(), self._throughput(), self._errors(), self._versions()]
        return [chart for chart in found if chart]

    def generator(self) -> list[Chart]:
        """What the generator did to the figures itself."""
        lines = [
            self._times_of("lag", "p99 of lag", 99, BLUE),
            self._times_of("queued", "p99 of queue", 99, ORANGE, dashed=True),
        ]
        if not _values(lines):
            return []
        y = of_times(_values(lines), "late (log scale)")
        svg = line_plot(self._frame("lag of the generator over time", y, height=130), lines)
        note = "Lag: how late the generator got to a request. Queue: how long requests waited for a free connection."
        return [Chart(title="The generator itself", note=note, svg=svg)]

    def server(self) -> list[Chart]:
        """What the server says of itself, beside what its callers saw; empty without its metrics."""
        if len(self.samples) < 2:
            return []
        found = [self._work(), self._both_latencies(), self._waiting(), self._hits(), self._memory(), self._refusals()]
        return [chart for chart in found if chart]

    def _versions(self) -> Chart | None:
        """Which versions answered, when."""
        seen = sorted(self.result.versions, key=lambda one: (one.table, one.first))
        if not seen:
            return None
        tables = list(dict.fromkeys(one.table for one in seen))
        rows = []
        for one in seen[:MAX_VERSIONS]:
            during = f"from {seconds_text(one.first)} to {seconds_text(one.last)}"
            told = f"{one.table} version {one.version}: {one.count:,} replies {during}"
            color = tables.index(one.table) % GREY
            room = max(1, NAME_CHARS - len(one.version) - 1)
            name = one.table if len(one.table) <= room else one.table[: room - 1] + "…"
            rows.append((f"{name} {one.version}", one.first, max(one.last, one.first), color, told))
        y = Scale(label="", low=0.0, high=1.0, ticks=(), text=str)
        frame = self._frame("versions that answered", y, height=len(rows) * 20 + 4, hover=False)
        left_out = len(seen) - len(rows)
        note = "From the first to the last reply of each version" + (
            f"; {left_out} more are left out." * bool(left_out)
        )
        return Chart(title="Versions that answered", note=note, svg=span_plot(frame, rows))

    def _latency(self) -> Chart | None:
        lines = [
            self._times_of("latency", "max", 100, RED, thin=True),
            self._times_of("latency", "p99", 99, ORANGE),
            self._times_of("latency", "p90", 90, GREEN),
            self._times_of("latency", "p50", 50, BLUE),
        ]
        if not _values(lines):
            return None
        y = of_times(_values(lines), "latency (log scale)")
        each = "second" if not self.bins or self.bins[0].end <= 1 else f"{self.bins[0].end:g} seconds"
        counted = "from when a request was due" if self.result.scenario.mode == "open" else "from when it was sent"
        note = f"Of the 2xx replies to what was due in each {each}, {counted} to the end of its reply."
        return Chart(title="Latency over time", note=note, svg=line_plot(self._frame("latency over time", y), lines))

    def _percentiles(self) -> Chart | None:
        kinds = self.result.kinds()
        groups = [(kind, self.result.total(kind=kind)) for kind in kinds[:MAX_KINDS]]
        groups = [(kind, tally) for kind, tally in groups if tally.ok]
        if not groups:
            return None
        lines, legend = [], []
        for color, (kind, tally) in enumerate(groups):
            for name, histogram in (("latency", tally.latency), ("service time", tally.service)):
                dashed = name != "latency"
                points = _odds(histogram)
                lines.append(Polyline(name="", points=points, color=color, dashed=dashed, thin=dashed))
                legend.append((f"{kind}, {name}", color, dashed))
        y = of_times(_values(lines), "time (log scale)")
        most = max(tally.ok for _, tally in groups)
        frame = Frame(name="percentile curves", x=of_percentiles(most), y=y, height=270)
        left_out = f" The {len(kinds) - MAX_KINDS} rarest kinds are left out." if len(kinds) > MAX_KINDS else ""
        note = (
            "How long all but the slowest took; each step to the right is another nine. Service time runs from when a "
            "request was sent: the room between the two curves is time that requests waited to be sent." + left_out
        )
        return Chart(title="Percentiles", note=note, svg=line_plot(frame, lines), legend=legend)

    def _throughput(self) -> Chart | None:
        if not self.bins:
            return None
        offered = [(one.middle, one.per_s(one.tally.offered)) for one in self.bins]
        ok = [(one.middle, one.per_s(one.tally.ok)) for one in self.bins]
        lines = [
            Polyline(
                name="due" if self.result.scenario.mode == "open" else "sent", points=offered, color=GREY, dashed=True
            ),
            Polyline(name="2xx", points=ok, color=BLUE),
        ]
        y = from_zero(_values(lines), "requests a second", plain_text)
        note = "What was due in each moment, and how much of that was answered well."
        return Chart(title="Throughput", note=note, svg=line_plot(self._frame("throughput over time", y), lines))

    def _errors(self) -> Chart | None:
        counts: Counter[str] = Counter()
        for one in self.bins:
            counts.update(one.tally.failures)
        if not counts:
            return None
        names = [name for name, _ in counts.most_common(MAX_CODES)]
        rest = [name for name in counts if name not in names]
        order = (RED, ORANGE, PURPLE, BLUE, GREEN, SKY)
        layers = [
            Layer(name=name, color=order[n], values=[one.per_s(one.tally.failures[name]) for one in self.bins])
            for n, name in enumerate(names)
        ]
        if rest:
            sums = [one.per_s(sum(one.tally.failures[name] for name in rest)) for one in self.bins]
            layers.append(Layer(name="others", values=sums, color=GREY))
        heights = (one.per_s(one.tally.failures.total()) for one in self.bins)
        y = from_zero(heights, "requests a second", plain_text)
        svg = stacked_plot(
            self._frame("errors over time", y, height=150), [(one.begin, one.end) for one in self.bins], layers
        )
        legend = [(f"{name} ({counts[name]:,})", order[n], False) for n, name in enumerate(names)]
        if rest:
            legend.append((f"{len(rest)} others ({sum(counts[name] for name in rest):,})", GREY, False))
        note = "Requests without a 2xx reply, by status or by what went wrong, at the moment they were due."
        return Chart(title="Errors", note=note, svg=svg, legend=legend)

    def _work(self) -> Chart | None:
        counted = server_metrics.rates(self.samples, server_metrics.DURATION + "_count").get("", [])
        client = [(one.middle, one.per_s(one.tally.ok)) for one in self.bins]
        lines = [_line("server", counted, BLUE), Polyline(name="client's 2xx", points=client, color=GREY, dashed=True)]
        y = from_zero(_values(lines), "requests a second", plain_text)
        return self._half("Lookups", "Counted by the server, and good replies that arrived here.", y, lines, counted)

    def _both_latencies(self) -> Chart | None:
        server = [(at, 1e9 * value) for at, value in server_metrics.latency(self.samples, 99)]
        lines = [self._times_of("service", "client", 99, GREY, dashed=True), _line("server", server, ORANGE)]
        y = of_times(_values(lines), "p99 (log scale)")
        note = "p99 of the service time here, and of the server's own time (estimated from its buckets)."
        return self._half("Inside and outside", note, y, lines, server)

    def _waiting(self) -> Chart | None:
        waiting = server_metrics.gauge(self.samples, "embstore_queue_depth")
        inside = server_metrics.gauge(self.samples, "embstore_inflight_requests")
        lines = [_line("in flight", inside, BLUE), _line("queued", waiting, ORANGE)]
        y = from_zero(_values(lines), "requests", plain_text, least=4.0)
        return self._half("Inside the server", "At the moment of each sample.", y, lines, inside or waiting)

    def _hits(self) -> Chart | None:
        tiers = server_metrics.hit_share(self.samples)
        lines = [_line(tier, shares, color) for color, (tier, shares) in enumerate(tiers.items())]
        note = "Share of the ids that each tier had, of its lookups."
        return self._half("Cache hits", note, of_shares("share of ids"), lines, next(iter(tiers.values()), []))

    def _memory(self) -> Chart | None:
        names = (("process", "process_resident_memory_bytes", BLUE), ("tables", "embstore_table_bytes", GREEN))
        lines = [_line(name, server_metrics.gauge(self.samples, metric), color) for name, metric, color in names]
        lines = [line for line in lines if line.points]
        y = from_zero(_values(lines), "bytes", bytes_text)
        said = " and ".join(f"of its {line.name}" for line in lines)
        return self._half("Memory", f"As the server says, {said}.", y, lines, lines and lines[0].points)

    def _refusals(self) -> Chart | None:
        refused = server_metrics.rates(self.samples, "embstore_rejected_total", "reason")
        some = {reason: often for reason, often in refused.items() if any(value for _, value in often)}
        lines = [_line(reason, often, n % GREY) for n, (reason, often) in enumerate(some.items())]
        y = from_zero(_values(lines), "a second", plain_text)
        return self._half("Refused", "Requests that got no vectors, by the server's reason.", y, lines, bool(some))

    def _half(self, title: str, note: str, y: Scale, lines: Sequence[Polyline], there: object) -> Chart | None:
        if not there:
            return None
        frame = self._frame(title, y, height=170, width=HALF_WIDTH)
        return Chart(title=title, note=note, svg=line_plot(frame, lines), half=True)

    def _frame(self, name: str, y: Scale, *, height: int = 240, width: int = 960, hover: bool = True) -> Frame:
        """One over the time of the run; a half one has no room for names."""
        if width == HALF_WIDTH:
            events = [replace(event, name="") for event in self.events]
            return Frame(name=name, x=over_time(self.seconds, 6), y=y, events=events, height=height, width=width)
        told = [(one.begin, one.end, _told(one)) for one in self.bins] if hover else []
        x = over_time(self.seconds)
        return Frame(name=name, x=x, y=y, bands=self.bands, events=self.events, hover=told, height=height)

    def _times_of(self, histogram: str, name: str, percent: float, color: int, **style: bool) -> Polyline:
        def value(tally: Tally) -> float | None:
            of: Histogram = getattr(tally, histogram)
            return max(1, of.percentile(percent)) if of.num else None

        return Polyline(name=name, points=[(one.middle, value(one.tally)) for one in self.bins], color=color, **style)


def _bins(result: Result) -> list[Bin]:
    """Every second, or as many in one as make at most MAX_BINS; the last ends with the measurement."""
    seconds = result.series()
    wide = max(1, math.ceil(len(seconds) / MAX_BINS))
    found = []
    for begin in range(0, len(seconds), wide):
        tally = Tally()
        for one in seconds[begin : begin + wide]:
            tally.merge(one)
        end = min(begin + wide, max(result.seconds, begin + 0.1))
        found.append(Bin(begin, end, tally))
    return found


def _told(one: Bin) -> str:
    """What hovering over a moment says."""
    tally = one.tally
    said = [f"{seconds_text(one.begin)} to {seconds_text(one.end)}"]
    said.append(f"due {rate_text(one.per_s(tally.offered))}, 2xx {rate_text(one.per_s(tally.ok))}")
    if tally.ok:
        times = [f"{name} {time_text(tally.latency.percentile(p))}" for name, p in _TOLD]
        said.append(", ".join(times))
        said.append(f"service p99 {time_text(tally.service.percentile(99))}")
    said += [f"{count:,} x {name}" for name, count in tally.failures.most_common(5)]
    return "\n".join(said)


def _odds(histogram: Histogram) -> list[tuple[float, float | None]]:
    """A percentile curve against 1 / (1 - p), as far as the values reach."""
    num = float(histogram.num)
    found: list[tuple[float, float | None]] = []
    for value, level, _ in curve(histogram):
        found.append((min(num, 1 / (1 - level)) if level < 1 else num, max(1, value)))
    return found


def _line(name: str, points: Sequence[tuple[float, float]], color: int) -> Polyline:
    return Polyline(name=name, points=list(points), color=color)


def _values(lines: Sequence[Polyline]) -> list[float]:
    return [value for _, value in chain.from_iterable(line.points for line in lines) if value is not None]
