"""Small pq modules and vectors for their tests."""

# Shapes: N ids, D embedding_dim.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embstore.schemes import PQ

N, D = 300, 16


def filled(module: Any, seed: int = 0) -> Any:
    """The module with codes and numbers drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1, generator=generator)
        module.codes.random_(0, module.config.num_codes, generator=generator)
    return module


def clustered(seed: int = 0, num_vectors: int = N, dim: int = D) -> Tensor:
    """Vectors around a few centres, with columns that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix_DD = torch.randn(dim, dim, generator=generator) * torch.arange(1, dim + 1).pow(-0.7)[:, None]
    centres = 2 * torch.randn(12, dim, generator=generator)
    which = torch.randint(12, (num_vectors,), generator=generator)
    return (torch.randn(num_vectors, dim, generator=generator) + centres[which]) @ mix_DD


def decoded(module: Any) -> Tensor:
    """All vectors, as they are served."""
    vectors: Tensor = module.eval()(torch.arange(module.num_embeddings)).detach()
    return vectors


def fitted(vectors: Tensor, num_parts: int, num_codes: int, **options: Any) -> PQ:
    """A fit of these sizes."""
    given = {"num_parts": num_parts, "num_codes": num_codes, "generator": torch.Generator().manual_seed(0)} | options
    return PQ.fit(vectors, 1 << 40, **given)
