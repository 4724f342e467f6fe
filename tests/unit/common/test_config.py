"""TOML files as structs: what is read, what an override sets, what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta, Struct

from embstore.common.config import build, expand, parse_assignment, read_toml
from embstore.errors import ConfigError


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=2)] = 2
    rate: Annotated[float, Meta(gt=0)] | None = None
    kind: Literal["round", "square"] = "round"

    def __post_init__(self) -> None:
        if self.kind == "square" and self.rate is not None:
            raise ValueError("kind = 'square' takes no rate")


class Whole(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    part: Part = Part()


def test_a_file_becomes_a_struct(tmp_path: Path) -> None:
    """Values come from the file, then from overrides, then from the defaults."""
    (tmp_path / "x.toml").write_text('name = "a"\n[part]\nsize = 3\nkind = "square"')
    values = read_toml(tmp_path / "x.toml", ["part.kind=round", "part.rate = 1"])
    assert build(Whole, values, "x.toml") == Whole(name="a", part=Part(size=3, rate=1.0, kind="round"))


def test_a_value_is_toml_or_text() -> None:
    """`NAME=VALUE` gives numbers, booleans, lists and strings as TOML writes them, and text where it is not TOML."""
    given = ["a=1", "b = true", "c=[1, 2]", "d=concat", 'e="x=y"', "f=0.5"]
    assert dict(parse_assignment(text, "a=1") for text in given) == {
        "a": 1,
        "b": True,
        "c": [1, 2],
        "d": "concat",
        "e": "x=y",
        "f": 0.5,
    }


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "name is missing"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"name": "a", "prt": {}}, "unknown key prt; did you mean part? (valid: name, part)"),
        ({"name": "a", "part": 1}, "part must be a table, got 1"),
        ({"name": "a", "part": {"size": 1}}, "part.size must be an integer >= 2, got 1"),
        ({"name": "a", "part": {"size": True}}, "part.size must be an integer, got True"),
        ({"name": "a", "part": {"rate": "x"}}, "part.rate must be a number, got 'x'"),
        (
            {"name": "a", "part": {"sizes": 1}},
            "unknown key part.sizes; did you mean part.size? (valid: size, rate, kind)",
        ),
        (
            {"name": "a", "part": {"kind": "sqare"}},
            "part.kind must be one of round, square, got 'sqare'; did you mean square?",
        ),
        ({"name": "a", "part": {"kind": "square", "rate": 1}}, "part: kind = 'square' takes no rate"),
    ],
)
def test_an_error_names_the_file_and_the_key(values: dict[str, object], says: str) -> None:
    """A ConfigError is one line: the file, the key, what would be right, what was given."""
    with pytest.raises(ConfigError) as caught:
        build(Whole, values, "x.toml")
    assert str(caught.value) == f"x.toml: {says}"


def test_a_variable_of_the_environment_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`expand` replaces ${NAME} and ~, and names the key and the variable when that is not set."""
    monkeypatch.setenv("EMBSTORE_SOMEWHERE", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("${EMBSTORE_SOMEWHERE}/a", "path") == "/data/a"
    assert expand("~/a", "path") == "/home/me/a"
    with pytest.raises(ConfigError, match=r"path is '\$\{EMBSTORE_NONE\}', but .* EMBSTORE_NONE is not set"):
        expand("${EMBSTORE_NONE}", "path")
