"""Kernels beside eager torch and beside a plain gather: `python tests/bench/kernels.py [--json]`.

The gather is numpy's `take` of the same ids from the full table, measured in the same run. One thread; Zipf(1.05) ids
over two million; best of several rounds in which the candidates take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import show
from numpy.typing import NDArray

from embstore.schemes import QR, Full, Hash, MEmCom
from embstore.schemes.base import Scheme
from loadtest.workload import zipf_ids

NUM, DIM, ROUNDS, REQUESTS = 2_000_000, 64, 7, 200


def schemes() -> dict[str, Scheme]:
    """The tables: full, and the others at a sixteenth of its bytes."""
    budget = 4 * NUM * DIM // 16
    return {
        "full": Full(NUM, DIM),
        "hash": Hash.from_budget(NUM, DIM, budget),
        "qr mult": QR.from_budget(NUM, DIM, budget),
        "qr concat": QR.from_budget(NUM, DIM, budget, op="concat"),
        "memcom": MEmCom.from_budget(NUM, DIM, budget),
        "memcom bias": MEmCom.from_budget(NUM, DIM, budget, bias=True),
    }


def best_us(runs: dict[str, Callable[[int], Any]], requests: int) -> dict[str, float]:
    """Least microseconds per call of each, the candidates taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            for request in range(requests):
                run(request)
            best[name] = min(best[name], (time.perf_counter() - begin) / requests * 1e6)
    return best


def measure(name: str, module: Scheme, full: NDArray[np.float32], ids: NDArray[np.int64]) -> dict[str, Any]:
    """One row: this scheme's kernel, eager torch, and a gather from the full table, for ids [requests, batch]."""
    ids_tensor = torch.from_numpy(ids)
    out = np.empty((ids.shape[1], DIM), np.float32)
    state = {key: value.numpy() for key, value in module.state_dict().items()}

    def eager(i: int) -> None:
        with torch.no_grad():
            module.compose(ids_tensor[i])

    us = best_us(
        {
            "kernel": lambda i: module.lookup(module.config, state, ids[i], out),
            "eager": eager,
            "floor": lambda i: np.take(full, ids[i], axis=0, out=out, mode="clip"),
        },
        len(ids),
    )
    return {
        "scheme": name,
        "ids": ids.shape[1],
        "kernel us": round(us["kernel"], 1),
        "eager torch us": round(us["eager"], 1),
        "full gather us": round(us["floor"], 1),
        "eager / kernel": round(us["eager"] / us["kernel"], 2),
        "kernel / gather": round(us["kernel"] / us["floor"], 2),
    }


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    modules = schemes()
    full = modules["full"].state_dict()["weight"].numpy()
    rows = []
    for batch in (10, 1_000, 16_384):
        ids = zipf_ids(NUM, REQUESTS if batch < 10_000 else 20, batch)
        rows += [measure(name, module, full, ids) for name, module in modules.items()]
    show("Kernels, one thread, 2,000,000 ids x 64 float32", rows, as_json="--json" in sys.argv)


if __name__ == "__main__":
    main()
