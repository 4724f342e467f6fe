"""What a search for the highest rate found: its runs, the two rates that the limit lies between, how sure that is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Verdict = Literal["pass", "fail", "inconclusive", "invalid"]
"""`inconclusive`: generator lag may be the reason; `invalid`: the run is invalid for another one."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Stage = Literal["search", "confirm"]
Limit = Literal["", "lowest", "highest", "generator", "runs", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: to `search` or to `confirm`; figures: what each condition looked at; reason: why the run is invalid."""

    rate: float
    stage: Stage
    verdict: Verdict
    figures: list[str]
    p50_ms: float
    p99_ms: float
    error_rate: float
    goodput: float
    reason: str = ""


@dataclass(kw_only=True)
class SearchResult:
    """What a search found.

    low: a rate that keeps the SLO (0: none was found), high: one that breaks it (None: none was found), rate: about
    where the limit lies between them. confidence: the probability that it does, or that what was found of the two is
    right. limit: what ended the search otherwise: the `lowest` rate breaks the SLO, the `highest` keeps it, the
    `generator` cannot make the rates next to `low`, there were too many `runs`, one `failed` (`failure` says how), or
    the search was `interrupted`.
    """

    slo: list[str]
    rate: float = 0.0
    low: float = 0.0
    high: float | None = None
    confidence: float = 0.0
    limit: Limit = ""
    failure: str = ""
    note: str = ""
    runs: list[Trial] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def describe(found: SearchResult, *, min_rate: float, max_rate: float) -> str:
    """What was found among rates from `min_rate` to `max_rate`, in a sentence."""
    slo, sure = " and ".join(found.slo), f"(confidence {math.floor(100 * found.confidence)} %)"
    low, high = (f"{_rate(rate or 0.0)} requests/s" for rate in (found.low, found.high))
    if found.limit in ("interrupted", "runs", "failed"):
        ends = {"runs": f"no end after {len(found.runs)} runs", "failed": f"a run failed ({found.failure})"}
        so_far = f"{low} passed {slo} so far, not confirmed" if found.low else "nothing found yet"
        return f"{ends.get(found.limit, found.limit)}: {so_far}"
    if found.limit == "lowest":
        return (
            f"SLO not met: {high} already violates {slo} {sure}; no passing rate found down to {min_rate:g} requests/s"
        )
    if found.limit == "highest":
        return f"{low} meets {slo} {sure}; no failing rate found up to {_rate(max_rate)} requests/s"
    if found.limit == "generator":
        why = "the generator is too slow or its machine too busy"
        if found.high and found.low:
            return f"{low} meets {slo}, {high} violates it {sure}; runs in between were invalid: {why}"
        if found.high:
            return f"{high} violates {slo} {sure}; runs at lower rates were invalid: {why}"
        if not found.low:
            return f"no rate could be judged: every run was invalid, {why}"
        return f"{low} meets {slo} {sure}; the server may do more, but this generator cannot produce a higher rate"
    return f"the limit is about {_rate(found.rate)} requests/s: {low} meets {slo}, {high} violates it {sure}"


def _rate(rate: float) -> str:
    """Four digits at least, no exponent."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"
