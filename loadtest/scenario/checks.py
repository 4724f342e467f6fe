"""What a scenario must be to be run. Every message is one line that names the field and what would be right."""

from __future__ import annotations

import math
import re
import signal
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Batch, Event, IdDistribution, RequestSpec, Scenario

DTYPES = {
    "octet": ("float32", "float16", "bfloat16", "int8"),
    "json": ("float32", "float16", "bfloat16"),
    "infer": ("float32", "float16"),
}
MAX_RATE = 10_000_000
ON_MISSING = ("zero", "default", "error", "hash")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def check(scenario: Scenario) -> None:
    """Nothing, when the scenario can be run; ScenarioError says what to change otherwise."""
    _check_choices(scenario, "")
    _check_server(scenario)
    _check_generator(scenario)
    _check_phases(scenario)
    _check_asks(scenario)
    for at, event in enumerate(scenario.events):
        _check_event(event, f"events.{at}", scenario.seconds)
    _check_conditions(scenario)


def _must(right: bool, message: str) -> None:
    if not right:
        raise ScenarioError(message)


def _check_choices(value: Any, where: str) -> None:
    """Numbers are numbers, and fields with a closed set of values have one of them."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        name, given = f"{where}{field.name}", getattr(value, field.name)
        if get_origin(hints[field.name]) is Literal:
            known = get_args(hints[field.name])
            _must(given in known, f"{name} must be {_any_of(known)}, got {given!r}")
        elif isinstance(given, float):
            _must(math.isfinite(given), f"{name} must be a finite number, got {given}")
        elif is_dataclass(given):
            _check_choices(given, f"{name}.")
        elif isinstance(given, tuple):
            for at, part in enumerate(given):
                if is_dataclass(part):
                    _check_choices(part, f"{name}.{at}.")


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
    _must(not (scenario.insecure and scenario.ca), "insecure and ca contradict each other: set one of them")
    _must(not (secure and scenario.engine == "raw"), "engine raw speaks no TLS: use engine httpx for https://")
    _check_file("ca", scenario.ca)
    _check_file("api_key_file", scenario.api_key_file)


def _check_generator(scenario: Scenario) -> None:
    _must(scenario.processes >= 1, f"processes must be at least 1, got {scenario.processes}")
    _must(
        scenario.connections >= scenario.processes,
        f"connections must be at least processes, one for each: got {scenario.connections} for {scenario.processes}",
    )
    _must(scenario.timeout > 0, f"timeout must be above 0 seconds, got {scenario.timeout:g}")
    _must(scenario.seed >= 0, f"seed must not be negative, got {scenario.seed}")


def _check_phases(scenario: Scenario) -> None:
    _must(bool(scenario.phases), "phases is empty: one at least says how long and how hard")
    measured = False
    for at, phase in enumerate(scenario.phases):
        where = f"phases.{at}"
        _must(phase.seconds > 0, f"{where}.seconds must be above 0, got {phase.seconds:g}")
        _must(phase.rate >= 0, f"{where}.rate must not be negative, got {phase.rate:g}")
        _must((phase.rate_to or 0) >= 0, f"{where}.rate_to must not be negative, got {phase.rate_to}")
        for name, rate in (("rate", phase.rate), ("rate_to", phase.rate_to or 0)):
            _must(rate <= MAX_RATE, f"{where}.{name} must be at most {MAX_RATE:,} requests/s, got {rate:,g}")
        _must(not (phase.warmup and measured), f"{where}.warmup: a warm-up comes before everything that is measured")
        measured = measured or not phase.warmup
    _must(measured, "phases are all warm-up: one at least must be measured")
    if scenario.mode == "open" and scenario.clock is None:
        rates = [max(phase.rate, phase.rate_to or 0) for phase in scenario.phases if not phase.warmup]
        _must(max(rates) > 0, "phases: rate is 0 in all that are measured; one at least must send something")


def _check_asks(scenario: Scenario) -> None:
    requests = scenario.requests
    _must(bool(requests), "requests is empty: one at least says what to ask for")
    kinds: dict[str, int] = {}
    for at, spec in enumerate(requests):
        where = f"requests.{at}"
        _check_request(spec, where)
        first = kinds.setdefault(spec.kind, at)
        _must(first == at, f"{where}.name: requests.{first} is called {spec.kind!r} too; give each a name of its own")
    _must(
        sum(spec.weight for spec in requests) > 0, "requests: weight is 0 in all of them; one at least must be above 0"
    )
    if scenario.clock is not None:
        at = requests.index(scenario.clock)
        column = f"requests.{at}.ids.time_column"
        _must(scenario.mode == "open", f"{column}: requests due at recorded times need mode open, not closed")
        _must(
            len(requests) == 1,
            f"{column}: a recording with a clock must be the only one of requests, there are {len(requests)}",
        )
        fixed = scenario.clock.batch.kind == "fixed"
        _must(fixed, f"requests.{at}.batch.kind must be fixed where ids.time_column says when requests are due")


def _check_request(spec: RequestSpec, where: str) -> None:
    many = len(spec.tables) > 1
    _must(bool(spec.tables), f"{where}.tables is empty: name at least one")
    for table in spec.tables:
        _check_name(f"{where}.tables", table)
    _must(len(set(spec.tables)) == len(spec.tables), f"{where}.tables names a table twice")
    _must(spec.weight >= 0, f"{where}.weight must not be negative, got {spec.weight:g}")
    _must(not many or spec.protocol != "octet", f"{where}.protocol: octet has one table; for several use json or infer")
    alone = "model embstore is all tables together; ask for a table of that name with octet or json"
    _must(many or spec.protocol != "infer" or spec.tables[0] != "embstore", f"{where}.tables: {alone}")
    dtypes = DTYPES[spec.protocol]
    _must(spec.dtype in dtypes, f"{where}.dtype of {spec.protocol} must be {_any_of(dtypes)}, got {spec.dtype!r}")
    _must(spec.on_missing in ON_MISSING, f"{where}.on_missing must be {_any_of(ON_MISSING)}, got {spec.on_missing!r}")
    _check_pin(spec, where, many)
    _check_ids(spec.ids, f"{where}.ids")
    _must(not many or not spec.ids.file, f"{where}.ids.file has the ids of one table, and tables names several")
    _check_batch(spec.batch, f"{where}.batch")


def _check_pin(spec: RequestSpec, where: str, many: bool) -> None:
    """What is asked for beside the newest."""
    _must(not (spec.version and spec.label), f"{where}: version and label contradict each other: set one of them")
    if many:
        _must(not spec.version, f"{where}.version is of one table; for several set release")
        _must(not spec.label, f"{where}.label is of one table; for several set release")
    else:
        _must(not spec.release, f"{where}.release is of several tables; for one set version or label")
    _must(not (spec.label and spec.protocol == "infer"), f"{where}.label: infer knows versions only")
    if spec.label:
        _check_name(f"{where}.label", spec.label)
    for name, given in (("version", spec.version), ("release", spec.release)):
        _must(not given or bool(_NUMBER.fullmatch(given)), f"{where}.{name} must be a number as text, got {given!r}")


def _check_ids(ids: IdDistribution, where: str) -> None:
    _must(ids.num_ids >= 0, f"{where}.num_ids must not be negative (0: as the table has), got {ids.num_ids}")
    _must(ids.exponent >= 0, f"{where}.exponent must not be negative (0: uniform), got {ids.exponent:g}")
    _must(ids.hot_ids >= 1, f"{where}.hot_ids must be at least 1, got {ids.hot_ids}")
    _must(0 <= ids.hot_share <= 1, f"{where}.hot_share must lie between 0 and 1, got {ids.hot_share:g}")
    _must(ids.drift >= 0, f"{where}.drift must not be negative, got {ids.drift:g}")
    fits = ids.kind != "hot" or not ids.num_ids or ids.hot_ids < ids.num_ids
    _must(fits, f"{where}.hot_ids must be below num_ids {ids.num_ids}, got {ids.hot_ids}")
    _must(ids.speed > 0, f"{where}.speed must be above 0, got {ids.speed:g}")
    _must(bool(ids.column), f"{where}.column must name the column of ids")
    _check_file(f"{where}.file", ids.file)
    if ids.kind == "replay":
        _must(bool(ids.file), f"{where}.file must name a Parquet file to replay")
    else:
        for name in ("time_column", "as_recorded"):
            _must(not getattr(ids, name), f"{where}.{name} is for kind replay only, kind is {ids.kind}")
        _must(not (ids.file and ids.num_ids), f"{where}: file says which ids there are; leave num_ids out")


def _check_batch(batch: Batch, where: str) -> None:
    for name in ("size", "min", "max"):
        _must(getattr(batch, name) >= 1, f"{where}.{name} must be at least 1, got {getattr(batch, name)}")
    _must(batch.sigma >= 0, f"{where}.sigma must not be negative, got {batch.sigma:g}")
    if batch.kind == "uniform":
        _must(batch.min <= batch.max, f"{where}.min must not be above max, got {batch.min} and {batch.max}")
    elif batch.kind == "lognormal":
        _must(batch.size <= batch.max, f"{where}.size must not be above max, got {batch.size} and {batch.max}")
    elif batch.kind == "choice":
        _must(bool(batch.sizes), f"{where}.sizes is empty: name the sizes to choose from")
        _must(min(batch.sizes) >= 1, f"{where}.sizes must be at least 1 each, got {min(batch.sizes)}")
        if batch.weights:
            same = len(batch.weights) == len(batch.sizes)
            _must(
                same, f"{where}.weights: got {len(batch.weights)} for {len(batch.sizes)} sizes; one for each, or none"
            )
            good = min(batch.weights) >= 0 and 0 < sum(batch.weights) < math.inf
            _must(good, f"{where}.weights must be numbers not below 0, one at least above")


def _check_event(event: Event, where: str, seconds: float) -> None:
    within = 0 <= event.at <= seconds
    _must(within, f"{where}.at must lie within the {seconds:g} seconds that are measured, got {event.at:g}")
    needed = {"publish": ("store", "table"), "promote": ("store", "table", "label", "version"), "command": ("command",)}
    for name in needed.get(event.kind, ()):
        _must(bool(getattr(event, name)), f"{where}.{name} is empty, and {event.kind} needs it")
    if event.store and "://" not in event.store:
        _must(Path(event.store).is_dir(), f"{where}.store {event.store!r} is no folder")
    if event.kind == "signal":
        known = event.signal in signal.Signals.__members__
        _must(known, f"{where}.signal must be a signal's name like SIGKILL or SIGSTOP, got {event.signal!r}")
        _must(bool(event.pid) != bool(event.pid_file), f"{where}: signal needs either pid or pid_file")
        _must(event.pid >= 0, f"{where}.pid must be the id of a process, got {event.pid}")
        _check_file(f"{where}.pid_file", event.pid_file)


def _check_conditions(scenario: Scenario) -> None:
    if not scenario.fail_if:
        return
    from loadtest.results.conditions import parse

    for condition in scenario.fail_if:
        try:
            parse(condition)
        except ValueError as error:
            raise ScenarioError(f"fail_if: {error}") from None


def _check_file(name: str, path: str) -> None:
    _must(not path or Path(path).is_file(), f"{name} {path!r} is no file")


def _check_name(name: str, given: str) -> None:
    wanted = "letters, digits, _ . and -, beginning with a letter or digit"
    _must(bool(_NAME.fullmatch(given)), f"{name} must be a name of {wanted}, got {given!r}")


def _any_of(known: tuple[str, ...]) -> str:
    return f"{', '.join(known[:-1])} or {known[-1]}"
