"""Octet-stream lookups against a bare ASGI app that looks nothing up: `python tests/bench/serve.py [--json]`.

Needs `wrk` (Debian: apt-get install wrk). The server runs on core 0, the load on core 1, 8 connections; the
candidates take turns, the figure is the median of the rounds, and what matters is the ratio to `limit`, which is
uvicorn with a constant body of the same size.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from machine import show

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving import ServerProcess

import embstore
from embstore.schemes import QR, Full, MEmCom
from loadtest.workload import zipf_ids

NUM, DIM, ROUNDS, SECONDS, REQUESTS = 2_000_000, 64, 5, 3, 2_000
SERVER_CORE, LOAD_CORE = 0, 1

LIMIT = """
async def app(scope, receive, send, static={}):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"].endswith("shutdown"):
                return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body")
    size = len(body) * 32
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": static.setdefault(size, bytes(size))})
"""

REPLAY = """
local requests, file = {}, io.open(os.getenv("REQUESTS"), "rb")
for line in io.lines(os.getenv("REQUESTS") .. ".sizes") do requests[#requests + 1] = file:read(tonumber(line)) end
local at = 0
function request() at = at % #requests + 1; return requests[at] end
"""


def write_requests(path: Path, url: str, ids_per_request: int) -> None:
    """Complete HTTP requests that wrk replays."""
    address = urlsplit(url)
    with path.open("wb") as file, path.with_name(path.name + ".sizes").open("w") as sizes:
        for ids in zipf_ids(NUM, REQUESTS, ids_per_request):
            body = ids.astype("<i8").tobytes()
            head = (
                f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n"
                "Content-Type: application/octet-stream\r\n\r\n"
            ).encode()
            file.write(head + body)
            sizes.write(f"{len(head) + len(body)}\n")


def load(folder: Path, url: str, ids_per_request: int, seconds: int) -> float:
    """Requests answered per second; an error ends the benchmark."""
    write_requests(folder / "requests", url, ids_per_request)
    command = [
        "taskset",
        "-c",
        str(LOAD_CORE),
        "wrk",
        "-t1",
        "-c8",
        f"-d{seconds}s",
        "-s",
        str(folder / "replay.lua"),
        url,
    ]
    environment = os.environ | {"REQUESTS": str(folder / "requests")}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])  # type: ignore[index]


def main() -> None:
    """Publish, serve, measure, print."""
    if shutil.which("wrk") is None:
        sys.exit("this benchmark needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "replay.lua").write_text(REPLAY)
        (folder / "limit.py").write_text(LIMIT)
        store, budget = embstore.open_store(folder / "store"), 4 * NUM * DIM // 16
        modules = {
            "full": Full(NUM, DIM),
            "qr": QR.from_budget(NUM, DIM, budget),
            "memcom": MEmCom.from_budget(NUM, DIM, budget),
        }
        for table, module in modules.items():
            store.publish(table, module)
        del modules
        limit = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--app-dir", name, "limit:app", "--port", "8099", "--loop", "uvloop"]
            + ["--http", "httptools", "--no-access-log", "--log-level", "warning"]
        )
        server = ServerProcess(folder / "store", folder / "log")
        try:
            server.wait_ready()
            for pid in (limit.pid, server.pid):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), {SERVER_CORE})
            urls = {"limit": "http://127.0.0.1:8099/"}
            urls |= {table: f"{server.url}/v1/tables/{table}/lookup" for table in store.tables()}
            show("Octet-stream lookups, one core", measure(folder, urls), as_json="--json" in sys.argv)
        finally:
            limit.terminate()
            server.stop()


def measure(folder: Path, urls: dict[str, str]) -> list[dict[str, object]]:
    """Requests per second of every url, taking turns, and the ratio to limit in the same round."""
    rows: list[dict[str, object]] = []
    for ids_per_request in (10, 1_000):
        for url in urls.values():
            load(folder, url, ids_per_request, 1)
        rounds = [{n: load(folder, u, ids_per_request, SECONDS) for n, u in urls.items()} for _ in range(ROUNDS)]
        for name in urls:
            rates = [r[name] for r in rounds]
            rows.append(
                {
                    "table": name,
                    "ids": ids_per_request,
                    "requests/s": round(statistics.median(rates)),
                    "x limit": round(statistics.median(r[name] / r["limit"] for r in rounds), 3),
                    "least": round(min(r[name] / r["limit"] for r in rounds), 3),
                    "most": round(max(r[name] / r["limit"] for r in rounds), 3),
                }
            )
    return rows


if __name__ == "__main__":
    main()
