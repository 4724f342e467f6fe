"""Scenarios from TOML files, with single values replaced from the command line."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from loadtest.errors import ScenarioError
from loadtest.scenario.model import RequestSpec, Scenario


class _Text(str):
    """A value from the command line: what it is depends on the field."""


def read_scenario(path: str | Path | None, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario of a file, or the default one, with overrides like `phases.0.rate=500`; not yet checked.

    File names in it are relative to the current directory; in those of keys ${NAME} is an environment variable.
    ScenarioError names a key that does not exist, and what it
    may have been meant to be, or a value that is of another type.
    """
    values = _read(Path(path)) if path is not None else {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise ScenarioError(f"{override!r} sets nothing: say what, as in phases.0.rate=500")
        _override(values, name.strip(), _Text(text.strip()))
    scenario: Scenario = _build(Scenario, values, "")
    return replace(
        scenario, requests=tuple(_expanded(spec, f"requests.{at}") for at, spec in enumerate(scenario.requests))
    )


def _expanded(spec: RequestSpec, where: str) -> RequestSpec:
    """Its file of keys with ${NAME} and ~ replaced; ScenarioError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ScenarioError(
                f"{where}.ids.file is {spec.ids.file!r}, but the environment variable {match[1]} is not set"
            )
        return found

    file = os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, spec.ids.file))
    return replace(spec, ids=replace(spec.ids, file=file))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ScenarioError(f"cannot read scenario {str(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"scenario {str(path)!r} is no TOML: {error}") from None


def _override(values: dict[str, Any], name: str, text: _Text) -> None:
    """Put a value at a dotted path; lists are walked by number."""
    place: Any = values
    *parents, last = name.split(".")
    for at, part in enumerate(parents):
        if isinstance(place, list):
            place = _entry(place, part, name)
        else:
            # of phases and requests there is one by default, so that its fields can be set without a file
            defaults: dict[str, Any] = {"phases": [{}], "requests": [{}], "events": []} if at == 0 else {}
            place = place.setdefault(part, defaults.get(part, {}))
        if not isinstance(place, dict | list):
            raise ScenarioError(f"{name}: {'.'.join(parents[: at + 1])} has no fields")
    if isinstance(place, list):
        raise ScenarioError(f"{name}: say which field of it, as in {name}.name=...")
    place[last] = text


def _entry(place: list[Any], part: str, name: str) -> Any:
    if not (part.isascii() and part.isdigit() and int(part) < len(place)):
        raise ScenarioError(f"{name}: no entry {part!r}; there are {len(place)}, counted from 0")
    return place[int(part)]


def _build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a table of TOML."""
    if not isinstance(values, dict):
        raise ScenarioError(f"{where} must be a table of fields, got {_shown(values)}")
    hints, prefix = _hints(cls), f"{where}." if where else ""
    for name in values:
        if name not in hints:
            deeper = [path for path in _paths(cls) if path.endswith(f".{name}")]
            close = difflib.get_close_matches(name, hints, 1, 0.75)
            meant = [prefix + path for path in deeper[:1] or close]
            known = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(hints)}"
            raise ScenarioError(f"{prefix}{name} is unknown: {known}")
    return cls(**{name: _value(hints[name], value, prefix + name) for name, value in values.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def _paths(cls: type) -> tuple[str, ...]:
    """Every field below a dataclass as an override names it, of lists the first."""
    paths: list[str] = []
    for name, hint in _hints(cls).items():
        listed = get_origin(hint) is tuple
        below = get_args(hint)[0] if listed else hint
        if is_dataclass(below):
            paths += [f"{name}.{'0.' * listed}{path}" for path in _paths(below)]  # type: ignore[arg-type]
        paths.append(name)
    return tuple(paths)


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value as a field of type `hint` takes it."""
    if is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    options = get_args(hint)
    if type(None) in options:  # TOML has no null: a field that may be absent is
        (hint,) = (option for option in options if option is not type(None))
    if get_origin(hint) is tuple:
        return _list(options[0], value, where)
    wanted = hint if hint in (int, float, bool) else str
    if isinstance(value, _Text):
        value = str(value) if wanted is str else _parsed(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ScenarioError(f"{where} must be {names[wanted]}, got {_shown(value)}")
    return value


def _list(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, _Text):
        parsed = _parsed(value)
        value = parsed if isinstance(parsed, list) else [_Text(part.strip()) for part in value.split(",")]
    if not isinstance(value, list):
        raise ScenarioError(f"{where} must be a list, got {_shown(value)}")
    return tuple(_value(hint, each, f"{where}.{at}") for at, each in enumerate(value))


def _parsed(text: str) -> Any:
    """A value as TOML writes it, the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _shown(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
