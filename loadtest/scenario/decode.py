"""Plain values into typed ones; what is wrong is told with its place, as `--set` writes it, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

from loadtest.errors import ScenarioError

T = TypeVar("T", bound=msgspec.Struct)


def decode(values: Any, into: type[T], *, strict: bool = True) -> T:
    """A struct from tables and lists; ScenarioError in one line otherwise.

    strict: False: text is also taken where a number or a boolean is wanted.
    """
    try:
        return msgspec.convert(values, into, strict=strict)
    except msgspec.ValidationError as error:
        raise ScenarioError(_readable(str(error), values, into)) from None


def field_type(of: Any, path: str) -> Any:
    """The type at a dotted path, lists by number, without None; None where there is no such field."""
    for part in filter(None, path.split(".")):
        if get_origin(of) is tuple and part.isdecimal():
            of = _plain(get_args(of)[0])
        else:
            types = {field.name: field.type for field in _fields(of)}
            of = _plain(types.get(part))
    return of


def unknown(of: type, path: str) -> str:
    """What to say of a path that does not exist: the closest that does, or what there is beside it."""
    parent, _, name = path.rpartition(".")
    here, prefix = field_type(of, parent), f"{parent}." if parent else ""
    deeper = [below for below in _paths(here) if below.endswith(f".{name}")]
    names = [field.name for field in _fields(here)]
    meant = deeper[:1] or difflib.get_close_matches(name, names, 1, 0.75)
    advice = f": did you mean {prefix}{meant[0]}?" if meant else f": there are {', '.join(names)}" if names else ""
    return f"{path} is unknown{advice}"


def _readable(message: str, values: Any, into: type) -> str:
    what, _, place = message.partition(" - at `$")
    parts = re.findall(r"[^.\[\]`]+", place)
    path = ".".join(parts)
    if found := re.search("unknown field `(.*)`", what):
        return unknown(into, ".".join([*parts, found[1]]))
    for part in parts:
        values = values[int(part) if part.isdecimal() else part]
    if what.startswith("Invalid enum value"):
        *others, last = get_args(field_type(into, path))
        what = f"expected {', '.join(others)} or {last}"
    what = re.sub("^(Expected) |, got.*$|`", lambda match: "expected " if match[1] else "", what)
    what = what.replace("array", "list").replace("object", "table").replace("str ", "text ")
    shown = repr(values)
    got = "" if "missing" in what else f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return f"{path or 'scenario'}: {what}{got}"


def _fields(of: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(of) if isinstance(of, type) and issubclass(of, msgspec.Struct) else ()


def _paths(of: Any) -> Iterator[str]:
    """Every field below a struct, of lists the first."""
    for field in _fields(of):
        below, prefix = _plain(field.type), field.name
        if get_origin(below) is tuple:
            below, prefix = _plain(get_args(below)[0]), f"{field.name}.0"
        yield from (f"{prefix}.{path}" for path in _paths(below))
        yield field.name


def _plain(of: Any) -> Any:
    """A type without None and constraints."""
    if get_origin(of) is Annotated:
        return _plain(of.__origin__)
    options = [option for option in get_args(of) if option is not type(None)]
    return _plain(options[0]) if type(None) in get_args(of) else of
