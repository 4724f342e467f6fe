"""What a figure was measured on, and how figures are shown."""

from __future__ import annotations

import json
import sys
from typing import Any

from embstore.bench.machine import describe


def show(title: str, rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """A Markdown table, or JSON with the machine."""
    if as_json:
        sys.stdout.write(json.dumps({"title": title, "machine": describe(), "rows": rows}, indent=1) + "\n")
        return
    columns = list(rows[0]) if rows else []
    lines = [f"\n### {title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n\n" + ", ".join(f"{k} {v}" for k, v in describe().items()) + "\n")
