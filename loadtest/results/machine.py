"""The machine that the generator runs on, in the few values that its figures depend on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("httpx", "numpy", "uvloop")


def describe() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system, versions, and how busy the machine is right now."""
    about: dict[str, Any] = {"cpu": _processor(), "cores": _cores(), "memory_gib": _memory_gib()}
    about |= {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    about |= {name: found for name in PACKAGES if (found := _version(name))}
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


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
