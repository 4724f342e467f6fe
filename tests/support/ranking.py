"""The example ranking service as a real process on a loopback port, its log kept, always ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120


class RankerProcess:
    """One running `python -m ranker serve`."""

    def __init__(self, artifact: Path, embeddings: str, log: Path, **flags: Any) -> None:
        self.log_path = log
        options = {"artifact": artifact, "embeddings": embeddings, "port": 0, "probe-seconds": 0.1} | flags
        command = [sys.executable, "-m", "ranker", "serve"]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RANKER_")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    @property
    def url(self) -> str:
        """Where it listens; waits for that."""
        found: list[str] = []

        def listening() -> bool:
            found.extend(re.findall(r"^ranking on (\S+)", self.log_path.read_text(), re.MULTILINE))
            return bool(found)

        self.wait_until(listening, "an address", START_SECONDS)
        return found[0]

    def wait_until(self, ready: Any, what: str, seconds: float = 60.0) -> None:
        """Poll until `ready()`; the log is in the message when it never is."""
        end = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"ranker ended: {self.log_path.read_text()[-2000:]}"
            assert time.monotonic() < end, f"waited for {what}: {self.log_path.read_text()[-2000:]}"
            time.sleep(0.02)

    def wait_ready(self) -> None:
        """Until /readyz says yes."""
        self.wait_until(lambda: self.get("/readyz").status_code == 200, "readiness")

    def get(self, path: str) -> httpx.Response:
        """A probe's answer."""
        return httpx.get(f"{self.url}{path}", timeout=60)


@contextmanager
def ranking(artifact: Path, embeddings: str, log: Path, **flags: Any) -> Iterator[RankerProcess]:
    """A ranker, not waited for; killed at the end."""
    ranker = RankerProcess(artifact, embeddings, log, **flags)
    try:
        yield ranker
    finally:
        ranker.process.kill()
        ranker.process.wait(30)
