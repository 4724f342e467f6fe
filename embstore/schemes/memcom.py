"""MEmCom: `e = V[x] * U[x mod m] (+ W[x])` (Pansare et al., MLSys 2022, arXiv 2203.10135).

One row per bucket, shared, and one trained weight per id (`bias`: and one trained offset, added to every column),
so ids that share a bucket still differ. With ids numbered by falling frequency the m most frequent own their row.

Stored: `shared` float32 [m, D] and `scale` float32 [n, 1] (4 m D + 4 n bytes), or with bias `scale_bias` float32
[n, 2], kept side by side so that they cost one cache line (4 m D + 8 n bytes). The ratio cannot pass D (D / 2 with
bias).
Lookup: 4 D + 4 (8) bytes read, D multiplications (and D additions), one modulo.

Starts as the hashing trick: V = 1, W = 0. Do not normalise the vectors afterwards: that erases V's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore import kernels
from embstore.errors import ConfigError
from embstore.schemes.base import Scheme, SchemeConfig, Tensors, buckets_in, normal, target_std


@dataclass(frozen=True, kw_only=True)
class MEmComConfig(SchemeConfig):
    """num_buckets: rows of the shared table (m); bias: one more trained number per id, added to every column."""

    num_buckets: int
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1)
        if not isinstance(self.bias, bool):
            raise ConfigError(f"bias must be true or false, got {self.bias!r}")


class MEmCom(Scheme):
    """A shared row times the id's own weight, plus the id's own offset where `bias` is set."""

    name = "memcom"
    Config = MEmComConfig
    config: MEmComConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_buckets: int,
        bias: bool = False,
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        config = MEmComConfig(
            num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=num_buckets, bias=bias
        )
        super().__init__(config, sparse=sparse)
        std = target_std(embedding_dim, init_std)
        self.shared = normal((num_buckets, embedding_dim), std, generator=generator)
        if bias:
            self.scale_bias = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(num_embeddings, 1))
        else:
            self.scale = nn.Parameter(torch.ones(num_embeddings, 1))

    def compose(self, ids: Tensor) -> Tensor:
        """e = V[x] * U[x mod m] (+ W[x])."""
        shared = self.rows(self.shared, ids % self.config.num_buckets)
        if not self.config.bias:
            return shared * self.rows(self.scale, ids)
        pair = self.rows(self.scale_bias, ids)
        return shared * pair[..., :1] + pair[..., 1:]

    @staticmethod
    def lookup(config: MEmComConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = V[x] * U[x mod m] (+ W[x])."""
        if config.bias:
            kernels.gather_scaled_biased(tensors["shared"], tensors["scale_bias"], ids_B, out_BD)
        else:
            kernels.gather_scaled(tensors["shared"], tensors["scale"], ids_B, out_BD)

    @classmethod
    def shapes(cls, config: MEmComConfig) -> dict[str, tuple[int, ...]]:
        """The shared table and the ids' own numbers."""
        own = {"scale_bias": (config.num_embeddings, 2)} if config.bias else {"scale": (config.num_embeddings, 1)}
        return {"shared": (config.num_buckets, config.embedding_dim), **own}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, bias: bool = False, **options: Any
    ) -> Self:
        """The ids' own numbers first, as many shared rows as the rest holds, never more than there are ids."""
        if "num_buckets" in options:
            raise ConfigError("give either a budget or num_buckets, not both")
        own_bytes = (8 if bias else 4) * num_embeddings
        num_buckets = min(buckets_in(num_bytes, 4 * embedding_dim, own_bytes, cls.name), num_embeddings)
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, bias=bias, **options)
