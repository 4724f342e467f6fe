"""MEmCom: `e = V[x] * U[x mod m] (+ W[x]) (+ o)` (Pansare et al., MLSys 2022, arXiv 2203.10135).

One row per bucket, shared, and one trained weight per id (`bias`: and one trained offset, added to every column),
so ids that share a bucket still differ. With ids numbered by falling frequency the m most frequent own their row.

Stored: `shared` float32 [m, D] and `scale` float32 [n, 1] (4 m D + 4 n bytes), or with bias `scale_bias` float32
[n, 2], kept side by side so that they cost one cache line (4 m D + 8 n bytes). The ratio cannot pass D (D / 2 with
bias). `offset`: one more vector o, float32 [1, D], added to all: with it, one bucket is a rank-1 table with a mean.
Lookup: 4 D + 4 (8) bytes read, D multiplications (and D additions), one modulo.

Starts as the hashing trick: V = 1, W = 0. Do not normalise the vectors afterwards: that erases V's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget

cpu_gather, cuda_gather = Loops("cpu.gather"), Loops("cuda.gather")


@dataclass(frozen=True, kw_only=True)
class MEmComConfig(SchemeConfig):
    """num_buckets: rows of the shared table (m); bias: one more trained number per id, added to every column;
    offset: one trained vector, added to all."""

    num_buckets: int
    bias: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1)
        self.require_bool("bias", "offset")


class MEmCom(Scheme):
    """A shared row times the id's own weight, plus the id's own offset where `bias` is set."""

    name = "memcom"
    Config = MEmComConfig
    by_rank = True
    facts = Facts(
        vector="a shared row times its own number (plus one, plus an offset)",
        stored="4 m D + 4 n",
        reads="4 D + 4",
        ceiling="D",
        unseen="its own numbers, as they started",
    )
    config: MEmComConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config = self.config
        self.shared = normal((config.num_buckets, config.embedding_dim), std, generator=generator)
        if config.bias:
            self.scale_bias = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(config.num_embeddings, 1))
        else:
            self.scale = nn.Parameter(torch.ones(config.num_embeddings, 1))
        if config.offset:
            self.offset = nn.Parameter(torch.zeros(1, config.embedding_dim))

    @staticmethod
    def compose(config: MEmComConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = V[x] * U[x mod m] (+ W[x]) (+ o)."""
        shared = rows(tensors["shared"], ids % config.num_buckets)
        if config.bias:
            pair = rows(tensors["scale_bias"], ids)
            vectors = shared * pair[..., :1] + pair[..., 1:]
        else:
            vectors = shared * rows(tensors["scale"], ids)
        return vectors + tensors["offset"][0] if config.offset else vectors

    @staticmethod
    def lookup_cpu(config: MEmComConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = V[x] * U[x mod m] (+ W[x]) (+ o)."""
        if config.bias:
            cpu_gather.gather_scaled_biased(tensors["shared"], tensors["scale_bias"], ids_B, out_BD)
        else:
            cpu_gather.gather_scaled(tensors["shared"], tensors["scale"], ids_B, out_BD)
        if config.offset:
            cpu_gather.add_offset(tensors["offset"], ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: MEmComConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = V[x] * U[x mod m] (+ W[x]) (+ o)."""
        own, offset = tensors["scale_bias" if config.bias else "scale"], tensors.get("offset")
        cuda_gather.gather_scaled(tensors["shared"], own, offset, ids_B, out_BD)

    @classmethod
    def layout(cls, config: MEmComConfig) -> dict[str, TensorSpec]:
        """The shared table, the ids' own numbers, the offset."""
        n = config.num_embeddings
        own = {"scale_bias": TensorSpec((n, 2))} if config.bias else {"scale": TensorSpec((n, 1))}
        offset = {"offset": TensorSpec((1, config.embedding_dim))} if config.offset else {}
        return {"shared": TensorSpec((config.num_buckets, config.embedding_dim), rows=True), **own, **offset}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The ids' own numbers first, as many shared rows as the rest holds, never more than there are ids."""
        only_budget(options, "num_buckets")
        kind = cls.parameters_in(options)
        one = MEmComConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=1, **kind)
        least = sum(spec.num_bytes for spec in cls.layout(one).values())
        if num_bytes < least:
            ceiling = embedding_dim / (2 if one.bias else 1)
            raise ConfigError(
                f"memcom cannot be stored in {num_bytes:,} bytes here: the least is {least:,}, because each id keeps "
                f"{'two numbers' if one.bias else 'a number'} of its own; its ratio stays below {ceiling:g}"
            )
        num_buckets = min(1 + (num_bytes - least) // (4 * embedding_dim), num_embeddings)
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Per bucket the best rank-1 approximation of its vectors, less the weighted mean where there is an offset."""
        from embstore.fitting import rank_one_per_bucket, weighted_bucket_means

        config, state = self.config, {}
        if config.offset:
            one = torch.zeros(len(vectors_ND), dtype=torch.int64)
            state["offset"] = weighted_bucket_means(vectors_ND, one, 1, weights_N).float()
            vectors_ND = vectors_ND - state["offset"]
        bucket_N = torch.arange(len(vectors_ND)) % config.num_buckets
        if config.bias:
            rows, scale, bias = rank_one_per_bucket(
                vectors_ND, bucket_N, config.num_buckets, weights_N=weights_N, bias=True
            )
            state["scale_bias"] = torch.stack([scale, bias], dim=1).float()
        else:
            rows, scale = rank_one_per_bucket(vectors_ND, bucket_N, config.num_buckets, weights_N=weights_N)
            state["scale"] = scale[:, None].float()
        state["shared"] = rows.float()
        self.load_state_dict(state)
