"""What fields of a scenario must be to each other, and to the files that they name. Types and ranges are `model`'s."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.errors import ScenarioError
from loadtest.scenario.conditions import parse
from loadtest.scenario.model import Batch, Event, IdDistribution, RequestSpec, Scenario

DTYPES = {
    "octet": ("float32", "float16", "bfloat16", "int8"),
    "json": ("float32", "float16", "bfloat16"),
    "infer": ("float32", "float16"),
}


def check(scenario: Scenario) -> None:
    """Nothing, when the scenario can be run; else a ScenarioError: one line with the field and what would be right."""
    Scenario.from_json(scenario.to_json())  # flags may have set what no file could
    _check_server(scenario)
    few = f"connections must be at least processes, one for each: {scenario.connections} for {scenario.processes}"
    _must(scenario.connections >= scenario.processes, few)
    _check_phases(scenario)
    _check_requests(scenario)
    for at, event in enumerate(scenario.events):
        _check_event(event, f"events.{at}", scenario.seconds)
    for condition in scenario.fail_if:
        try:
            parse(condition)
        except ValueError as error:
            raise ScenarioError(f"fail_if: {error}") from None


def _must(right: bool, message: str) -> None:
    if not right:
        raise ScenarioError(message)


def _check_server(scenario: Scenario) -> None:
    try:
        parts = urlsplit(scenario.url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    _must(known, f"url must begin with http:// or https:// and a host, got {scenario.url!r}")
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment
    _must(bare, f"url must end after host and port: paths follow from requests; got {scenario.url!r}")
    secure = parts.scheme == "https"
    _must(secure or not scenario.insecure, "insecure is for https:// only, and url begins with http://")
    _must(secure or not scenario.ca, "ca is for https:// only, and url begins with http://")
    _must(not (scenario.insecure and scenario.ca), "insecure and ca exclude each other: set one of them")
    _must(not (secure and scenario.engine == "raw"), "engine raw speaks no TLS: use engine httpx for https://")
    _check_file("ca", scenario.ca)
    _check_file("api_key_file", scenario.api_key_file)


def _check_phases(scenario: Scenario) -> None:
    measured = [phase for phase in scenario.phases if not phase.warmup]
    _must(bool(measured), "phases are all warm-up: one at least must be measured")
    for at, phase in enumerate(scenario.phases[-len(measured) :], len(scenario.phases) - len(measured)):
        _must(not phase.warmup, f"phases.{at}.warmup: a warm-up comes before everything that is measured")
    if scenario.mode == "open" and scenario.clock is None:
        rates = [max(phase.rate, phase.rate_to or 0) for phase in measured]
        _must(max(rates) > 0, "phases: rate is 0 in all that are measured; one at least must send something")


def _check_requests(scenario: Scenario) -> None:
    requests = scenario.requests
    kinds: dict[str, int] = {}
    for at, spec in enumerate(requests):
        where = f"requests.{at}"
        _check_request(spec, where)
        first = kinds.setdefault(spec.kind, at)
        _must(first == at, f"{where}.name: requests.{first} is called {spec.kind!r} too; give each a name of its own")
    _must(sum(spec.weight for spec in requests) > 0, "requests: weight is 0 in all of them; one must be above 0")
    if scenario.clock is not None:
        at = requests.index(scenario.clock)
        column = f"requests.{at}.ids.time_column"
        _must(scenario.mode == "open", f"{column}: requests due at recorded times need mode open, not closed")
        alone = f"{column}: a recording with a clock must be the only one of requests, there are {len(requests)}"
        _must(len(requests) == 1, alone)
        fixed = scenario.clock.batch.kind == "fixed"
        _must(fixed, f"requests.{at}.batch.kind must be fixed where ids.time_column says when requests are due")


def _check_request(spec: RequestSpec, where: str) -> None:
    many = len(spec.tables) > 1
    _must(len(set(spec.tables)) == len(spec.tables), f"{where}.tables names a table twice")
    _must(not many or spec.protocol != "octet", f"{where}.protocol: octet has one table; for several use json or infer")
    alone = "model embstore is all tables together; use octet or json for a table of that name"
    _must(many or spec.protocol != "infer" or spec.tables[0] != "embstore", f"{where}.tables: {alone}")
    dtypes = DTYPES[spec.protocol]
    known = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
    _must(spec.dtype in dtypes, f"{where}.dtype of {spec.protocol} must be {known}, got {spec.dtype!r}")
    _must(not (spec.version and spec.label), f"{where}: version and label exclude each other: set one of them")
    if many:
        _must(not spec.version, f"{where}.version is of one table; for several set release")
        _must(not spec.label, f"{where}.label is of one table; for several set release")
    else:
        _must(not spec.release, f"{where}.release is of several tables; for one set version or label")
    _must(not (spec.label and spec.protocol == "infer"), f"{where}.label: infer knows versions only")
    _must(not many or not spec.ids.file, f"{where}.ids.file has the ids of one table, and tables names several")
    _check_ids(spec.ids, f"{where}.ids")
    _check_batch(spec.batch, f"{where}.batch")


def _check_ids(ids: IdDistribution, where: str) -> None:
    fits = ids.kind != "hot" or not ids.num_ids or ids.hot_ids < ids.num_ids
    _must(fits, f"{where}.hot_ids must be below num_ids {ids.num_ids}, got {ids.hot_ids}")
    _check_file(f"{where}.file", ids.file)
    if ids.kind == "replay":
        _must(bool(ids.file), f"{where}.file must name a Parquet file to replay")
    else:
        for name in ("time_column", "as_recorded"):
            _must(not getattr(ids, name), f"{where}.{name} is for kind replay only, kind is {ids.kind}")
        _must(not (ids.file and ids.num_ids), f"{where}: file says which ids there are; leave num_ids out")


def _check_batch(batch: Batch, where: str) -> None:
    if batch.kind == "uniform":
        _must(batch.min <= batch.max, f"{where}.min must not be above max, got {batch.min} and {batch.max}")
    elif batch.kind == "lognormal":
        _must(batch.size <= batch.max, f"{where}.size must not be above max, got {batch.size} and {batch.max}")
    elif batch.kind == "choice":
        sizes, weights = len(batch.sizes), batch.weights
        _must(sizes > 0, f"{where}.sizes is empty: name the sizes to choose from")
        same = len(weights) in (0, sizes)
        _must(same, f"{where}.weights: got {len(weights)} for {sizes} sizes; one for each, or none")
        _must(not weights or 0 < sum(weights) < math.inf, f"{where}.weights: one at least must be above 0")


def _check_event(event: Event, where: str, seconds: float) -> None:
    within = f"{where}.at must lie within the {seconds:g} seconds that are measured, got {event.at:g}"
    _must(event.at <= seconds, within)
    needed = {"publish": ("store", "table"), "promote": ("store", "table", "label", "version"), "command": ("command",)}
    for name in needed.get(event.kind, ()):
        _must(bool(getattr(event, name)), f"{where}.{name} is empty, and {event.kind} needs it")
    if event.store and "://" not in event.store:
        _must(Path(event.store).is_dir(), f"{where}.store {event.store!r} is not a folder")
    if event.kind == "signal":
        known = event.signal in signal.Signals.__members__
        _must(known, f"{where}.signal must be a signal's name like SIGKILL or SIGSTOP, got {event.signal!r}")
        _must(bool(event.pid) != bool(event.pid_file), f"{where}: signal needs either pid or pid_file")
        _check_file(f"{where}.pid_file", event.pid_file)


def _check_file(name: str, path: str) -> None:
    _must(not path or Path(path).is_file(), f"{name} {path!r} is not a file")
