"""What a figure was measured on, and how figures are shown."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions that matter."""
    import numba
    import numpy
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": numpy.__version__,
    }


def show(title: str, rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """A Markdown table, or JSON with the machine."""
    if as_json:
        sys.stdout.write(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=1) + "\n")
        return
    columns = list(rows[0]) if rows else []
    lines = [f"\n### {title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n\n" + ", ".join(f"{k} {v}" for k, v in machine().items()) + "\n")
