"""Scenarios as TOML: read from a file, with single values replaced from the command line, and written back."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from msgspec.structs import replace

from loadtest.errors import ScenarioError
from loadtest.scenario.decode import decode, field_type, unknown
from loadtest.scenario.model import RequestSpec, Scenario


def read_scenario(path: str | Path | None, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario of a file, or the default one, with overrides like `phases.0.rate=500`; rules are not yet checked.

    File names in it are relative to the current directory; in those of ids ${NAME} is an environment variable.
    ScenarioError names the file or the override, the field that is wrong, and what would be right.
    """
    scenario = Scenario() if path is None else _read(Path(path))
    for override in overrides:
        scenario = _overridden(scenario, override)
    requests = tuple(_expanded(spec, f"requests.{at}") for at, spec in enumerate(scenario.requests))
    return replace(scenario, requests=requests)


def to_toml(scenario: Scenario) -> str:
    """A scenario as a file, every field of it; reading it gives an equal one."""
    values = scenario.to_json()
    tables = {name: values.pop(name) for name in ("phases", "requests", "events")}
    lines = _lines(values)
    for name, parts in tables.items():
        for part in parts:
            lines += ["", f"[[{name}]]", *_lines(part)]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> Scenario:
    try:
        return decode(tomllib.loads(path.read_text("utf-8")), Scenario)
    except OSError as error:
        raise ScenarioError(f"cannot read scenario {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"scenario {str(path)!r} is not valid TOML: {error}") from None
    except ScenarioError as error:
        raise ScenarioError(f"{path}: {error}") from None


def _overridden(scenario: Scenario, override: str) -> Scenario:
    """The scenario with one value replaced: text that its field takes, a list as TOML or with commas."""
    name, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not name:
        raise ScenarioError(f"--set {override}: expected FIELD=VALUE, as in phases.0.rate=500")
    values, type_ = scenario.to_json(), field_type(Scenario, name)
    if type_ is None:
        raise ScenarioError(f"--set {override}: {unknown(Scenario, name)}")
    place: Any = values
    *parents, last = name.split(".")
    for part in parents:
        if isinstance(place, list | tuple) and int(part) >= len(place):
            raise ScenarioError(f"--set {override}: no entry {part}; there are {len(place)}, counted from 0")
        place = place[int(part) if isinstance(place, list | tuple) else part]
    if not isinstance(place, dict):
        raise ScenarioError(f"--set {override}: name one field, as in {name}.name=...")
    place[last] = _list(text) if get_origin(type_) is tuple else text
    try:
        return decode(values, Scenario, strict=False)
    except ScenarioError as error:
        raise ScenarioError(f"--set {override}: {str(error).removeprefix(f'{name}: ')}") from None


def _list(text: str) -> list[Any]:
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = None
    return parsed if isinstance(parsed, list) else [part.strip() for part in text.split(",")]


def _expanded(spec: RequestSpec, where: str) -> RequestSpec:
    """Its file of ids with ${NAME} and ~ replaced; ScenarioError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        if found := os.environ.get(match[1]):
            return found
        raise ScenarioError(f"{where}.ids.file: {spec.ids.file!r}: environment variable {match[1]} is not set")

    file = os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, spec.ids.file))
    return replace(spec, ids=replace(spec.ids, file=file))


def _lines(values: dict[str, Any]) -> list[str]:
    """TOML has no null, so what is None stays away."""
    return [f"{name} = {_value(value)}" for name, value in values.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(_lines(value))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
