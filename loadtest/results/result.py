"""What a load test found, whole: every second, every kind of request, what happened meanwhile, whether to trust it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

import msgspec

from loadtest.results.tally import Tally
from loadtest.scenario.model import Scenario

FORMAT = 1


@dataclass(kw_only=True)
class Mark:
    """An event of the run: `at` seconds after the measurement began, for `seconds`."""

    at: float
    name: str
    detail: str = ""
    ok: bool = True
    seconds: float = 0.0


@dataclass(kw_only=True)
class Sample:
    """Metrics of the server at one moment: series name with labels, as the server prints it -> value."""

    at: float
    values: dict[str, float]


@dataclass(kw_only=True)
class Seen:
    """A version that answered: the table, or `release` for releases; first and last second, and how often."""

    table: str
    version: str
    first: float
    last: float
    count: int


@dataclass(kw_only=True)
class Generator:
    """How the generator itself did: busy is the share of a core of its busiest process, ceiling the requests a second
    that one run of calibration against a server that does nothing reached (0: not calibrated)."""

    engine: str
    processes: int
    busy: float = 0.0
    ceiling: float = 0.0
    reconnects: int = 0
    clock_jumps: int = 0


@dataclass(kw_only=True)
class Result:
    """A run.

    began: unix time of second 0; seconds: how long was measured, less than planned when `partial` (interrupted).
    tallies: by whole second of the intended start, and by kind of request. Second 0 is the first after the warm-up.
    invalid: why the figures say nothing about the server (or, of a late generator, are upper bounds); empty: they do.
    machine: where the generator ran.
    """

    scenario: Scenario
    machine: dict[str, Any]
    began: float
    seconds: float
    generator: Generator
    partial: bool = False
    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    versions: list[Seen] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    def total(self, *, kind: str | None = None, since: float = 0.0, until: float = float("inf")) -> Tally:
        """Everything, or one kind of request, or what was due from second `since` until before `until`, in one."""
        found = Tally()
        for (second, of), tally in self.tallies.items():
            if since <= second < until and kind in (None, of):
                found.merge(tally)
        return found

    def kinds(self) -> list[str]:
        """The kinds of requests, most frequent first."""
        counts: dict[str, int] = defaultdict(int)
        for (_, kind), tally in self.tallies.items():
            counts[kind] += tally.offered
        return sorted(counts, key=lambda kind: (-counts[kind], kind))

    def series(self) -> list[Tally]:
        """A tally for every second, empty ones too."""
        found = [Tally() for _ in range(1 + max((second for second, _ in self.tallies), default=-1))]
        for (second, _), tally in self.tallies.items():
            found[second].merge(tally)
        return found

    def windows(self) -> list[tuple[str, float, float]]:
        """Name, begin and end of every measured phase, in seconds."""
        found, at = [], 0.0
        for phase in self.scenario.phases:
            if not phase.warmup:
                found.append((phase.name, at, at + phase.seconds))
                at += phase.seconds
        return found

    @property
    def goodput(self) -> float:
        """2xx replies to what was due, a second."""
        return self.total().ok / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal result."""
        values = {name: msgspec.to_builtins(getattr(self, name)) for name in _types()}
        tallies = [{"second": second, "kind": kind} | tally.to_json() for (second, kind), tally in self.tallies.items()]
        return {"format": FORMAT} | values | {"tallies": tallies}

    @classmethod
    def from_json(cls, value: Any) -> Result:
        """What `to_json` gave; ValueError for another format, or for what is no result."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"no result of a load test in format {FORMAT}")
        try:
            values = {name: msgspec.convert(value[name], of) for name, of in _types().items()}
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        tallies = {(tally["second"], tally["kind"]): Tally.from_json(tally) for tally in value["tallies"]}
        return cls(**values, tallies=tallies)


@cache
def _types() -> dict[str, Any]:
    """The fields that msgspec reads and writes; tallies have a form of their own."""
    return {name: of for name, of in get_type_hints(Result).items() if name != "tallies"}
