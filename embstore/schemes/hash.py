"""The hashing trick: `e = T[h(x)]` (Weinberger et al., ICML 2009). Ids that share a bucket share a vector.

`h(x) = x mod m` when `seed` is None: perfectly balanced for dense ids, and with ids numbered by falling frequency
the m most frequent ids never meet. With a seed, `h(x) = bucket(mix64(x, seed), m)`, for ids in no useful order.

Stored: `weight` float32 [num_buckets, embedding_dim]; 4 m D bytes, whatever the number of ids.
Lookup: 4 D bytes read, one modulo or hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from embstore.hashing import MAX_BUCKETS, bucket_torch
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, buckets_in, normal, only_budget

cpu_gather, cuda_gather = Loops("cpu.gather"), Loops("cuda.gather")


@dataclass(frozen=True, kw_only=True)
class HashConfig(SchemeConfig):
    """num_buckets: rows stored; seed: None for `x mod m`, or the seed of a 64-bit mixer."""

    num_buckets: int
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_BUCKETS)
        if self.seed is not None:
            self.require("seed", at_least=0, at_most=(1 << 63) - 1)


class Hash(Scheme):
    """Every id reads row `h(x)` of one small table."""

    name = "hash"
    Config = HashConfig
    by_rank = True
    facts = Facts(vector="a shared row", stored="4 m D", reads="4 D", ceiling="none", unseen="shares a trained row")
    config: HashConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        self.weight = normal((self.config.num_buckets, self.embedding_dim), std, generator=generator)

    @staticmethod
    def compose(config: HashConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = T[h(x)]."""
        return rows(tensors["weight"], buckets(config, ids))

    @staticmethod
    def lookup_cpu(config: HashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[h(x)]."""
        if config.seed is None:
            cpu_gather.gather_mod(tensors["weight"], ids_B, out_BD)
        else:
            cpu_gather.gather_hash(tensors["weight"], ids_B, config.seed, out_BD)

    @classmethod
    def lookup_gpu(cls, config: HashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[h(x)]."""
        if config.seed is None:
            cuda_gather.gather_mod(tensors["weight"], ids_B, out_BD)
        else:
            cuda_gather.gather_hash(tensors["weight"], ids_B, config.seed, out_BD)

    @classmethod
    def layout(cls, config: HashConfig) -> dict[str, TensorSpec]:
        """One table of `num_buckets` rows."""
        return {"weight": TensorSpec((config.num_buckets, config.embedding_dim), rows=True)}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """As many buckets as the budget holds, but never more than there are ids."""
        only_budget(options, "num_buckets")
        num_buckets = min(buckets_in(num_bytes, 4 * embedding_dim, 0, cls.name), num_embeddings, MAX_BUCKETS)
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Each row the weighted mean of its bucket's vectors, which is the least squares optimum."""
        from embstore.fitting import weighted_bucket_means

        bucket_N = buckets(self.config, torch.arange(len(vectors_ND)))
        means = weighted_bucket_means(vectors_ND, bucket_N, self.config.num_buckets, weights_N)
        self.load_state_dict({"weight": means.float()})


def buckets(config: HashConfig, ids: Tensor) -> Tensor:
    """h(x): the row that each id reads."""
    return ids % config.num_buckets if config.seed is None else bucket_torch(ids, config.num_buckets, config.seed)
