"""A factorised table: `e = A[x] P (+ o)`, a short row per id times a projection that all share (and a shared offset).

ALBERT's factorised embeddings (Lan et al., ICLR 2020) and every truncated SVD have this form. The offset makes it
affine: one vector more, and rank 1 then spans a line that need not pass through the origin.

Stored: `factors` float32 [n, r], `projection` float32 [r, D] and `offset` float32 [1, D]: 4 (n r + r D + D) bytes. The
ratio cannot pass D / r. Only `factors` may be stored in fewer bits: the projection serves all ids.
Lookup: 4 r bytes read, the projection from the cache, 2 r D operations.

Starts with A ~ N(0, s), orthogonal rows of P of length sqrt(D / r) and o = 0: vectors have standard deviation s.
An id past the end has no row. One that was never trained keeps the vector it started with, as large as any other; the
scheme's own answer for an unknown id would be A = 0, which gives o. Vectors lie in r dimensions (plus o): a model that
multiplies the vectors of more than r features with one another sees fewer independent products than it has pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget
from embstore.schemes.parts.widths import orthogonal_rows

cpu_project, cuda_project = Loops("cpu.project"), Loops("cuda.project")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(SchemeConfig):
    """rank: columns of an id's own row (r); offset: one trained vector, added to all."""

    rank: int
    offset: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", at_least=1, at_most=self.embedding_dim)
        self.require_bool("offset")


class LowRank(Scheme):
    """A short row per id, projected to the full width."""

    name = "low_rank"
    Config = LowRankConfig
    tolerance = 2e-6
    facts = Facts(
        vector="r numbers of its own times an r x D matrix, plus an offset",
        stored="4 n r + 4 r D + 4 D",
        reads="4 r",
        ceiling="D",
        unseen="its own numbers, as they started",
    )
    config: LowRankConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config = self.config
        self.factors = normal((config.num_embeddings, config.rank), std, generator=generator)
        self.projection = nn.Parameter(orthogonal_rows(config.rank, config.embedding_dim, generator))
        if config.offset:
            self.offset = nn.Parameter(torch.zeros(1, config.embedding_dim))

    def networks(self) -> Iterable[nn.Parameter]:
        """The projection and the offset."""
        return (self.projection, self.offset) if self.config.offset else (self.projection,)

    @staticmethod
    def compose(config: LowRankConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = A[x] P (+ o)."""
        vectors = rows(tensors["factors"], ids) @ tensors["projection"]
        return vectors + tensors["offset"][0] if config.offset else vectors

    @staticmethod
    def lookup_cpu(config: LowRankConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = A[x] P (+ o)."""
        offset = tensors["offset"] if config.offset else np.zeros((1, config.embedding_dim), np.float32)
        cpu_project.project(tensors["factors"], tensors["projection"], offset, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: LowRankConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = A[x] P (+ o)."""
        cuda_project.project(tensors["factors"], tensors["projection"], tensors.get("offset"), ids_B, out_BD)

    @classmethod
    def layout(cls, config: LowRankConfig) -> dict[str, TensorSpec]:
        """The ids' own rows, what they are projected by, the offset."""
        offset = {"offset": TensorSpec((1, config.embedding_dim))} if config.offset else {}
        return {
            "factors": TensorSpec((config.num_embeddings, config.rank), rows=True),
            "projection": TensorSpec((config.rank, config.embedding_dim)),
            **offset,
        }

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The largest rank that the budget holds, at most `embedding_dim`."""
        only_budget(options, "rank")
        kind = cls.parameters_in(options)
        one = LowRankConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, rank=1, **kind)
        least, row_bytes = sum(s.num_bytes for s in cls.layout(one).values()), 4 * (num_embeddings + embedding_dim)
        if num_bytes < least:
            raise ConfigError(
                f"low_rank cannot be stored in {num_bytes:,} bytes here: the least is {least:,}, because each id keeps "
                f"a number of its own; its ratio stays below {embedding_dim}"
            )
        rank = min(1 + (num_bytes - least) // row_bytes, embedding_dim)
        return cls(num_embeddings, embedding_dim, rank=rank, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """The weighted truncated SVD (about the weighted mean, where there is an offset), which is the optimum."""
        from embstore.fitting import weighted_svd

        config = self.config
        factors, projection, offset = weighted_svd(vectors_ND, config.rank, weights_N=weights_N, offset=config.offset)
        state = {"factors": factors.float(), "projection": projection.float()}
        if config.offset:
            state["offset"] = offset.float()[None]
        self.load_state_dict(state)
