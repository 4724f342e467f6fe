"""A real server process for tests: `embstore serve` on a loopback port or a socket file, its log kept, always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from support.forked import ForkedProcess

START_SECONDS = 60


def start(arguments: list[str], log: Path, env: dict[str, str]) -> ForkedProcess | subprocess.Popen[bytes]:
    """`python -m embstore ARGUMENTS`, its output in `log`."""
    if sys.platform == "linux" and "EMBSTORE_TEST_EXEC" not in os.environ:
        return ForkedProcess(arguments, log, env)
    with log.open("wb") as file:
        command = [sys.executable, "-m", "embstore", *arguments]
        return subprocess.Popen(command, stderr=file, stdout=file, env=env)


class ServerProcess:
    """One running `embstore serve`."""

    def __init__(self, store: Path, log: Path, env: dict[str, str] | None = None, **flags: Any) -> None:
        options = {"poll-seconds": 0.1, "drain-seconds": 0.2} | flags
        self.store, self.log_path = store, log
        arguments = ["serve", "--store", str(store), *([] if "uds" in flags else ["--port", "0"])]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("EMBSTORE_")} | (env or {})
        self.process = start(arguments, log, environment)
        self.url = self._wait_for_address()

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def events(self) -> list[dict[str, Any]]:
        """What the server logged so far."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]

    def wait_until(self, ready: Any, what: str, seconds: float = 30.0) -> None:
        """Poll until `ready()`; the server's log is in the message when it never is."""
        end = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"server ended: {self.log_path.read_text()[-2000:]}"
            assert time.monotonic() < end, f"waited for {what}: {self.log_path.read_text()[-2000:]}"
            time.sleep(0.02)

    def client(self) -> httpx.Client:
        """A client of httpx's, over TCP or the Unix-domain socket."""
        if self.url.startswith("unix://"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix://"))
            return httpx.Client(base_url="http://localhost", transport=transport)
        return httpx.Client(base_url=self.url)

    def wait_ready(self) -> None:
        """Until /readyz says yes."""
        with self.client() as client:
            self.wait_until(lambda: client.get("/readyz").status_code == 200, "readiness")

    def memory_mib(self) -> float:
        """Resident memory that is this process's own (not mapped files)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024

    def stop(self) -> int:
        """SIGTERM and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def _wait_for_address(self) -> str:
        address: list[str] = []

        def listening() -> bool:
            address.extend(e["address"] for e in self.events() if e["event"] == "listening")
            return bool(address)

        self.wait_until(listening, "an address", START_SECONDS)
        return address[0]


@contextmanager
def serving(store: Path, log: Path, *, ready: bool = True, **flags: Any) -> Iterator[ServerProcess]:
    """A server over `store`, ready unless told otherwise; killed at the end if it still runs."""
    server = ServerProcess(store, log, **flags)
    try:
        if ready:
            server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(30)
