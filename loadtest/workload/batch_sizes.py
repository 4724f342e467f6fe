"""How many ids each request has."""

# Shapes: R requests.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import Batch


class Batches:
    """Sizes as a scenario asks for them, the same for the same seed."""

    def __init__(self, batch: Batch, seed: int | list[int]) -> None:
        self.batch, self.rng = batch, np.random.default_rng(seed)

    def draw(self, count: int) -> NDArray[np.int64]:
        """The next sizes [R], each at least 1."""
        batch, rng = self.batch, self.rng
        match batch.kind:
            case "fixed":
                return np.full(count, batch.size, np.int64)
            case "uniform":
                return rng.integers(batch.min, batch.max, size=count, endpoint=True)
            case "lognormal":
                sizes_R = np.rint(rng.lognormal(np.log(batch.size), batch.sigma, count))
                return np.clip(sizes_R, 1, batch.max).astype(np.int64)
            case "choice":
                weights = np.array(batch.weights or [1.0] * len(batch.sizes))
                return rng.choice(np.array(batch.sizes, np.int64), count, p=weights / weights.sum())
        raise ScenarioError(f"batch.kind must be fixed, uniform, lognormal or choice, got {batch.kind!r}")


def largest(batch: Batch) -> int:
    """The most ids that a request may have."""
    return {"fixed": batch.size, "choice": max(batch.sizes, default=1)}.get(batch.kind, batch.max)
