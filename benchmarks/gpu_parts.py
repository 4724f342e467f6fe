"""The parts of `benchmarks.gpu`, each a process: `python -m benchmarks.gpu_parts PART DEVICE` prints a JSON row a line.

Kernels are timed by events on the card, ids random in tables much larger than its L2 cache, which is overwritten before
each call; a figure is the median of the calls. Traffic is what one lookup must move: ids, the cache lines of 64 bytes
that the scheme's formula reads, the rows written. Its share is of the bytes a second, read and written, that a copy of
two gigabytes moves. On the CPU sizes are tiny, and clocks the CPU's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.processes import ended_by_signals
from benchmarks.show import Row

if TYPE_CHECKING:
    from embstore.bench.kernels import Contender
    from server.http.asgi import App
    from server.http.messages import Reply

SAMPLES, DRAWS, MOST_SECONDS = 20, 8, 0.2
FLUSH_BYTES = 512 << 20
"""Written between two calls: ten times the largest L2 cache, and long enough for the next launch to be queued."""
BAR = 0.6
"""Of copy bandwidth: what the plain table should reach."""
TOLERANCE = 1e-2
"""Of the largest number: more is another vector, not another order of sums."""


def seconds_of(device: str, run: Callable[[int], object]) -> float:
    """Median seconds of `run(0)`, `run(1)`, ... on the device's own clock, its L2 cache overwritten before each."""
    if device == "cpu":
        run(0)
        begin = time.perf_counter()
        run(1)
        return time.perf_counter() - begin
    run(0)  # compiles
    (once,) = _timed(device, run, 1)
    return statistics.median(_timed(device, run, max(5, min(SAMPLES, int(MOST_SECONDS / max(once, 1e-9))))))


def _timed(device: str, run: Callable[[int], object], samples: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]  # type: ignore[no-untyped-call]
    for at, (begin, end) in enumerate(events):
        _flush(device).zero_()
        begin.record()
        run(at)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


@cache
def _flush(device: str) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


