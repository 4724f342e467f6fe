"""A load test while it runs: a picture that moves on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embstore.common.progress import Silent
from embstore.common.units import rate_text, seconds_text, time_text
from loadtest.scenario.model import Scenario

if TYPE_CHECKING:
    from loadtest.run.progress import Progress

LINE_SECONDS = 5.0
KEPT = 60
BARS = "▁▂▃▄▅▆▇█"


class Live(Silent):
    """Called with each Progress of a run; tells nothing."""

    def __enter__(self) -> Self:
        return self

    def __call__(self, progress: Progress) -> None:
        """How the run stands."""


class PlainLines(Live):
    """A line every few seconds, and when a phase begins."""

    def __init__(self, scenario: Scenario, stream: TextIO) -> None:
        self.scenario, self.stream = scenario, stream
        self.pace, self.phase, self.told = Pace(), "", float("-inf")

    def __call__(self, progress: Progress) -> None:
        """A line, when the last one is old enough or of another phase."""
        self.pace.add(progress)
        over = progress.at >= progress.seconds
        phase = ("warming up, " if progress.at < 0 else "") + progress.phase
        if phase == self.phase and time.monotonic() - self.told < LINE_SECONDS and not over:
            return
        self.phase, self.told = phase, time.monotonic()
        where = f"{moment(progress)} of {seconds_text(progress.seconds)}"
        if progress.at < 0:
            self.note(f"{where}, {progress.phase}: warming up")
            return
        failed = ", ".join(f"{count:,} x {name}" for name, count in progress.failed.most_common(3)) or "no errors"
        offered = offered_rate(self.scenario, progress.at)
        got = rate_text(self.pace.got) + ("" if offered is None else f" of {rate_text(offered)}")
        times = f"p50 {_ms(progress.p50_ms)}, p99 {_ms(progress.p99_ms)}"
        self.note(f"{where}, {progress.phase}: 2xx {got}, {times}, {failed}")

    def note(self, message: str) -> None:
        """A line."""
        self.stream.write(message + "\n")
        self.stream.flush()


class Terminal(Live):
    """Rates, percentiles, errors and how much is left, with their recent past; gone at the end."""

    def __init__(self, scenario: Scenario, stream: TextIO) -> None:
        self.scenario, self.pace = scenario, Pace()
        self.console = Console(file=stream, highlight=False, markup=False)
        self.live = RichLive(console=self.console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def __call__(self, progress: Progress) -> None:
        """Draw it anew."""
        self.pace.add(progress)
        self.live.update(self.picture(progress), refresh=True)

    def note(self, message: str) -> None:
        """A line above the picture."""
        self.live.console.print(message, markup=False)

    def picture(self, progress: Progress) -> RenderableType:
        """How the run stands."""
        if progress.at < 0:
            return Group(self._bar(progress), Text("warming up: nothing counts yet", style="dim"))
        pace, rows = self.pace, Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(justify="right", min_width=10, no_wrap=True)
        rows.add_column(no_wrap=True, overflow="crop")
        offered = offered_rate(self.scenario, progress.at)
        due = "" if offered is None else f" of {rate_text(offered)}"
        rows.add_row("2xx", rate_text(pace.got), Text.assemble((sparkline(pace.rates), "green"), due))
        rows.add_row("p50", _ms(progress.p50_ms), Text(sparkline(pace.p50s), style="cyan"))
        rows.add_row("p99", _ms(progress.p99_ms), Text(sparkline(pace.p99s), style="yellow"))
        failed = progress.failed.total()
        by_kind = "  ".join(f"{name} {count:,}" for name, count in progress.failed.most_common(4))
        rows.add_row("errors", Text(f"{failed:,}", style="bold red" if failed else ""), Text(by_kind, style="red"))
        rows.add_row("due", f"{progress.offered:,}", f"generator late by {time_text(progress.lag_ms * 1e6)} (p99)")
        return Group(self._bar(progress), rows)

    def _bar(self, progress: Progress) -> RenderableType:
        line = Table.grid(padding=(0, 2))
        done = min(max(progress.at, 0.0), progress.seconds)
        bar = ProgressBar(total=progress.seconds, completed=done, width=40)
        where = f"{moment(progress)} of {seconds_text(progress.seconds)}"
        line.add_row(Text(progress.phase, style="bold"), bar, where)
        return line


class Pace:
    """The recent past of a run."""

    def __init__(self) -> None:
        self.rates: deque[float] = deque(maxlen=KEPT)
        self.p50s: deque[float] = deque(maxlen=KEPT)
        self.p99s: deque[float] = deque(maxlen=KEPT)
        self._last: tuple[float, int] | None = None

    @property
    def got(self) -> float:
        """2xx replies a second, since the report before."""
        return self.rates[-1] if self.rates else 0.0

    def add(self, progress: Progress) -> None:
        """One more report."""
        if self._last is not None:
            seconds = progress.at - self._last[0]
            if seconds <= 0:
                return
            self.rates.append(max(0.0, (progress.ok - self._last[1]) / seconds))
        self._last = progress.at, progress.ok
        self.p50s.append(progress.p50_ms)
        self.p99s.append(progress.p99_ms)


def moment(progress: Progress) -> str:
    """Where the run is."""
    if progress.at < 0:
        return f"{seconds_text(round(-progress.at))} before the first"
    return seconds_text(round(min(progress.at, progress.seconds)))


def offered_rate(scenario: Scenario, at: float) -> float | None:
    """Requests a second that are due in second `at`; None where no rate says that."""
    if scenario.mode == "closed" or scenario.clock is not None:
        return None
    begin = -scenario.warmup_seconds
    for phase in scenario.phases:
        if at < begin + phase.seconds:
            done = max(0.0, at - begin) / phase.seconds
            return phase.rate if phase.rate_to is None else phase.rate + done * (phase.rate_to - phase.rate)
        begin += phase.seconds
    return 0.0


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from 0 to the largest; nothing for nothing."""
    top = max(values, default=0.0)
    if not top:
        return BARS[0] * len(values)
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * value / top))] for value in values)


def make_live(scenario: Scenario, *, silent: bool = False, stream: TextIO | None = None) -> Live:
    """What fits: nothing when `silent`, a moving picture when the stream (stderr) is a terminal, else plain lines."""
    if silent:
        return Live()
    stream = stream or sys.stderr
    return Terminal(scenario, stream) if stream.isatty() else PlainLines(scenario, stream)


def _ms(milliseconds: float) -> str:
    return time_text(milliseconds * 1e6) if milliseconds else "none"
