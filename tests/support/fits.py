"""How close a fit comes to the vectors it was given."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def weighted_relative_error(vectors_ND: Tensor, approx_ND: Tensor, weights_N: Tensor | None = None) -> float:
    """sqrt(sum w |x - y|^2 / sum w |x|^2): 0 is exact, 1 is no better than zeros; infinite where all x are 0."""
    assert approx_ND.shape == vectors_ND.shape
    weights_N = torch.ones(len(vectors_ND)) if weights_N is None else weights_N
    x_ND, mass_N = vectors_ND.double(), weights_N.double()
    error = float(mass_N @ (x_ND - approx_ND.double()).square().sum(dim=1))
    energy = float(mass_N @ x_ND.square().sum(dim=1))
    return math.sqrt(error / energy) if energy else (math.inf if error else 0.0)


def least_squares_of_memory(module: Any, vectors_ND: Tensor, weights_N: Tensor) -> Tensor:
    """The best memory's vectors, by a general solver on the matrix of which number reads what."""
    size = module.config.memory_size
    columns = []
    for place in range(size):
        module.memory.data = torch.eye(size)[place]
        columns.append(module(torch.arange(len(vectors_ND))).detach().double().flatten())
    matrix = torch.stack(columns, dim=1)
    root = weights_N.double().sqrt()[:, None].expand_as(vectors_ND).flatten()
    solved = torch.linalg.lstsq(matrix * root[:, None], vectors_ND.double().flatten() * root, driver="gelsd").solution
    return (matrix @ solved).reshape(vectors_ND.shape)


def planted(num_ids: int, num_clusters: int, width: int, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Vectors around distant centres, and the cluster of each."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(num_clusters, width, generator=generator) * 5
    cluster_N = torch.arange(num_ids) % num_clusters
    return centres[cluster_N] + noise * torch.randn(num_ids, width, generator=generator), cluster_N


def made(seed: int) -> torch.Generator:
    """A generator in a known state."""
    return torch.Generator().manual_seed(seed)


class Shared(nn.Module):
    """A hashing trick with a network behind it: parameters of every kind, a buffer, sparse gradients on request."""

    def __init__(self, num_rows: int, dim: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(num_rows, dim) * 0.1)
        self.last = nn.Linear(dim, dim)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by id mod M, through a layer."""
        if self.training:
            self.seen += 1
        rows = nn.functional.embedding(ids % len(self.weight), self.weight, sparse=self.sparse)
        found: Tensor = self.last(rows)
        return found
