"""Load from a core of its own: wrk where it is installed, else the generator of this project; requests prepared."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embstore.bench.processes import on_cores
from embstore.errors import ConfigError, EmbstoreError

TOOLS = ("auto", "wrk", "raw")
CONNECTIONS = 8
CHECK_SECONDS = 60.0

REPLAY = """
local requests, file = {}, io.open(os.getenv("REQUESTS"), "rb")
for line in io.lines(os.getenv("REQUESTS") .. ".sizes") do requests[#requests + 1] = file:read(tonumber(line)) end
local at = 0
function request() at = at % #requests + 1; return requests[at] end
"""


@dataclass(frozen=True)
class Target:
    """What is loaded: a server, a file of the requests that it gets, how long its replies are where that is known."""

    name: str
    url: str
    requests: Path
    reply_bytes: int | None = None


class Load:
    """Makes loads on given cores; one at a time."""

    def __init__(self, tool: str, folder: Path, on: Sequence[int]) -> None:
        if tool not in TOOLS:
            raise ConfigError(f"--load must be one of {', '.join(TOOLS)}, got {tool!r}")
        if tool == "wrk" and shutil.which("wrk") is None:
            raise ConfigError("--load wrk: there is no wrk on PATH (Debian: apt-get install wrk)")
        self.tool = ("wrk" if shutil.which("wrk") else "raw") if tool == "auto" else tool
        self.on, self.script = on, folder / "replay.lua"
        self.script.write_text(REPLAY)

    def closed(self, target: Target, seconds: float, *, on: Sequence[int] | None = None) -> float:
        """Replies a second when `CONNECTIONS` send as fast as they are answered; EmbstoreError unless all are 2xx."""
        rate = self._closed(target, seconds, on)
        if not rate:
            raise EmbstoreError(f"{target.name}: no request was answered in {seconds:g} s; --seconds should be more")
        return rate

    def _closed(self, target: Target, seconds: float, on: Sequence[int] | None) -> float:
        if self.tool == "raw":
            (report,) = self.raw([plan(target, seconds=seconds, connections=CONNECTIONS)], on=on)
            wrong = {**report["errors"], **{k: n for k, n in report["statuses"].items() if k[0] != "2"}}
            if wrong:
                raise EmbstoreError(f"{target.name}: not every request was answered: {wrong}")
            return float(report["requests_per_s"])
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{math.ceil(seconds)}s", "-s", str(self.script), target.url]
        text = self._call(command, on, env=os.environ | {"REQUESTS": str(target.requests)})
        wrong_lines = re.findall(r"^\s*((?:Non-2xx|Socket errors).*)$", text, re.MULTILINE)
        rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
        if wrong_lines or rate is None:
            raise EmbstoreError(f"{target.name}: {'; '.join(wrong_lines) or f'wrk said: {text[-200:]}'}")
        return float(rate[1])

    def raw(self, plans: Sequence[dict[str, Any]], *, on: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Reports of loads made at the same time by the project's own generator."""
        command = [sys.executable, "-m", "loadtest.run.raw"]
        found: list[dict[str, Any]] = json.loads(self._call(command, on, input=json.dumps({"loads": plans})))
        return found

    def _call(self, command: list[str], on: Sequence[int] | None, **options: Any) -> str:
        with on_cores(self.on if on is None else on):
            ran: subprocess.CompletedProcess[str] = subprocess.run(
                command, capture_output=True, text=True, check=False, **options
            )
        if ran.returncode:
            raise EmbstoreError(f"the load failed: {(ran.stderr or ran.stdout).strip()[-300:]}")
        return ran.stdout


def plan(target: Target, **options: Any) -> dict[str, Any]:
    """A load on a target as the generator takes it; `options` are the fields of loadtest.raw.Plan."""
    return {"url": target.url, "requests": str(target.requests), **options}


def check(target: Target) -> None:
    """Send the first request; EmbstoreError unless the reply is 200 and as long as it should be."""
    address, sizes = urlsplit(target.url), target.requests.with_name(target.requests.name + ".sizes")
    with target.requests.open("rb") as file, sizes.open() as lengths:
        request = file.read(int(next(lengths)))
    try:
        with socket.create_connection((address.hostname or "", address.port or 80), CHECK_SECONDS) as connection:
            connection.sendall(request)
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            body = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise EmbstoreError(f"{target.name}: no answer from {target.url}: {error!r}") from error
    if reply.status != 200:
        raise EmbstoreError(f"{target.name}: the server answers {reply.status}: {_detail(body)}")
    if target.reply_bytes not in (None, len(body)):
        raise EmbstoreError(f"{target.name}: the reply has {len(body)} bytes, not {target.reply_bytes}")


def _detail(body: bytes) -> str:
    """What a problem says, or the beginning of anything else."""
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
