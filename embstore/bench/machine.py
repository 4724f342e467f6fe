"""What ran here, and how fast: best times of candidates that take turns, and a line about the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embstore.parallel import num_cores


def best_seconds(runs: dict[str, Callable[[], Any]], *, rounds: int = 5, seconds: float = 0.02) -> dict[str, float]:
    """Least seconds a call of each; a round repeats a call for about `seconds`, and the candidates take turns.

    The least of several is the time without other programs' interruptions; taking turns makes a machine whose speed
    drifts slow all of them alike.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - begin) / repeats[name])
    return best


def describe() -> dict[str, Any]:
    """Processor, cores, caches, and the versions that speed depends on."""
    import numba
    import numpy as np
    import torch

    about: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": num_cores()}
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        about["cpu"] = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        about["last_level_cache"] = _cache_bytes()
    except (OSError, StopIteration):
        pass
    about |= {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__}
    about["numpy"] = np.__version__
    about["load"] = round(os.getloadavg()[0], 2)
    return about


def _cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("utf-8").strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=0)
