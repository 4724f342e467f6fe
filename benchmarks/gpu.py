"""Everything that needs an NVIDIA card, in eight minutes: tests, kernels, server, training, as one Markdown table.

    python -m benchmarks.gpu [--out gpu.md] [--part kernels] [--smoke]

Every part is a process with a time limit of its own (benchmarks/gpu_parts.py), so that one that fails or hangs is a row
that says so, and the others are measured; the exit code is then 1. Without a CUDA device there is nothing to measure,
and the exit code is 0. `--smoke` runs it all on the CPU with tiny sizes: its figures mean nothing.

On a bare machine with torch and triton, from the root of a checkout:

    pip install -e '.[train,embedded,gpu]' -e clients/python pytest pytest-timeout pytest-xdist hypothesis
    python -m benchmarks.gpu

Without the first line the kernels and the training step run (they need numpy, torch and triton alone), and the other
parts say what they lack.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.show import PACKAGES, Row, markdown
from embstore.common.machine import describe

COLUMNS = ("part", "what", "ids", "us", "M ids/s", "of copy", "x reference", "note")
END_SECONDS = 15.0
"""What a part that is told to stop has to end its servers."""


@dataclass(frozen=True)
class Part:
    """A part of the run: what it measures, and seconds after which it is ended."""

    about: str
    seconds: float


PARTS = {
    "plain": Part("the plain table, 128 float32 a row, beside the card's copy bandwidth", 40),
    "kernels": Part("every scheme, float32, float16 and int8, beside copy bandwidth and torch (`compose`)", 150),
    "tests": Part("pytest -m gpu", 130),
    "pipeline": Part("a whole request through the server's handler, in process", 40),
    "http": Part("the server over HTTP, load from this machine", 50),
    "training": Part("the training step of a scheme beside nn.Embedding", 60),
}
SMOKE_SECONDS = 300.0
"""Of every part on a CPU, where loops may have to be compiled first."""


def run_part(name: str, command: Sequence[str], seconds: float) -> list[Row]:
    """Rows that a process printed, one JSON object a line; one more where it failed or was ended after `seconds`."""
    failure = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            failure = f"not finished in {seconds:g} s: what is missing was not measured"
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        out.seek(0)
        rows: list[Row] = [{"part": name} | json.loads(line) for line in out if line[0] == "{" and line[-2:] == "}\n"]
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if process.returncode and not failure:
        failure = f"exit code {process.returncode}: {said[-1] if said else 'it said nothing'}"
    return [*rows, {"part": name, "what": "FAILED", "note": failure}] if failure else rows


def table(rows: Sequence[Row], about: str) -> str:
    """The one table, what it was measured on above it."""
    return f"{about}\n\n{markdown(rows, COLUMNS)}\n"


def described(device: str) -> str:
    """Card and versions, or the CPU."""
    import torch

    facts: Row = dict(describe(*PACKAGES))
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        size = f"{card.total_memory / (1 << 30):.0f} GiB, L2 {getattr(card, 'L2_cache_size', 0) >> 20} MiB"
        facts = {"card": f"{card.name}, {size}"} | facts
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="file of the table, written after each part")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does the script work?")
    asked = parser.parse_args(arguments)
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        sys.stderr.write(f"benchmarks.gpu needs {error.name}: pip install numpy torch triton\n")
        return 1
    if not asked.smoke and not torch.cuda.is_available():
        sys.stdout.write("no CUDA device: nothing to measure\n")
        return 0
    device = "cpu" if asked.smoke else "cuda"
    about, rows = described(device), list[Row]()
    for name in asked.part or PARTS:
        sys.stderr.write(f"{name}: {PARTS[name].about}\n")
        seconds = SMOKE_SECONDS if asked.smoke else PARTS[name].seconds
        rows += run_part(name, [sys.executable, "-m", "benchmarks.gpu_parts", name, device], seconds)
        asked.out.write_text(table(rows, about), "utf-8")
    sys.stdout.write(table(rows, about))
    return int(any(row["what"] == "FAILED" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
