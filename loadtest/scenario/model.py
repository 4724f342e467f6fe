"""A load test as plain values: target, requests, schedule, events. `toml` reads it from a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta, Struct

from loadtest.scenario.decode import decode

Protocol = Literal["octet", "json", "infer"]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, lt=1e12)]
NotNegative = Annotated[float, Meta(ge=0, lt=1e12)]
Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=10_000_000)]
Size = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\\Z")]
OptionalName = Annotated[str, Meta(pattern="^([A-Za-z0-9][A-Za-z0-9_.-]{0,127})?\\Z")]
OptionalNumber = Annotated[str, Meta(pattern="^([1-9][0-9]{0,17})?\\Z")]


class IdDistribution(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    num_ids: Count = 0
    exponent: NotNegative = 1.05
    hot_ids: Size = 1000
    hot_share: Share = 0.9
    drift: NotNegative = 0.0
    file: str = ""
    column: Annotated[str, Meta(min_length=1)] = "item_id"
    as_recorded: bool = False
    time_column: str = ""
    speed: Positive = 1.0


class Batch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many ids a request has: `fixed` (`size`), `uniform` (`min` to `max`), `lognormal` (median `size`, sigma,
    cut at `max`), or `choice` (`sizes` with `weights`)."""

    kind: Literal["fixed", "uniform", "lognormal", "choice"] = "fixed"
    size: Size = 100
    min: Size = 1
    max: Size = 4096
    sigma: NotNegative = 1.0
    sizes: tuple[Size, ...] = ()
    weights: tuple[NotNegative, ...] = ()


class RequestSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of request and its share of all: `weight` against the weights of the others.

    tables: one name: a lookup of that table; several: all of them in one request, each with ids of its own.
    version, label: of one table; release: of several. Empty: the newest. name: what reports call it.
    """

    tables: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("item",)
    protocol: Protocol = "octet"
    weight: NotNegative = 1.0
    ids: IdDistribution = IdDistribution()
    batch: Batch = Batch()
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    on_missing: Literal["zero", "default", "error", "hash"] = "zero"
    version: OptionalNumber = ""
    label: OptionalName = ""
    release: OptionalNumber = ""
    name: str = ""

    @property
    def kind(self) -> str:
        """What reports call it."""
        return self.name or f"{self.protocol} {'+'.join(self.tables)}"


class Phase(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the schedule: requests a second go evenly from `rate` to `rate_to` (None: they stay).

    warmup: the same load, but not part of the figures; only at the beginning. rate 0: nothing is sent.
    In a closed loop rates mean nothing.
    """

    name: str = "load"
    seconds: Positive = 10.0
    rate: Rate = 100.0
    rate_to: Rate | None = None
    warmup: bool = False


class Event(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that happens `at` seconds after the measurement began.

    kind: `publish` (a further version of `table` in `store`, with the same rows), `promote` (label, version),
        `signal` (`signal` to `pid`, or to the process whose id is in `pid_file`), `command` (a program and its
        arguments, no shell), or `mark` (nothing; a line in the plots).
    """

    at: NotNegative
    kind: Literal["publish", "promote", "signal", "command", "mark"] = "mark"
    name: str = ""
    store: str = ""
    table: str = ""
    label: str = ""
    version: str = ""
    signal: str = "SIGKILL"
    pid: Count = 0
    pid_file: str = ""
    command: tuple[str, ...] = ()


class Scenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    engine: Literal["httpx", "raw"] = "httpx"
    mode: Literal["open", "closed"] = "open"
    arrivals: Literal["poisson", "constant"] = "poisson"
    phases: Annotated[tuple[Phase, ...], Meta(min_length=1)] = (Phase(),)
    requests: Annotated[tuple[RequestSpec, ...], Meta(min_length=1)] = (RequestSpec(),)
    events: tuple[Event, ...] = ()
    connections: Size = 64
    processes: Size = 1
    timeout: Positive = 5.0
    seed: Count = 0
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
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """What `to_json` gave, also after a trip through JSON; ScenarioError names a field that is wrong."""
        return decode(values, cls)
