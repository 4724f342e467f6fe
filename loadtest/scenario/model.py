"""A load test as plain values: target, requests, schedule, events. `toml_file` reads it from a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Protocol = Literal["octet", "json", "infer"]
Engine = Literal["httpx", "raw"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True, kw_only=True)
class IdDistribution:
    """Which ids requests have.

    kind: `zipf` (the k-th most frequent id with probability ~ k ** -exponent), `uniform`, `hot` (a share `hot_share`
        of the accesses goes to `hot_ids` ids, and that set moves on by `drift` of its size a minute), or `replay`.
    num_ids: ids are drawn from [0, num_ids); 0: as many as the server says that the table has.
    file, column: a Parquet file and its column of ids, integers or strings. `replay` sends them in their order;
        the other kinds draw from the different ones there are, for tables whose ids are no range.
    as_recorded: replay integers even when they lie beyond the table's; else they are then numbered anew.
    time_column, speed: for `replay`: a column of times in milliseconds; requests are due when it says, `speed` times
        as fast: one for every `batch.size` rows, when the last of them came. Then phases only say how long.
    """

    kind: Literal["zipf", "uniform", "hot", "replay"] = "zipf"
    num_ids: int = 0
    exponent: float = 1.05
    hot_ids: int = 1000
    hot_share: float = 0.9
    drift: float = 0.0
    file: str = ""
    column: str = "item_id"
    as_recorded: bool = False
    time_column: str = ""
    speed: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many ids a request has: `fixed` (`size`), `uniform` (`min` to `max`), `lognormal` (median `size`, sigma,
    cut at `max`), or `choice` (`sizes` with `weights`)."""

    kind: Literal["fixed", "uniform", "lognormal", "choice"] = "fixed"
    size: int = 100
    min: int = 1
    max: int = 4096
    sigma: float = 1.0
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """One kind of request and its share of all: `weight` against the weights of the others.

    tables: one name: a lookup of that table; several: all of them in one request, each with ids of its own.
    version, label: of one table; release: of several. Empty: the newest. name: what reports call it.
    """

    tables: tuple[str, ...] = ("item",)
    protocol: Protocol = "octet"
    weight: float = 1.0
    ids: IdDistribution = IdDistribution()
    batch: Batch = Batch()
    dtype: str = "float32"
    on_missing: str = "zero"
    version: str = ""
    label: str = ""
    release: str = ""
    name: str = ""

    @property
    def kind(self) -> str:
        """What reports call it."""
        return self.name or f"{self.protocol} {'+'.join(self.tables)}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the schedule: requests a second go evenly from `rate` to `rate_to` (None: they stay).

    warmup: the same load, but not part of the figures; only at the beginning. rate 0: nothing is sent.
    In a closed loop rates mean nothing.
    """

    name: str = "load"
    seconds: float = 10.0
    rate: float = 100.0
    rate_to: float | None = None
    warmup: bool = False


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens `at` seconds after the measurement began.

    kind: `publish` (a further version of `table` in `store`, with the same rows), `promote` (label, version),
        `signal` (`signal` to `pid`, or to the process whose id is in `pid_file`), `command` (a program and its
        arguments, no shell), or `mark` (nothing; a line in the plots).
    """

    at: float
    kind: Literal["publish", "promote", "signal", "command", "mark"] = "mark"
    name: str = ""
    store: str = ""
    table: str = ""
    label: str = ""
    version: str = ""
    signal: str = "SIGKILL"
    pid: int = 0
    pid_file: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A whole load test.

    mode: `open`: requests are due on a schedule, whatever the server does, and latency runs from when they were due;
        `closed`: `connections` callers that each wait for their reply.
    connections: at most so many requests in flight, over all processes; one that finds none free waits, and that wait
        is part of its latency. timeout: seconds, from the intended start, after which a request has failed.
    insecure: do not verify TLS certificates; ca: a file of certificates to trust instead of the system's.
    scrape: read the server's /metrics once a second; fail_if: conditions like `p99>10ms`.
    """

    name: str = "load test"
    url: str = "http://127.0.0.1:8000"
    engine: Engine = "httpx"
    mode: Literal["open", "closed"] = "open"
    arrivals: Literal["poisson", "constant"] = "poisson"
    phases: tuple[Phase, ...] = (Phase(),)
    requests: tuple[RequestSpec, ...] = (RequestSpec(),)
    events: tuple[Event, ...] = ()
    connections: int = 64
    processes: int = 1
    timeout: float = 5.0
    seed: int = 0
    api_key_file: str = ""
    insecure: bool = False
    ca: str = ""
    scrape: bool = True
    fail_if: tuple[str, ...] = ()

    @property
    def warmup_seconds(self) -> float:
        """Seconds before the measurement begins."""
        return sum(phase.seconds for phase in self.phases if phase.warmup)

    @property
    def seconds(self) -> float:
        """Seconds that are measured."""
        return sum(phase.seconds for phase in self.phases if not phase.warmup)

    @property
    def clock(self) -> RequestSpec | None:
        """The spec whose recording says when requests are due, where one does."""
        timed = [spec for spec in self.requests if spec.ids.kind == "replay" and spec.ids.time_column]
        return timed[0] if timed else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal scenario."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scenario:
        """What `to_json` gave, also after a trip through JSON (lists for tuples)."""
        requests = [
            RequestSpec(
                **_tuples(spec) | {"ids": IdDistribution(**spec["ids"]), "batch": Batch(**_tuples(spec["batch"]))}
            )
            for spec in value["requests"]
        ]
        phases = [Phase(**phase) for phase in value["phases"]]
        events = [Event(**_tuples(event)) for event in value["events"]]
        parts = {"requests": tuple(requests), "phases": tuple(phases), "events": tuple(events)}
        return cls(**_tuples(value) | parts)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(of) if isinstance(of, list) else of for name, of in value.items()}
