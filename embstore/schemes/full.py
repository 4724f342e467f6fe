"""The plain table: `e = W[x]`. The baseline that every other scheme is compared with.

Stored: `weight` float32 [num_embeddings, embedding_dim], 4 D bytes per id (256 at D = 64).
Lookup: 4 D bytes read, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Progress, Rows, Scheme, SchemeConfig, Tensors, normal, target_std

cpu_gather = Loops("cpu.gather")


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

    @staticmethod
    def compose(config: Any, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = W[x]."""
        return rows(tensors["weight"], ids)

    @staticmethod
    def lookup_cpu(config: Any, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = W[x]."""
        cpu_gather.gather(tensors["weight"], ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: Any, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = W[x]."""
        from embstore.kernels.cuda import gather as cuda_gather

        cuda_gather.gather(tensors["weight"], ids_B, out_BD)

    @classmethod
    def layout(cls, config: SchemeConfig) -> dict[str, TensorSpec]:
        """One table."""
        return {"weight": TensorSpec((config.num_embeddings, config.embedding_dim), rows=True)}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """A full table has one size; ConfigError unless the budget holds it."""
        need = 4 * num_embeddings * embedding_dim
        if num_bytes < need:
            raise ConfigError(
                f"full cannot be stored in {num_bytes:,} bytes: the least is {need:,}, for {num_embeddings:,} rows of "
                f"{embedding_dim} float32"
            )
        return cls(num_embeddings, embedding_dim, **options)

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """The vectors themselves."""
        num_embeddings, embedding_dim = vectors_ND.shape
        module = cls.from_budget(num_embeddings, embedding_dim, num_bytes, generator=generator, **options)
        module.load_state_dict({"weight": vectors_ND.float()})
        return module
