"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> Console:
    """Where tables go; names and ids may hold brackets, so nothing is markup."""
    from rich.console import Console

    return Console(markup=False)


def show(json: bool, value: Any, for_people: Callable[[], Any]) -> None:
    """JSON on stdout, or what `for_people()` makes of it."""
    if json:
        import orjson

        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode()
        sys.stdout.write(text + "\n")
    else:
        shown = for_people()
        console().print(shown, highlight=False, soft_wrap=isinstance(shown, str))  # a path stays in one piece


def columns(*names: str, title: str | None = None) -> Table:
    """An empty table with these columns; one whose name begins with > is right-aligned and never wrapped."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for name in names:
        if name.startswith(">"):
            table.add_column(name[1:], justify="right", overflow="fold", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def facts(about: Mapping[str, Any]) -> Table:
    """One name and value per line."""
    table = columns("what", "value")
    for name, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table
