"""A TOML file as a `msgspec.Struct`: read, overridden by `KEY=VALUE`, checked; errors name the file and the key.

Constraints are msgspec's: `Annotated[int, Meta(ge=2)]`, `Literal["a", "b"]`, and a ValueError of `__post_init__` for
what several fields have to agree on. Structs are declared with `forbid_unknown_fields=True`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
from msgspec import structs

from embstore.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)
_TOML_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "object": "a table",
}


def read_toml(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The values of a file, with `section.key=value` overrides applied; ConfigError when either cannot be read."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return values


def build(cls: type[T], values: Mapping[str, Any], source: str | Path) -> T:
    """`cls` of these values; ConfigError names the source, the key, what is wrong and what would be right."""
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explained(str(error), cls, values)}") from error


def parse_assignment(text: str, example: str) -> tuple[str, Any]:
    """The name and value of `NAME=VALUE`; a value is TOML, or text where it is not. ConfigError shows the example."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name:
        raise ConfigError(f"expected KEY=VALUE, for example {example}, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def expand(text: str, key: str) -> str:
    """The text with `~` and `${NAME}` replaced; ConfigError names the key and a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ConfigError(f"{key} is {text!r}, but the environment variable {match[1]} is not set")
        return found

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, text))


def unknown_key(key: str, known: Sequence[str], prefix: str = "") -> str:
    """What to say of a key that does not exist: the one it may have been meant to be, and all that do."""
    return f"unknown key {prefix}{key}{did_you_mean(key, known, prefix)} (valid: {', '.join(known)})"


def did_you_mean(given: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean x?`, or nothing where nothing is close."""
    near = get_close_matches(given, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _override(values: dict[str, Any], override: str) -> None:
    """Put a value at its dotted path; sections that the file does not have are made."""
    name, value = parse_assignment(override, "training.max_epochs=5")
    *sections, key = name.split(".")
    if not key or not all(sections):
        raise ConfigError(f"expected section.key=value, for example training.max_epochs=5, got {override!r}")
    for depth, section in enumerate(sections, start=1):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set {name}: {'.'.join(sections[:depth])} is not a section")
    values[key] = value


def _explained(message: str, cls: type, values: Any) -> str:
    """msgspec's message in the words of the file: ``Expected `int` >= 2 - at `$.training.batch_size` ``."""
    what, _, path = message.partition(" - at `$")
    keys = path.rstrip("`").removeprefix(".").split(".") if path else []
    kind: Any = cls
    for key in keys:
        kind = next(field.type for field in structs.fields(kind) if field.name == key)
        values = values[key]
    place = ".".join(keys)
    prefix = f"{place}." if place else ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        return unknown_key(unknown[1], [field.name for field in structs.fields(kind)], prefix)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{prefix}{missing[1]} is missing"
    if what.startswith("Invalid enum value"):
        allowed = [str(value) for value in get_args(kind)]
        return f"{place} must be one of {', '.join(allowed)}, got {values!r}{did_you_mean(str(values), allowed)}"
    if expected := re.fullmatch(r"Expected `(.*?)`(.*?)(, got .*)?", what):
        types = [_TOML_TYPES.get(name, name) for name in expected[1].split(" | ") if name != "null"]
        return f"{place} must be {' or '.join(types)}{expected[2]}, got {values!r}"
    return f"{place}: {what}" if place else what
