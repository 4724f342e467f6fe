"""A load test as one HTML file: no network, no script; what to believe first, then figures, then plots."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embstore.common.report.page import render
from embstore.common.units import bytes_text, rate_text, seconds_text, share_text, time_text
from loadtest.report.charts import Charts
from loadtest.results.result import Result
from loadtest.results.summary import to_summary
from loadtest.scenario.model import Batch, IdDistribution, RequestSpec, Scenario

Row = Sequence[str]


def to_html(result: Result) -> str:
    """The whole page."""
    summary, charts, scenario = to_summary(result), Charts(result), result.scenario
    began = datetime.fromtimestamp(result.began, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    how = "open loop" if scenario.mode == "open" else "closed loop"
    title, kind = _verdict(summary)
    return render(
        Path(__file__).with_name("page.html.j2"),
        title=f"{scenario.name}: load test",
        name=scenario.name,
        where=f"{scenario.url} · {how} · {scenario.engine} · {seconds_text(result.seconds)} · {began}",
        verdict={"title": title, "kind": kind, "lines": [*summary["invalid"], *summary["warnings"]]},
        conditions=summary["fail_if"],
        cards=_cards(summary),
        figures=_figures(summary),
        failures=_failures(summary),
        client_charts=charts.client(),
        events=_events(summary),
        server_charts=charts.server(),
        server=_server(summary["server"]),
        generator_charts=charts.generator(),
        generator=_generator(summary["generator"]),
        requests=_requests(scenario),
        phases=_phases(scenario),
        settings=_settings(scenario),
        machine=[(name, _plain(value)) for name, value in result.machine.items()],
    )


def _verdict(summary: dict[str, Any]) -> tuple[str, str]:
    """Whether to believe what follows, and whether it was good enough: a title and how it is coloured."""
    failed = [one["condition"] for one in summary["fail_if"] if one["verdict"] == "fail"]
    if summary["invalid"] and not summary["upper_bounds"]:
        return "Invalid: these figures say nothing about the server", "bad"
    if failed:
        return "Failed: " + " and ".join(failed), "bad"
    if summary["upper_bounds"]:
        return "Generator lag: latencies are upper bounds", "warn"
    if summary["partial"]:
        return "Partial: the run was interrupted", "warn"
    passed = ", and every condition passed" if summary["fail_if"] else ""
    return f"Valid: the generator kept up{passed}", "warn" if summary["warnings"] else ""


def _cards(summary: dict[str, Any]) -> list[tuple[str, str]]:
    total = summary["total"]
    return [
        ("good replies", rate_text(total["ok_per_s"])),
        *((f"{name} latency", _ms(total["latency_ms"][name])) for name in ("p50", "p99", "p99.9")),
        ("p99 service time", _ms(total["service_ms"]["p99"])),
        ("errors", share_text(total["error_rate"])),
    ]


def _figures(summary: dict[str, Any]) -> list[Row]:
    phases = [(f"{one['name']} ({seconds_text(one['end'] - one['begin'])})", one) for one in summary["phases"]]
    rows = [_figures_row("everything", summary["total"])]
    for title, group in (("by phase", phases), ("by kind of request", list(summary["kinds"].items()))):
        if len(group) > 1:
            rows += [(title,), *(_figures_row(name, of) for name, of in group)]
    return rows


def _figures_row(name: str, of: dict[str, Any]) -> Row:
    times = [_ms(of["latency_ms"][key]) for key in ("p50", "p90", "p99", "p99.9", "max")]
    rates = [rate_text(of["offered_per_s"]), rate_text(of["ok_per_s"]), share_text(of["error_rate"])]
    return [name, *rates, *times, _ms(of["service_ms"]["p99"]), bytes_text(of["bytes_per_s"]) + "/s"]


def _failures(summary: dict[str, Any]) -> list[Row]:
    due = summary["total"]["offered"] or 1
    return [(name, f"{count:,}", share_text(min(1.0, count / due))) for name, count in summary["errors"].items()]


def _events(summary: dict[str, Any]) -> list[Row]:
    return [
        (seconds_text(one["at"]), one["name"], "done" if one["ok"] else "failed", _took(one["seconds"]), one["detail"])
        for one in summary["events"]
    ]


def _server(view: dict[str, Any]) -> list[tuple[str, str]]:
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
    return rows


def _generator(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("engine", f"{found['engine']}, {found['processes']} processes".replace("1 processes", "1 process")),
        ("busiest process", f"{found['busy']:.0%} of a core"),
        ("ceiling", rate_text(found["ceiling"]) if found["ceiling"] else "not calibrated"),
        ("p99 of its lag", _ms(found["lag_p99_ms"])),
        ("requests that waited for a connection", f"{found['queued']:,}"),
        ("connections lost and made again", f"{found['reconnects']:,}"),
        ("jumps of the clock", f"{found['clock_jumps']:,}"),
    ]


def _requests(scenario: Scenario) -> list[Row]:
    return [
        (
            spec.kind,
            "+".join(spec.tables),
            spec.protocol,
            f"{spec.weight:g}",
            _ids(spec.ids),
            _batch(spec.batch),
            _pinned(spec),
        )
        for spec in scenario.requests
    ]


def _phases(scenario: Scenario) -> list[Row]:
    return [
        (
            one.name + " (warm-up)" * one.warmup,
            seconds_text(one.seconds),
            rate_text(one.rate),
            "" if one.rate_to is None else rate_text(one.rate_to),
        )
        for one in scenario.phases
    ]


def _settings(scenario: Scenario) -> list[tuple[str, str]]:
    left_out = ("phases", "requests", "events", "name", "api_key_file")
    values = scenario.to_json().items()
    return [(name.replace("_", " "), _plain(value)) for name, value in values if name not in left_out]


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
