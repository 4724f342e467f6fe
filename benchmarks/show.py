"""How figures are shown: Markdown tables with the machine below, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from embstore.common.machine import describe

Row = dict[str, object]
"""Column -> what is shown in it."""
PACKAGES = ("torch", "triton", "numba", "numpy")


def markdown(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """A table of these columns, of all that any row has in the order of their first appearance unless given."""
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (str(row.get(column, "")).replace("|", "\\|").replace("\n", " ") for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(tables: Mapping[str, Sequence[Row]], *, as_json: bool, about: Mapping[str, object] | None = None) -> None:
    """Print tables by title, and what they were measured on and with."""
    facts = describe(*PACKAGES) | dict(about or {})
    if as_json:
        sys.stdout.write(json.dumps({"machine": facts, "tables": tables}, indent=1) + "\n")
        return
    for title, rows in tables.items():
        sys.stdout.write(f"\n### {title}\n\n{markdown(rows)}\n")
    sys.stdout.write("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
