"""Learned hashing: `e = T[c(x)]` with a stored map c: ids -> rows, learned from how often ids occur and from a cheap
embedding of them (Ghaemmaghami et al., 2022, arXiv 2203.15837). Ids that share a row are alike, not random.

`learn_map` gives the `num_hot` most frequent ids rows of their own and clusters the others: k-means on their
low-dimensional vectors, each id weighted by count ** `power`. A module that was told no vectors has c(x) = x mod m,
the hashing trick; `from_budget(.., frequencies=, vectors=)` and the constructor learn the map when they are given.

Stored: `weight` float32 [m, D] and `map` int32 [n]; 4 m D + 4 n bytes, so the ratio stays below D.
Lookup: 4 + 4 D bytes read, the second read depends on the first; no arithmetic.

Unseen ids have no place in the map. A new map moves rows: publish map and rows together, as one version does.
"""

# Shapes: N num_embeddings, D embedding_dim, M num_buckets, L dimensions of the vectors learned from.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.kernels import Array, Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget
from embstore.schemes.parts.popularity import checked_frequencies

cpu_split, cuda_split = Loops("cpu.split"), Loops("cuda.split")

HOT_SHARE = 0.4
"""Of the rows for hot ids where ids are known to differ in frequency; 0.3 to 0.5 is what there is advice for."""
POWER = 0.5
"""Clustering weighs an id by its count to this power: 1 would let few ids decide, 0 gives rows to noise."""
MAX_ROWS = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class LearnedHashConfig(SchemeConfig):
    """num_buckets: rows stored (m); num_hot: how many of them a learned map gives to one id each."""

    num_buckets: int
    num_hot: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_ROWS)
        most = self.num_embeddings if self.num_embeddings <= self.num_buckets else self.num_buckets - 1
        self.require("num_hot", at_least=0, at_most=most)


