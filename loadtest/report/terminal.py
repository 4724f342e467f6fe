"""What a load test found, for people at a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from embstore.common.render import columns
from embstore.common.units import bytes_text, rate_text, seconds_text, share_text, time_text
from loadtest.results.compare import Comparison, Figure
from loadtest.results.result import Result
from loadtest.results.summary import to_summary
from loadtest.search.outcome import SearchResult

GOOD, BAD, WARN, SOFT = "bold green", "bold red", "yellow", "dim"
JUDGED = {"pass": GOOD, "fail": BAD, "inconclusive": WARN, "invalid": WARN}
VERDICTS = {"better": GOOD, "worse": BAD, "mixed": "bold yellow"}
IN_COLUMNS = ("p50 ", "p99 ", "error_rate ", "goodput ")
STYLES = {"pass": "green", "fail": "red", "inconclusive": WARN, "invalid": WARN}
VERDICT_WIDTH = len("difference")
"""The longest word of a verdict: they break between words, not inside."""
WIDE = 100
"""Columns of a terminal on which the whole table of figures has room."""


def report(result: Result) -> RenderableType:
    """Everything worth knowing at the end of a run; whether to believe it comes last, where people look."""
    summary = to_summary(result)
    parts: list[RenderableType] = [_head(summary), Figures(summary)]
    if summary["errors"]:
        parts += _errors(summary)
    if summary["versions"]:
        parts.append(_versions(summary))
    if summary["events"]:
        parts.append(_events(summary))
    about = (("server:", _server(summary["server"])), ("generator:", _generator(summary["generator"])))
    parts += [*hanging([(who, "", said) for who, said in about]), *_verdict(summary)]
    return Group(*parts)


def compared(comparison: Comparison) -> RenderableType:
    """What changed between two sides, and how sure that is."""
    shown = columns("", ">before", ">after", ">change", ">interval", "verdict")
    for one in comparison.figures:
        values = [_value(one.name, value) for value in (one.before, one.after)]
        change = "" if one.change is None else "{} {}".format(*_change(one, one.change))
        verdict = Text(one.verdict, style=VERDICTS.get(one.verdict, SOFT))
        shown.add_row(one.name.replace("_", " "), *values, change, _interval(one), verdict)
    shown.columns[0].no_wrap, shown.columns[-1].min_width = True, VERDICT_WIDTH
    notes = [("note", WARN, line) for line in comparison.warnings]
    notes += [("note", BAD, f"another load: {line}") for line in comparison.differences]
    runs = "{} before, {} after".format(*(f"{n} run" + "s" * (n > 1) for n in comparison.runs))
    last = Text.assemble(("verdict: ", "bold"), (comparison.verdict, VERDICTS.get(comparison.verdict, "bold")))
    head = Text(f"{runs}; all intervals together are right in 95 % of comparisons")
    return Group(head, shown, *hanging(notes), last)


def searched(found: SearchResult) -> RenderableType:
    """The search as a table, its outcome below."""
    shown = columns(">rate/s", ">p50 ms", ">p99 ms", ">errors", ">goodput/s", "run to", "SLO", "")
    notes: dict[str, str] = {}
    for run in found.runs:
        times = (f"{run.rate:,.1f}", f"{run.p50_ms:.2f}", f"{run.p99_ms:.2f}", f"{run.error_rate:.2%}")
        others = [figure for figure in run.figures if not figure.startswith(IN_COLUMNS)]
        if run.verdict in ("inconclusive", "invalid"):  # many for one reason: said once, below, of the first of them
            reason = re.sub(r"[\d.,]+", "", run.reason)
            others = [notes.setdefault(reason, f"[{len(notes) + 1}] {run.reason}").split()[0]]
        verdict = Text(run.verdict, style=STYLES[run.verdict])
        shown.add_row(*times, f"{run.goodput:,.1f}", run.stage, verdict, Text(", ".join(others)))
    below = [note.partition(" ") for note in notes.values()]
    return Group(shown, *hanging([(number, "", reason) for number, _, reason in below]), Text(found.note))


def _value(name: str, value: float | None) -> str:
    if name == "goodput":
        return "none" if value is None else rate_text(value)
    return share_text(value or 0.0) if name == "error_rate" else ms(value)


def _interval(figure: Figure) -> str:
    """From where to where the change lies, a unit that both have said once."""
    if figure.low is None or figure.high is None:
        return ""
    (low, unit), (high, last) = _change(figure, figure.low), _change(figure, figure.high)
    return f"{low} to {high} {last}" if unit == last else f"{low} {unit} to {high} {last}"


def _change(figure: Figure, value: float) -> tuple[str, str]:
    """A ratio as percent more or less, with its unit; of the share of errors, percentage points (pts)."""
    if figure.name == "error_rate":
        return f"{100 * value:+.2f}", "pts"
    return (f"{100 * (value - 1):+.1f}", "%") if value < 10 else (f"{value:.3g}", "times")


def hanging(lines: Sequence[tuple[str, str, str]]) -> list[Table]:
    """Lines of a word, its style and a text; what does not fit goes on below the text. Nothing for nothing."""
    if not lines:
        return []
    shown = Table.grid(padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for word, style, text in lines:
        shown.add_row(Text(word, style=style), Text(text))
    return [shown]


def ms(milliseconds: float | None) -> str:
    """A time of a summary as text; none when nothing was counted."""
    return "none" if milliseconds is None else time_text(milliseconds * 1e6)


def _head(summary: dict[str, Any]) -> Text:
    mode = "open loop" if summary["mode"] == "open" else "closed loop"
    return Text.assemble(
        (summary["name"], "bold"), f"  {summary['url']}, {mode}, {seconds_text(summary['seconds'])} measured"
    )


class Figures:
    """The table of figures, with as many columns as the terminal has room for."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        times = ("p50", "p90", "p99", "p99.9", "max") if options.max_width >= WIDE else ("p50", "p99", "max")
        shown = columns("", ">due", ">2xx", ">errors", *(f">{name}" for name in times), ">service\np99")
        phases = [(f"{one['name']}, {seconds_text(one['end'] - one['begin'])}", one) for one in self.summary["phases"]]
        groups = [group for group in (phases, list(self.summary["kinds"].items())) if len(group) > 1]
        self._add(shown, "everything", self.summary["total"], times, style="bold")
        for group in groups:
            shown.add_section()
            for name, of in group:
                self._add(shown, name, of, times)
        yield shown

    def _add(self, shown: Table, name: str, of: dict[str, Any], times: tuple[str, ...], style: str = "") -> None:
        errors = Text(share_text(of["error_rate"]), style="red" if of["error_rate"] else "")
        rates = (rate_text(of["offered_per_s"]), rate_text(of["ok_per_s"]))
        figures = [ms(of["latency_ms"][one]) for one in times]
        shown.add_row(Text(name), *rates, errors, *figures, ms(of["service_ms"]["p99"]), style=style)


