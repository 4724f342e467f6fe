"""Compiled loops: where their machine code is kept, and that it is the right one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import types

from embstore.kernels.cpu.compile import Kernel, compiled
from embstore.kernels.cpu.rows import IDS, OUT, void

pytestmark = pytest.mark.slow


def test_a_loop_without_a_cache_still_works_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Where numba finds no place for machine code, a loop is compiled in memory, and the log has it."""
    namespace: dict[str, object] = {}
    exec("def double(x):\n    return 2 * x\n", namespace)  # a function without a file: numba cannot cache it
    with caplog.at_level(logging.WARNING):
        double = compiled(types.int64(types.int64))(namespace["double"])
    assert double(np.int64(21)) == 42
    assert "double is compiled without a cache" in caplog.text


def test_the_kernels_are_cached_on_disk() -> None:
    """Loops that have a file keep their code: a server does not compile at start."""
    from embstore.kernels.cpu.gather import gather

    table = np.zeros((3, 2), np.float32)
    gather(table, np.arange(3), np.empty((3, 2), np.float32))
    loop = gather._compiled("f")
    assert loop._cache.cache_path
    assert sum(loop.stats.cache_hits.values()) + sum(loop.stats.cache_misses.values()) >= 1


def test_a_dtype_is_compiled_when_it_is_first_seen() -> None:
    """One loop, several storage dtypes: each gets code of its own, and a later call finds it."""
    calls: list[object] = []

    def fill(table, ids, out):  # type: ignore[no-untyped-def]
        for i in range(ids.shape[0]):
            out[i, 0] = table.itemsize

    def signature(table: object) -> object:
        calls.append(table)
        return void(table, IDS, OUT)

    loop, out = Kernel(fill, signature), np.empty((2, 1), np.float32)
    for dtype, size in ((np.float32, 4), (np.int16, 2), (np.uint8, 1), (np.float32, 4), (np.uint8, 1)):
        loop(np.zeros((3, 12), dtype), np.arange(2), out)
        assert (out == size).all()
    assert len(calls) == 3


COMPILED_BY_SEVERAL = """
import sys, time
import numpy as np
from numba.core.caching import IndexDataCacheFile
from embstore.kernels.cpu import gather as cpu_gather

save, dtype = IndexDataCacheFile._save_index, sys.argv[1]

def save_late(self, overloads):
    time.sleep(0.5)  # another process that came to here meanwhile has read the same index
    save(self, overloads)

IndexDataCacheFile._save_index = save_late
print("ready", flush=True)
sys.stdin.readline()
cpu_gather.gather.prepare(np.zeros((3, 2), dtype))
"""

READ_BACK = """
import sys
import numpy as np
from embstore.kernels.cpu import gather as cpu_gather

def bits(number, dtype):
    return np.array([[number]], dtype).view({4: np.float32, 2: np.int16}[np.dtype(dtype).itemsize])

for dtype in (np.float32, np.float16):
    out = np.zeros((1, 1), np.float32)
    cpu_gather.gather(bits(1.5, dtype), np.zeros(1, np.int64), out)
    assert out[0, 0] == 1.5, (dtype, out)
    assert sum(cpu_gather.gather._compiled(bits(1, dtype).dtype.char).stats.cache_hits.values()) == int(sys.argv[1])
print("right")
"""


def start_python(code: str, cache: Path, *arguments: str) -> Any:
    """A process that keeps machine code in `cache`."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **pipes)


def said_by(process: Any) -> str:
    """Everything it writes until it ends."""
    return str(process.communicate()[0])


def test_processes_that_compile_at_once_keep_each_its_own_code(tmp_path: Path) -> None:
    """Two processes compile one loop for two dtypes at the same moment; what is then on disk is right for both."""
    writers = [start_python(COMPILED_BY_SEVERAL, tmp_path, dtype) for dtype in ("float32", "int16")]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [said_by(writer) for writer in writers] == [""] * 2
    assert said_by(start_python(READ_BACK, tmp_path, "1")) == "right\n"


def test_code_that_cannot_be_read_is_compiled_again(tmp_path: Path) -> None:
    """A power cut left empty files in the cache: the loop works, the log has it, and the cache is whole again."""
    assert said_by(start_python(READ_BACK, tmp_path, "0")) == "right\n"
    for path in tmp_path.rglob("gather.gather-*.nbc"):
        path.write_bytes(b"")
    said = said_by(start_python(READ_BACK, tmp_path, "0"))
    assert said.startswith("the code kept of gather cannot be read and is made anew")
    assert said.endswith("right\n")
    assert said_by(start_python(READ_BACK, tmp_path, "1")) == "right\n"
