"""From a mapping, as TOML gives it, to a frozen dataclass: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from embstore.errors import ConfigError

T = TypeVar("T")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: ""}


def build(cls: type[T], raw: Any, section: str = "") -> T:
    """`cls` filled from `raw`; a dataclass with a field `options` takes all other keys there."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{section or 'a config'} must be a section of keys and values, got {raw!r}")
    types = get_type_hints(cls)
    prefix = f"{section}." if section else ""
    known = [f.name for f in fields(cls) if f.name != "options"]  # type: ignore[arg-type]
    extra = {key: value for key, value in raw.items() if key not in known}
    if extra and "options" not in types:
        raise ConfigError(unknown_key(prefix, next(iter(extra)), known))
    values = {name: _value(types[name], raw[name], prefix + name) for name in known if name in raw}
    if "options" in types:
        values["options"] = extra
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{prefix}{f.name} is missing")
    try:
        return cls(**values)
    except ConfigError as error:
        if section and not str(error).startswith(section):
            raise ConfigError(f"{section}: {error}") from error
        raise


def unknown_key(prefix: str, key: str, known: Sequence[str]) -> str:
    """The message for a key that does not exist: the close match, and all that do."""
    near = get_close_matches(key, known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"unknown key {prefix}{key}{hint} (valid: {', '.join(known)})"


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """ConfigError unless `value` is among `allowed`; names the close match."""
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def positive(config: Any, section: str, *names: str) -> None:
    """ConfigError unless these fields are finite and above 0 (or None)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{section}.{name} must be above 0, got {value}")


def _value(expected: Any, value: Any, name: str) -> Any:
    if is_dataclass(expected):
        return build(expected, value, name)  # type: ignore[arg-type]
    allowed = get_args(expected) or (expected,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    words = " or ".join(_WORDS[kind] for kind in allowed if kind is not NoneType)
    raise ConfigError(f"{name} must be {words}, got {value!r}")
