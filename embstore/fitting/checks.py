"""What every fit asks of its input."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from embstore.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

CHUNK_ELEMENTS = 1 << 22  # 16 MB of float32: large enough for full speed, small beside any table worth compressing


def chunks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices that cover `num_rows` rows, each of about CHUNK_ELEMENTS elements."""
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def working(vectors: Tensor) -> Tensor:
    """The vectors in the type that is computed in: float64 stays, everything else becomes float32."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def check_vectors(vectors_ND: Tensor) -> None:
    """DataError unless these are finite numbers of shape [N, D], with at least one of each."""
    if vectors_ND.ndim != 2 or 0 in vectors_ND.shape:
        raise DataError(f"vectors have shape [ids, dims], got {list(vectors_ND.shape)}")
    if not vectors_ND.is_floating_point():
        raise DataError(f"vectors are floating-point numbers, got {vectors_ND.dtype}")
    for at in chunks(*vectors_ND.shape):
        good_n = torch.isfinite(vectors_ND[at]).all(dim=1)
        if not good_n.all():
            row = at.start + int((~good_n).nonzero()[0])
            raise DataError(f"vectors hold NaN or infinity, first in row {row:,}")


def check_weights(weights_N: Tensor | None, num_vectors: int, device: torch.device) -> Tensor:
    """The weights as float64 with mean 1 (ones where none are given); DataError unless they can be weights."""
    if weights_N is None:
        return torch.ones(num_vectors, dtype=torch.float64, device=device)
    if weights_N.shape != (num_vectors,):
        raise DataError(f"weights have shape {list(weights_N.shape)}, there are {num_vectors:,} vectors")
    mass_N = weights_N.to(device=device, dtype=torch.float64)
    bad_N = ~(torch.isfinite(mass_N) & (mass_N >= 0))
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        raise DataError(f"weights are finite and at least 0, got {float(mass_N[row])} in row {row:,}")
    largest = mass_N.max()
    if largest == 0:
        raise DataError(f"all {num_vectors:,} weights are 0: at least one must be above")
    mass_N = mass_N / largest  # first, so that the sum of huge weights stays finite
    return mass_N * (num_vectors / mass_N.sum())


def checked(vectors_ND: Tensor, weights_N: Tensor | None) -> Tensor:
    """The weights of checked vectors, float64 with mean 1, on their device."""
    check_vectors(vectors_ND)
    return check_weights(weights_N, len(vectors_ND), vectors_ND.device)


def weighted_mean(vectors_ND: Tensor, mass_N: Tensor) -> Tensor:
    """The mean of the vectors, each as often as its weight says, in float64."""
    total_D = torch.zeros(vectors_ND.shape[1], dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(*vectors_ND.shape):
        total_D += mass_N[at] @ vectors_ND[at].double()
    return total_D / mass_N.sum()


def largest(vectors_ND: Tensor) -> float:
    """The largest magnitude among the vectors' elements."""
    return max(float(vectors_ND[at].abs().max()) for at in chunks(*vectors_ND.shape))


def relative(error: float, energy: float) -> float:
    """The root of error over energy, where energy may be 0."""
    return math.sqrt(error / energy) if energy else (math.inf if error else 0.0)
