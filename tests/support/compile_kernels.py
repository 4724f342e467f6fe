"""Compile the lookups of every scheme for a GPU that is not there; print launches and compilations as JSON.

Run as a program of its own: triton is told of an H100 by a driver that only has a name, and launches stop short.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from embstore.errors import ConfigError
from support.scheme_cases import ALL, Case, stored_tensors


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class Counted:
    """How many launches there were and how many programs they needed compiled."""

    launches = 0
    programs: set[int] = set()  # noqa: RUF012  one counter, one process


def count_instead_of_launching(run: Any) -> Any:
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        Counted.launches += 1
        Counted.programs.add(id(kernel))
        return kernel

    return compile_only


def look_up(case: Case, dtype: str) -> dict[str, int]:
    module = case.filled(n=1000, d=64, m=16)
    config, tensors = module.export()[0], stored_tensors(module, dtype)
    launches = Counted.launches

    def lookup(ids: torch.Tensor, out: torch.Tensor) -> None:
        case.cls.lookup_gpu(config, tensors, ids, out)

    lookup(torch.arange(1000), torch.empty(1000, 64))
    launches, programs = Counted.launches - launches, len(Counted.programs)
    for size in (1, 16, 33, 999):
        lookup(torch.arange(size + 1)[1:] % 1000, torch.empty(size + 1, 64)[1:])
        lookup(torch.arange(size) % 1000, torch.empty(size * 64 + 1)[1:].view(size, 64))
    return {"launches": launches, "compiled_later": len(Counted.programs) - programs}


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = count_instead_of_launching(JITFunction.run)
    said: dict[str, dict[str, Any]] = {}
    for label, case in ALL:
        said[label] = {}
        for dtype in ("float32", "int8"):
            try:
                said[label][dtype] = look_up(case, dtype)
            except ConfigError as error:
                sys.stderr.write(f"{label} cannot be stored as {dtype}: {error}\n")
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
