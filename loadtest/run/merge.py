"""What all generator processes found, as one result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from embstore.common import machine
from loadtest.generator.recorder import SECOND
from loadtest.results.result import Generator, Mark, Result, Seen
from loadtest.results.tally import Tally
from loadtest.results.validity import invalid_reasons
from loadtest.scenario.model import Scenario


def gather(scenario: Scenario, parts: Sequence[dict[str, Any]], begin: int, ceiling: float) -> Result:
    """One result of what processes reported that began second 0 at `begin` (0: they were stopped before)."""
    generator = Generator(
        engine=scenario.engine,
        processes=scenario.processes,
        busy=max(part["busy"] for part in parts),
        ceiling=ceiling,
        reconnects=sum(part["reconnects"] for part in parts),
        clock_jumps=max(part["clock_jumps"] for part in parts),
    )
    result = Result(
        scenario=scenario,
        machine=machine.describe("httpx", "numpy", "uvloop"),
        began=time.time() + (begin - time.perf_counter_ns()) / SECOND if begin else time.time(),
        seconds=max(part["seconds"] for part in parts),
        generator=generator,
        partial=any(part["stopped"] for part in parts),
        versions=_versions(parts),
        marks=_marks(parts),
    )
    for part in parts:
        for second, kind, tally in part["tallies"]:
            result.tallies.setdefault((second, kind), Tally()).merge(Tally.from_json(tally))
    result.tallies = dict(sorted(result.tallies.items()))
    result.invalid = invalid_reasons(result, parts)
    return result


def _versions(parts: Sequence[dict[str, Any]]) -> list[Seen]:
    found: dict[tuple[str, str], Seen] = {}
    for part in parts:
        for table, version, first, last, count in part["versions"]:
            seen = found.setdefault(
                (table, version), Seen(table=table, version=version, first=first, last=last, count=0)
            )
            seen.first, seen.last = min(seen.first, first), max(seen.last, last)
            seen.count += count
    return sorted(found.values(), key=lambda seen: (seen.table, seen.first))


def _marks(parts: Sequence[dict[str, Any]]) -> list[Mark]:
    """What people should know: about the requests, and the first reply that was none to its request."""
    notes = dict.fromkeys(note for part in parts for note in part["notes"])
    problems = sorted(tuple(part["first_problem"]) for part in parts if part["first_problem"])
    marks = [Mark(at=0.0, name="note", detail=note) for note in notes]
    return marks + [Mark(at=at, name="mislabelled", detail=detail, ok=False) for at, detail in problems[:1]]
