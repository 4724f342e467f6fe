"""Best times of candidates that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def best_seconds(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.02
) -> dict[str, float]:
    """Least seconds a call of each; a round repeats a call for about `seconds`, and the candidates take turns.

    The least of several is the time without other programs' interruptions; taking turns makes a machine whose speed
    drifts slow all of them alike.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - begin) / repeats[name])
    return best
