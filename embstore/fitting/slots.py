"""The best numbers for vectors whose every number is read from one slot of a shared memory: a mean per slot."""

# Shapes: N vectors, n of them in a chunk, D dimensions, M slots.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embstore.fitting.checks import Progress, checked, chunks

Places = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From ids [n]: the slot that each number of their vectors is read from (int64 [n, D]), and which are negated."""


def weighted_slot_means(
    vectors_ND: Tensor,
    places: Places,
    num_slots: int,
    *,
    weights_N: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, float]:
    """The slots [M], float64, that minimise the weighted squared error, and the energy they explain.

    Every number of every vector is one slot's, perhaps negated, so each slot is the weighted mean of the numbers that
    read it (0 where none does). The error is the vectors' energy, `sum w |x|^2` with weights of mean 1, less what is
    explained.
    """
    mass_N = checked(vectors_ND, weights_N)
    num_vectors, device = len(vectors_ND), vectors_ND.device
    sum_M = torch.zeros(num_slots, dtype=torch.float64, device=device)
    mass_M = torch.zeros_like(sum_M)
    for at in chunks(*vectors_ND.shape):
        index_nD, negative_nD = places(torch.arange(at.start, at.stop, device=device))
        values_nD = vectors_ND[at].double() * mass_N[at, None]
        if negative_nD is not None:
            values_nD = torch.where(negative_nD, -values_nD, values_nD)
        sum_M.index_add_(0, index_nD.reshape(-1), values_nD.reshape(-1))
        mass_M.index_add_(0, index_nD.reshape(-1), mass_N[at, None].expand_as(values_nD).reshape(-1))
        if progress is not None:
            progress("averaging", at.stop, num_vectors)
    means_M = torch.where(mass_M > 0, sum_M / mass_M.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return means_M, float((sum_M * means_M).sum())
