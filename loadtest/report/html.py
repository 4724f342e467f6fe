"""A load test as one HTML file: no network, no script; what to believe first, then figures, then plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from embstore.common.units import bytes_text, rate_text, seconds_text, share_text, time_text
from loadtest.report import style
from loadtest.report.charts import Chart, Charts
from loadtest.results.result import Result
from loadtest.results.summary import to_summary
from loadtest.scenario.model import Batch, IdDistribution, RequestSpec, Scenario

Row = Sequence[str]


def to_html(result: Result) -> str:
    """The whole page."""
    summary, charts = to_summary(result), Charts(result)
    scenario = result.scenario
    began = datetime.fromtimestamp(result.began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    how = "open loop" if scenario.mode == "open" else "closed loop"
    where = f"{scenario.url} · {how} · {scenario.engine} · {seconds_text(result.seconds)} · {began}"
    server = charts.server()
    parts = [
        f"<header><h1>{escape(scenario.name)}</h1><p class='soft'>{escape(where)}</p></header>",
        _verdict(summary),
        _cards(summary),
        "<h2>Figures</h2>",
        _figures(summary),
        _failures(summary),
        "<h2>What callers saw</h2>",
        *map(_figure, charts.client()),
        _events(summary),
        _section("What the server says", server, _server(summary["server"])),
        _section("The generator", charts.generator(), _generator(summary["generator"])),
        "<h2>Scenario</h2>",
        _scenario(scenario),
        "<h2>Machine of the generator</h2>",
        _pairs([(name, _plain(value)) for name, value in result.machine.items()]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(scenario.name)}: load test</title><style>{style.page()}</style></head>\n"
        f"<body>{chr(10).join(part for part in parts if part)}</body></html>\n"
    )


def _verdict(summary: dict[str, Any]) -> str:
    """Whether to believe what follows, and whether it was good enough."""
    invalid, warned = summary["invalid"], summary["warnings"]
    held = [one for one in summary["fail_if"] if one["verdict"] == "fail"]
    lines = [escape(line) for line in [*invalid, *warned]]
    for one in summary["fail_if"]:
        said = escape(f"{one['condition']}: {one['found']}, {one['verdict']}")
        lines.append(f"<span class='no'>{said}</span>" if one in held else said)
    if invalid and not summary["upper_bounds"]:
        title, kind = "Invalid: these figures say nothing about the server", "bad"
    elif held:
        title, kind = "Failed: " + " and ".join(one["condition"] for one in held), "bad"
    elif summary["upper_bounds"]:
        title, kind = "Generator lag: latencies are upper bounds", "warn"
    elif summary["partial"]:
        title, kind = "Partial: the run was interrupted", "warn"
    else:
        title, kind = "Valid: the generator kept up" + (", and every condition passed" * bool(summary["fail_if"])), ""
        kind = "warn" if warned else kind
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<div class='verdict {kind}'><strong>{escape(title)}</strong>{f'<ul>{items}</ul>' * bool(items)}</div>"


def _cards(summary: dict[str, Any]) -> str:
    total = summary["total"]
    times = [(f"{name} latency", _ms(total["latency_ms"][name])) for name in ("p50", "p99", "p99.9")]
    cards = [
        ("good replies", rate_text(total["ok_per_s"])),
        *times,
        ("p99 service time", _ms(total["service_ms"]["p99"])),
        ("errors", share_text(total["error_rate"])),
    ]
    return (
        f"<div class='cards'>{''.join(f'<div><span>{name}</span><b>{value}</b></div>' for name, value in cards)}</div>"
    )


def _figures(summary: dict[str, Any]) -> str:
    phases = [(f"{one['name']} ({seconds_text(one['end'] - one['begin'])})", one) for one in summary["phases"]]
    heads = ("", "due", "2xx", "errors", "p50", "p90", "p99", "p99.9", "max", "service p99", "bytes")
    rows = [_figures_row("everything", summary["total"])]
    for title, group in (("by phase", phases), ("by kind of request", list(summary["kinds"].items()))):
        if len(group) > 1:
            rows += [(title,), *(_figures_row(name, of) for name, of in group)]
    return _table(heads, rows, numbers=range(1, len(heads)), first_bold=True)


def _figures_row(name: str, of: dict[str, Any]) -> Row:
    times = [_ms(of["latency_ms"][key]) for key in ("p50", "p90", "p99", "p99.9", "max")]
    rates = [rate_text(of["offered_per_s"]), rate_text(of["ok_per_s"]), share_text(of["error_rate"])]
    return [name, *rates, *times, _ms(of["service_ms"]["p99"]), bytes_text(of["bytes_per_s"]) + "/s"]


def _failures(summary: dict[str, Any]) -> str:
    if not summary["errors"]:
        return ""
    due = summary["total"]["offered"] or 1
    rows = [[name, f"{count:,}", share_text(min(1.0, count / due))] for name, count in summary["errors"].items()]
    return _table(("error", "requests", "of what was due"), rows, numbers=(1, 2))


def _events(summary: dict[str, Any]) -> str:
    if not summary["events"]:
        return ""
    rows = [
        [seconds_text(one["at"]), one["name"], "done" if one["ok"] else "failed", _took(one["seconds"]), one["detail"]]
        for one in summary["events"]
    ]
    return "<h2>Events</h2>" + _table(("at", "event", "end", "took", "detail"), rows, numbers=(0, 3))


def _server(view: dict[str, Any]) -> str:
    """What the server counted over the whole run."""
    rows = [("lookups", f"{view['lookups']:,.0f}")] if "lookups" in view else []
    rows += [(f"{name} of a lookup", _ms(view[f"{name}_ms"])) for name in ("p50", "p99") if f"{name}_ms" in view]
    rows += [(f"ids {status}", f"{count:,.0f}") for status, count in view.get("ids", {}).items()]
    rows += [(f"refused: {reason}", f"{count:,.0f}") for reason, count in view.get("rejected", {}).items()]
    rows += [(f"cache hits, {tier}", share_text(share)) for tier, share in view.get("cache_hits", {}).items()]
    for name, text in (("inflight_max", "most in flight"), ("queue_depth_max", "longest queue")):
        rows += [(text + ", at a sample", f"{view[name]:,.0f}")] if name in view else []
    for name, text in (("swaps", "changes of what is served"), ("worker_restarts", "workers replaced")):
        rows += [(text, f"{view[name]:,.0f}")] if name in view else []
    for name, text in (("memory_max_bytes", "memory, most"), ("table_bytes_max", "tables, most")):
        rows += [(text, bytes_text(view[name]))] if name in view else []
    return _pairs(rows) if rows else ""


def _generator(found: dict[str, Any]) -> str:
    rows = [
        ("engine", f"{found['engine']}, {found['processes']} processes".replace("1 processes", "1 process")),
        ("busiest process", f"{found['busy']:.0%} of a core"),
        ("ceiling", rate_text(found["ceiling"]) if found["ceiling"] else "not calibrated"),
        ("p99 of its lag", _ms(found["lag_p99_ms"])),
        ("requests that waited for a connection", f"{found['queued']:,}"),
        ("connections lost and made again", f"{found['reconnects']:,}"),
        ("jumps of the clock", f"{found['clock_jumps']:,}"),
    ]
    return _pairs(rows)


def _scenario(scenario: Scenario) -> str:
    """The scenario, in full."""
    left_out = ("phases", "requests", "events", "name", "api_key_file")
    values = {name: value for name, value in scenario.to_json().items() if name not in left_out}
    requests = [
        [
            spec.kind,
            "+".join(spec.tables),
            spec.protocol,
            f"{spec.weight:g}",
            _ids(spec.ids),
            _batch(spec.batch),
            _pinned(spec),
        ]
        for spec in scenario.requests
    ]
    phases = [
        [one.name + " (warm-up)" * one.warmup, seconds_text(one.seconds), rate_text(one.rate)]
        + ["" if one.rate_to is None else rate_text(one.rate_to)]
        for one in scenario.phases
    ]
    heads = ("requests", "tables", "protocol", "weight", "ids", "ids a request", "further")
    return (
        _table(heads, requests, numbers=(3,))
        + _table(("phase", "lasts", "rate", "rising or falling to"), phases, numbers=(1, 2, 3))
        + _pairs([(name.replace("_", " "), _plain(value)) for name, value in values.items()])
    )


def _ids(ids: IdDistribution) -> str:
    among = f" of {ids.num_ids:,}" if ids.num_ids else ""
    if ids.kind == "zipf":
        return f"Zipf {ids.exponent:g}{among}"
    if ids.kind == "hot":
        return f"{share_text(ids.hot_share)} from {ids.hot_ids:,} hot ids{among}, drift {ids.drift:g} a minute"
    if ids.kind == "replay":
        return f"replay of {ids.column} in {ids.file}" + (f", {ids.speed:g} times as fast" * bool(ids.time_column))
    return f"uniform{among}"


def _batch(batch: Batch) -> str:
    if batch.kind == "fixed":
        return f"{batch.size:,}"
    if batch.kind == "uniform":
        return f"{batch.min:,} to {batch.max:,}"
    if batch.kind == "lognormal":
        return f"lognormal, median {batch.size:,}, sigma {batch.sigma:g}, at most {batch.max:,}"
    weights = batch.weights or (1.0,) * len(batch.sizes)
    return ", ".join(f"{size:,} ({weight:g})" for size, weight in zip(batch.sizes, weights, strict=True))


def _pinned(spec: RequestSpec) -> str:
    pins = [f"{name} {getattr(spec, name)}" for name in ("version", "label", "release") if getattr(spec, name)]
    return ", ".join([spec.dtype, f"missing: {spec.on_missing}", *pins])


def _section(title: str, charts: Sequence[Chart], before: str = "") -> str:
    if not charts and not before:
        return ""
    halves = "".join(_figure(chart) for chart in charts if chart.half)
    whole = "".join(_figure(chart) for chart in charts if not chart.half)
    return f"<h2>{escape(title)}</h2>{before}{whole}" + (f"<div class='halves'>{halves}</div>" if halves else "")


def _figure(chart: Chart) -> str:
    names = "".join(
        f"<li><i class='c{color}{' dashed' * dashed}'></i>{escape(name)}</li>" for name, color, dashed in chart.legend
    )
    legend = f"<ul class='legend'>{names}</ul>" if names else ""
    head = f"<h3>{escape(chart.title)}</h3><figcaption>{escape(chart.note)}</figcaption>"
    return f"<figure>{head}<div class='wide'>{chart.svg}</div>{legend}</figure>"


def _table(heads: Row, rows: Iterable[Row], *, numbers: Iterable[int] = (), first_bold: bool = False) -> str:
    right = {n: " class='n'" for n in numbers}
    head = "".join(f"<th{right.get(n, '')}>{escape(text)}</th>" for n, text in enumerate(heads))
    body = []
    for k, row in enumerate(rows):
        cells = "".join(f"<td{right.get(n, '')}>{escape(text)}</td>" for n, text in enumerate(row))
        if len(row) == 1 < len(heads):
            cells = f"<td class='group' colspan='{len(heads)}'>{escape(row[0])}</td>"
        body.append(f"<tr{' class=all' if first_bold and not k else ''}>{cells}</tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f"<dl>{body}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value) or "none"


def _ms(milliseconds: float | None) -> str:
    return "none" if milliseconds is None else time_text(milliseconds * 1e6)


def _took(seconds: float) -> str:
    return time_text(seconds * 1e9) if seconds else ""
