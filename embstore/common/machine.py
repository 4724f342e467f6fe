"""The machine that figures were measured on: what they depend on, in one flat dict. Imports neither torch nor numba."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Facts = dict[str, str | int | float]


def describe(*packages: str) -> Facts:
    """Processor, cores that this process may use, last-level cache (bytes), memory (GiB), system, versions, load.

    packages: distributions whose versions matter; those that are not installed are left out.
    """
    about: Facts = {"cpu": _processor(), "cores": _cores(), "last_level_cache": _cache_bytes()}
    about["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)
    about |= {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    for package in packages:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    return about | {"load": round(os.getloadavg()[0], 2)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cache_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("utf-8").strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)