@cache
def copy_bytes_per_s(device: str) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    source = torch.ones((2 << 30) if device == "cuda" else (1 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(device, lambda _: target.copy_(source))


def lookups(device: str, contender: Contender, batches: tuple[int, ...]) -> Iterator[Row]:
    """Rows of one table: the kernel beside copy bandwidth and beside its formula in torch."""
    from embstore.bench.floor import bytes_read, lines_read
    from embstore.bench.kernels import NETWORKS

    scheme, config, tensors = contender.scheme, contender.config, contender.tensors
    dim, name = config.embedding_dim, " ".join(filter(None, (contender.scheme.name, contender.kind)))
    num_bytes = None
    for batch in batches:
        ids = torch.randint(config.num_embeddings, (DRAWS, batch), device=device)
        out = torch.empty((batch, dim), device=device)
        if num_bytes is None and scheme.name not in NETWORKS:
            num_bytes = 8 + 4 * dim + bytes_read(lines_read(scheme, config, tensors, ids[0])[0])
        scheme.lookup_reference(config, tensors, ids[0], out)
        expected = out.clone()
        scheme.lookup(config, tensors, ids[0], out)
        row: Row = {"what": f"{name} {contender.dtype} x {dim}", "ids": batch}
        if not float((out - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
            yield row | {"what": "FAILED", "note": f"{row['what']}: the kernel's vectors are not the formula's"}
            continue
        kernel = seconds_of(device, lambda at: scheme.lookup(config, tensors, ids[at % DRAWS], out))  # noqa: B023
        formula = seconds_of(device, lambda at: scheme.lookup_reference(config, tensors, ids[at % DRAWS], out))  # noqa: B023
        row |= {"us": round(kernel * 1e6, 1), "M ids/s": round(batch / kernel / 1e6, 1)}
        row["x reference"] = round(formula / kernel, 2)
        if num_bytes is not None:
            row["of copy"] = round(batch * num_bytes / kernel / copy_bytes_per_s(device), 3)
        yield row


def plain(device: str) -> Iterator[Row]:
    """The plain table: 128 float32 a row."""
    from embstore.bench.kernels import make_contender

    yield {"what": "copy", "note": f"{copy_bytes_per_s(device) / 1e9:,.0f} GB/s read and written"}
    small = device == "cpu"
    contender = make_contender("full", "", {}, 128, "float32", 1_000_000 if small else 8_000_000_000, device)
    batches = (1_000,) if small else (1_000, 10_000, 100_000, 1_000_000)
    for row in lookups(device, contender, batches):
        share = row.get("of copy", 0.0)
        bar = f"bar {BAR:.0%}: {'reached' if float(str(share)) >= BAR else 'missed'}"
        yield row | ({"note": bar} if row["ids"] == batches[-1] and "note" not in row else {})


def kernels(device: str) -> Iterator[Row]:
    """Every scheme in every kind, float32 first: what time runs out for is what matters least."""
    from embstore.bench.kernels import OPTIONS, make_contender
    from embstore.errors import ConfigError
    from embstore.schemes import SCHEMES

    small = device == "cpu"
    batches = (100,) if small else (1_000, 10_000, 100_000, 1_000_000)
    for dtype in ("float32", "float16", "int8"):
        for name in SCHEMES:
            for kind, options in OPTIONS.get(name, {"": {}}).items():
                try:
                    size = 1_000_000 if small else 512_000_000
                    contender = make_contender(name, kind, options, 64, dtype, size, device)
                except ConfigError:
                    if dtype == "float32":
                        raise
                    continue  # nothing of it gets smaller as this dtype
                try:
                    yield from lookups(device, contender, batches)
                except Exception as error:
                    yield {"what": "FAILED", "note": f"{name} {kind} {dtype}: {error}"}
                    torch.zeros(1, device=device).item()  # a device that has failed ends the part here


def tests(device: str) -> Iterator[Row]:
    """Every test that is marked gpu, on several processes where pytest-xdist is there; one row with their count."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    if device == "cpu":
        command.append("tests/unit/embstore/test_device.py")
    elif find_spec("xdist"):
        command += ["--numprocesses", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip("= ") for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    what = "FAILED" if ran.returncode else " ".join(command[2:6])
    yield {"what": what, "note": "; ".join([*lines[-1:], *failed[:5]])}


def pipeline(device: str) -> Iterator[Row]:
    """Requests handed to the server's handler: decoded, looked up, encoded; one at a time."""
    import asyncio

    from benchmarks.servers import Sizes, publish
    from server.app import create_app
    from server.settings import Settings

    async def measure(folder: Path, num_ids: int) -> list[Row]:
        app, rows = create_app(Settings(store=folder, device=device, cache="off")), list[Row]()  # type: ignore[arg-type]
        async with app.inner.router.lifespan_context(app.inner):  # type: ignore[attr-defined]
            for table in ("full", "qr"):
                while (await answered(app, table, bytes(8))).status == 503:  # tables are being loaded
                    await asyncio.sleep(0.05)
                for batch in (10, 1_000) if device == "cpu" else (10, 1_000, 10_000, 65_536):
                    rows.append(await timed(app, table, batch, num_ids))
        return rows

    async def timed(app: App, table: str, batch: int, num_ids: int) -> Row:
        random = np.random.default_rng(0)
        bodies = [random.integers(0, num_ids, batch).tobytes() for _ in range(DRAWS)]
        seconds: list[float] = []
        for at in range(5 if device == "cpu" else 200):
            begin = time.perf_counter()
            reply = await answered(app, table, bodies[at % DRAWS])
            seconds.append(time.perf_counter() - begin)
            if reply.status != 200:
                raise RuntimeError(f"a lookup of {table} was answered {reply.status}: {reply.body!r:.200}")
        middle = statistics.median(seconds[len(seconds) // 10 :])
        rate = round(batch / middle / 1e6, 3)
        return {"what": f"{table} x 64, one caller", "ids": batch, "us": round(middle * 1e6, 1), "M ids/s": rate}

    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(num_ids=2_000 if device == "cpu" else 2_000_000)
        publish(Path(folder), sizes, ("full", "qr"))
        yield from asyncio.run(measure(Path(folder), sizes.num_ids))


async def answered(app: App, table: str, body: bytes) -> Reply:
    """One lookup through the server's handler, octets in and out: all that lies between parser and socket."""
    from inspect import isawaitable

    from server.http.messages import Request
    from server.http.routing import LOOKUP, Route

    headers = {b"content-type": b"application/octet-stream", b"accept": b"application/octet-stream"}
    request = Request(b"POST", Route(LOOKUP, table), headers, body, b"benchmark", time.perf_counter())
    reply = app.services.handler.answer(request)
    answer: Reply = await reply if isawaitable(reply) else reply
    app.services.buffers.give_back(answer.leases)
    return answer


def http(device: str) -> Iterator[Row]:
    """The server and the load generator on this machine: replies a second, latency at half of that."""
    from benchmarks.load import Target, at_rate, percentiles, requests_per_s
    from benchmarks.processes import cores, serving
    from benchmarks.servers import Sizes, publish

    small, on = device == "cpu", cores()
    half = max(1, len(on) // 2)
    seconds, processes = (0.2, 1) if small else (2.0, min(4, max(1, len(on) - half)))
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(num_ids=2_000 if small else 2_000_000)
        publish(Path(folder) / "store", sizes, ("full",))
        command = ("embstore", "serve", "--store", f"{folder}/store", "--port", "0", "--device", device)
        with serving((*command, "--cache", "off"), Path(folder) / "log", on[:half]) as server:
            for batch in (10,) if small else (10, 1_000, 10_000):
                target = Target(
                    name="full", url=server.url, table="full", num_ids=sizes.num_ids, batch=batch, on=on[half:]
                )
                rate = requests_per_s(target, seconds, connections=32, processes=processes)
                idle = at_rate(target, rate / 2, seconds, processes=processes)
                row: Row = {"what": "full x 64, p50 / p99 at half load", "ids": batch, "us": percentiles(idle)}
                yield row | {"M ids/s": round(rate * batch / 1e6, 3), "note": f"{rate:,.0f} requests/s at most"}


def training(device: str) -> Iterator[Row]:
    """Steps of two tables of a scheme, a sixteenth of the bytes, and of nn.Embedding, in turns: users x items."""
    from embstore.bench.train import PLAIN, contenders, race
    from embstore.schemes import SCHEMES
    from embstore.train.config import DataConfig, TrainConfig

    small = device == "cpu"
    sizes, batch, steps = ((500, 200), 64, 4) if small else ((300_000, 50_000), 8_192, 64)
    config, on = TrainConfig(data=DataConfig(path="", user="", item="", time="")), torch.device(device)
    popular = torch.rand(steps, batch, device=on).pow(3).mul(sizes[1]).long()  # some items far more often than others
    batches = list(zip(torch.randint(sizes[0], (steps, batch), device=on), popular, strict=True))
    log_q_N = torch.zeros(sizes[1], device=on)
    for name in SCHEMES:
        made = contenders(sizes, config, 16, on, (name,))
        speed = race(made, batches, log_q_N, rounds=4)[1]
        row: Row = {"what": f"{name} x 64", "ids": batch, "us": round(1e6 * batch / speed.examples_per_s)}
        row |= {"x reference": round(speed.ratio, 2), "M ids/s": round(speed.examples_per_s / 1e6, 2)}
        yield row | {"note": f"of {PLAIN} {speed.least:.2f} .. {speed.most:.2f} by round"}


PARTS = {"plain": plain, "kernels": kernels, "tests": tests, "pipeline": pipeline, "http": http, "training": training}


def main(name: str, device: str) -> None:
    """Print the rows of a part as they are found; one line on stderr when something that it needs is not installed."""
    try:
        for row in PARTS[name](device):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        sys.exit(f"needs {error.name}: pip install -e '.[train,embedded,gpu]' -e clients/python")


if __name__ == "__main__":
    with ended_by_signals():
        main(*sys.argv[1:])