def _errors(summary: dict[str, Any]) -> list[RenderableType]:
    shown = columns("error", ">requests", ">of what was due")
    due = summary["total"]["offered"]
    for name, count in summary["errors"].items():
        shown.add_row(Text(name, style="red"), f"{count:,}", share_text(min(1.0, count / due)) if due else "")
    if summary["retry_after"]:
        return [shown, Text(f"{summary['retry_after']:,} of these replies said when to come back (Retry-After)\n")]
    return [shown]


def _versions(summary: dict[str, Any]) -> Table:
    shown = columns("table", ">version", ">replies", ">first", ">last")
    for one in summary["versions"]:
        times = (seconds_text(one["first"]), seconds_text(one["last"]))
        shown.add_row(Text(one["table"]), Text(one["version"]), f"{one['count']:,}", *times)
    return shown


def _events(summary: dict[str, Any]) -> Table:
    shown = columns(">at", "event", "end", ">took", "detail")
    for one in summary["events"]:
        end = Text("done") if one["ok"] else Text("failed", style="red")
        took = time_text(one["seconds"] * 1e9) if one["seconds"] else ""
        shown.add_row(seconds_text(one["at"]), Text(one["name"]), end, took, Text(one["detail"]))
    return shown


def _server(view: dict[str, Any]) -> str:
    """What the server itself counted, in a line."""
    if not view:
        return "its metrics were not read"
    said = [f"{view['lookups']:,.0f} lookups"] if "lookups" in view else []
    said += [f"its own {name} about {ms(view[f'{name}_ms'])}" for name in ("p50", "p99") if f"{name}_ms" in view]
    said += [f"{count:,.0f} refused ({reason})" for reason, count in view.get("rejected", {}).items()]
    said += [f"{share_text(share)} hits in the {tier} cache" for tier, share in view.get("cache_hits", {}).items()]
    if view.get("queue_depth_max"):
        said.append(f"up to {view['queue_depth_max']:,.0f} queued")
    if view.get("worker_restarts"):
        said.append(f"{view['worker_restarts']:,.0f} workers replaced")
    if "memory_max_bytes" in view:
        said.append(f"up to {bytes_text(view['memory_max_bytes'])} of memory")
    return ", ".join(said)


def _generator(found: dict[str, Any]) -> str:
    processes = "1 process" if found["processes"] == 1 else f"{found['processes']} processes"
    said = [f"{found['engine']} in {processes}", f"busiest {found['busy']:.0%} of a core"]
    if found["ceiling"]:
        said.append(f"ceiling {rate_text(found['ceiling'])}")
    if found["lag_p99_ms"] is not None:
        said.append(f"p99 of its lag {ms(found['lag_p99_ms'])}")
    if found["reconnects"]:
        said.append(f"{found['reconnects']:,} connections made again")
    if found["clock_jumps"]:
        said.append(f"{found['clock_jumps']:,} jumps of the clock")
    return ", ".join(said)


def _verdict(summary: dict[str, Any]) -> list[RenderableType]:
    """Conditions, warnings, and whether the figures say anything."""
    judged = [(one["verdict"], f"{one['condition']}: {one['found']}") for one in summary["fail_if"]]
    lines = [(verdict, JUDGED[verdict], said) for verdict, said in judged]
    lines += [("note", WARN, line) for line in summary["warnings"]]
    found: list[RenderableType] = [*hanging(lines)]
    if summary["invalid"]:
        late = "GENERATOR LAG: latencies are upper bounds, because"
        none = "INVALID: these figures say nothing about the server, because"
        found.append(Text(late, style=f"bold {WARN}") if summary["upper_bounds"] else Text(none, style=BAD))
        style = WARN if summary["upper_bounds"] else "red"
        found += [Padding(Text(reason, style=style), (0, 0, 0, 2)) for reason in summary["invalid"]]
    elif summary["partial"]:
        found.append(Text("partial: the run was interrupted", style=WARN))
    else:
        found.append(Text("valid: the generator kept up", style=GOOD))
    return found
