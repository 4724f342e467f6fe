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
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal

cpu_gather, cuda_gather = Loops("cpu.gather"), Loops("cuda.gather")


class Full(Scheme):
    """One row per id, as `torch.nn.Embedding` keeps it."""

    name = "full"
    Config = SchemeConfig
    facts = Facts(vector="its row", stored="4 n D", reads="4 D", ceiling="1", unseen="its row, as it started")

    def start(self, std: float, generator: torch.Generator | None) -> None:
        self.weight = normal((self.num_embeddings, self.embedding_dim), std, generator=generator)

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

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """The vectors themselves."""
        self.load_state_dict({"weight": vectors_ND.float()})
