"""From the flags of the command line to a scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Event, Phase, RequestSpec, Scenario

WARMUP_SECONDS = 1.0
"""Without a scenario file: connections are opened and code is warm before anything counts."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the command line may say; None: nothing was said."""

    url: str | None = None
    tables: Sequence[str] = ()
    rate: float | None = None
    seconds: float | None = None
    warmup: float | None = None
    batch: int | None = None
    protocol: str | None = None
    zipf: float | None = None
    engine: str | None = None
    processes: int | None = None
    fail_if: Sequence[str] = ()


def effective(path: Path | None, overrides: Sequence[str], flags: Flags) -> Scenario:
    """The scenario of a file or the default one, then `--set`, then the flags; not yet checked."""
    from loadtest.scenario.toml import read_scenario

    scenario = read_scenario(path, overrides)
    named = {"url": flags.url, "engine": flags.engine, "processes": flags.processes}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    changes["fail_if"] = (*scenario.fail_if, *flags.fail_if)
    made = replace(
        scenario, **changes, requests=_requests(scenario.requests, flags), phases=_phases(scenario, flags, path)
    )
    return replace(made, events=_events(scenario, made.seconds))


def _requests(requests: tuple[RequestSpec, ...], flags: Flags) -> tuple[RequestSpec, ...]:
    changes: dict[str, Any] = {}
    if flags.tables:
        changes["tables"] = tuple(flags.tables)
    if flags.protocol is not None:
        changes["protocol"] = flags.protocol
    if not changes and flags.batch is None and flags.zipf is None:
        return requests
    if len(requests) != 1:
        raise ScenarioError(
            f"--table, --protocol, --batch and --zipf are for scenarios with one kind of request, this one has "
            f"{len(requests)}; use --set, as in --set requests.0.batch.size=100"
        )
    (spec,) = requests
    if flags.batch is not None:
        changes["batch"] = replace(spec.batch, kind="fixed", size=flags.batch)
    if flags.zipf is not None:
        changes["ids"] = replace(spec.ids, kind="zipf", exponent=flags.zipf)
    return (replace(spec, **changes),)


def _phases(scenario: Scenario, flags: Flags, path: Path | None) -> tuple[Phase, ...]:
    """Rates and lengths in proportion, where there are several; another warm-up before them."""
    phases = scenario.phases
    if flags.rate is not None:
        peak = max((max(phase.rate, phase.rate_to or 0.0) for phase in phases), default=0.0)
        if peak <= 0:
            raise ScenarioError("--rate scales the rates of the phases, and all of them are 0")
        phases = tuple(_faster(phase, flags.rate / peak) for phase in phases)
    if flags.seconds is not None and scenario.seconds > 0:
        factor = flags.seconds / scenario.seconds
        phases = tuple(p if p.warmup else replace(p, seconds=p.seconds * factor) for p in phases)
    warmup_seconds = flags.warmup
    if warmup_seconds is None and path is None and not any(phase.warmup for phase in phases):
        warmup_seconds = WARMUP_SECONDS
    if warmup_seconds is not None:
        measured = tuple(phase for phase in phases if not phase.warmup)
        first = measured[0].rate if measured else 0.0
        warmup = Phase(name="warm-up", seconds=warmup_seconds, rate=first, warmup=True)
        phases = (warmup, *measured) if warmup_seconds else measured
    return phases


def _events(scenario: Scenario, seconds: float) -> tuple[Event, ...]:
    """Each at the share of all that is measured at which it was, when that takes so many seconds now."""
    if seconds == scenario.seconds or scenario.seconds <= 0:
        return scenario.events
    return tuple(replace(event, at=event.at / scenario.seconds * seconds) for event in scenario.events)


def _faster(phase: Phase, factor: float) -> Phase:
    return replace(phase, rate=phase.rate * factor, rate_to=phase.rate_to and phase.rate_to * factor)