class LearnedHash(Scheme):
    """One row an id, found by a map that was learned."""

    name = "learned_hash"
    Config = LearnedHashConfig
    by_rank = True
    uses = frozenset({"frequencies", "vectors"})
    facts = Facts(
        vector="the shared row that a learned map says",
        stored="4 m D + 4 n",
        reads="4 D + 4",
        ceiling="D",
        unseen="the row of ids like it, as far as its start says",
    )
    config: LearnedHashConfig
    map: Tensor

    def start(
        self, std: float, generator: torch.Generator | None, *, frequencies: Any = None, vectors: Any = None
    ) -> None:
        """frequencies, vectors: what the map is learned from, as in `learn_map`; without vectors it is x mod m."""
        config = self.config
        self.weight = normal((config.num_buckets, config.embedding_dim), std, generator=generator)
        self.register_buffer("map", (torch.arange(config.num_embeddings) % config.num_buckets).int())
        if vectors is not None:
            self.learn_map(vectors, frequencies, generator=generator)

    @staticmethod
    def compose(config: LearnedHashConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = T[c(x)]."""
        return rows(tensors["weight"], tensors["map"][ids].long())

    @staticmethod
    def lookup_cpu(config: LearnedHashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[c(x)]."""
        cpu_split.gather_mapped(tensors["weight"], tensors["map"], ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: LearnedHashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[c(x)]."""
        cuda_split.gather_mapped(tensors["weight"], tensors["map"], ids_B, out_BD)

    @classmethod
    def layout(cls, config: LearnedHashConfig) -> dict[str, TensorSpec]:
        """The rows and the map."""
        return {
            "weight": TensorSpec((config.num_buckets, config.embedding_dim), rows=True),
            "map": TensorSpec((config.num_embeddings,), "int32"),
        }

    @classmethod
    def check_tensors(cls, config: LearnedHashConfig, tensors: Mapping[str, Array]) -> None:
        """VerificationFailed where the map leads out of the table: lookups follow it unchecked."""
        low, high = int(tensors["map"].min()), int(tensors["map"].max())
        if low < 0 or high >= config.num_buckets:
            raise VerificationFailed(
                f"the map leads to row {low if low < 0 else high}, the table has {config.num_buckets:,} rows"
            )

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        vectors: Any = None,
        hot_share: float = HOT_SHARE,
        **options: Any,
    ) -> Self:
        """The map first, as many rows as the rest holds, never more than there are ids; `hot_share` of them private.

        vectors: float [N, L], what the map is learned from; without them it is x mod m until `learn_map`.
        """
        only_budget(options, "num_buckets", "num_hot")
        if not 0 <= hot_share <= 1:
            raise ConfigError(f"hot_share must be at least 0 and at most 1, got {hot_share}")
        map_bytes, row_bytes = 4 * num_embeddings, 4 * embedding_dim
        if embedding_dim > 0 and num_bytes < map_bytes + row_bytes:
            raise ConfigError(
                f"learned_hash cannot be stored in {num_bytes:,} bytes here: the least is {map_bytes + row_bytes:,}, "
                f"because its map takes 4 bytes an id; its ratio stays below {embedding_dim}"
            )
        num_buckets = min((num_bytes - map_bytes) // max(row_bytes, 1), num_embeddings, MAX_ROWS)
        num_hot = min(round(hot_share * num_buckets), num_buckets if num_buckets == num_embeddings else num_buckets - 1)
        known = {"frequencies": frequencies, "vectors": vectors}
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, num_hot=num_hot, **known, **options)

    @torch.no_grad()
    def learn_map(
        self,
        vectors: Any,
        frequencies: Any = None,
        *,
        power: float = POWER,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Set the map: private rows for the hottest ids, clusters of `vectors` [N, L] for the others.

        frequencies: how often each id occurs; without them ids 0 .. num_hot - 1 are the hot ones (ids are numbered by
        falling frequency) and all others weigh the same. Rows keep what they hold: learn the map before training.
        """
        from embstore.fitting.clusters import many_clusters

        n, num_buckets, num_hot = self.num_embeddings, self.config.num_buckets, self.config.num_hot
        vectors_NL = torch.as_tensor(vectors)
        if vectors_NL.ndim != 2 or len(vectors_NL) != n:
            raise DataError(f"vectors to learn a map from are one for each of {n:,} ids, got {list(vectors_NL.shape)}")
        if num_buckets >= n:
            self.map.copy_(torch.arange(n))
            return
        weights_N = None if frequencies is None else checked_frequencies(frequencies, n)
        order_N = torch.arange(n) if weights_N is None else weights_N.argsort(descending=True, stable=True)
        hot, cold = order_N[:num_hot], order_N[num_hot:]
        mass = None if weights_N is None else weights_N[cold] ** power
        if mass is not None and not mass.any():
            mass = None  # none of them ever occurs: they are all alike
        labels = many_clusters(
            vectors_NL[cold], num_buckets - num_hot, weights_N=mass, generator=generator, progress=progress
        )[1]
        row_N = torch.empty(n, dtype=torch.int64)
        row_N[hot], row_N[cold] = torch.arange(num_hot), num_hot + labels.cpu()
        self.map.copy_(row_N)

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
        """Private rows for the heaviest ids and k-means over the others' vectors; rows are the weighted centroids.

        Without weights no id is hotter than another, and none gets a private row unless `hot_share` says so.
        """
        from embstore.fitting import weighted_bucket_means

        shares = {} if weights_N is not None else {"hot_share": 0.0}
        num_embeddings, embedding_dim = vectors_ND.shape
        module = cls.from_budget(num_embeddings, embedding_dim, num_bytes, generator=generator, **(shares | options))
        module.learn_map(vectors_ND, weights_N, power=1.0, generator=generator, progress=progress)
        rows_MD = weighted_bucket_means(vectors_ND, module.map.long(), module.config.num_buckets, weights_N)
        module.load_state_dict({"weight": rows_MD.float(), "map": module.map})
        return module
