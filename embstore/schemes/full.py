"""The plain table: `e = W[x]`. The baseline that every other scheme is compared with.

Stored: `weight` float32 [num_embeddings, embedding_dim], 4 D bytes per id (256 at D = 64).
Lookup: 4 D bytes read, no arithmetic.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from embstore import kernels
from embstore.errors import ConfigError
from embstore.schemes.base import Scheme, SchemeConfig, Tensors, normal, target_std


class Full(Scheme):
    """One row per id, as `torch.nn.Embedding` keeps it."""

    name = "full"
    Config = SchemeConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim), sparse=sparse)
        std = target_std(embedding_dim, init_std)
        self.weight = normal((num_embeddings, embedding_dim), std, generator=generator)

    def compose(self, ids: Tensor) -> Tensor:
        """e = W[x]."""
        return self.rows(self.weight, ids)

    @staticmethod
    def lookup(config: SchemeConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:  # noqa: ARG004
        """e = W[x]."""
        kernels.gather(tensors["weight"], ids_B, out_BD)

    @classmethod
    def shapes(cls, config: SchemeConfig) -> dict[str, tuple[int, ...]]:
        """One table."""
        return {"weight": (config.num_embeddings, config.embedding_dim)}

    @classmethod
    def from_budget(cls, num_embeddings: int, embedding_dim: int, num_bytes: int, **options: Any) -> Self:
        """A full table has one size; ConfigError unless the budget holds it."""
        need = 4 * num_embeddings * embedding_dim
        if num_bytes < need:
            raise ConfigError(
                f"full needs {need:,} bytes for {num_embeddings:,} x {embedding_dim}, the budget is {num_bytes:,}"
            )
        return cls(num_embeddings, embedding_dim, **options)
