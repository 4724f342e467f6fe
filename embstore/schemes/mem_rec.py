"""MEM-REC: `e = (sum_j w[g_j(x)]) * (sum_j T[h_j(x)])` (Jha et al., 2023, arXiv 2305.07205). Two Bloom encodings of an
id: k_t rows of a small token table, k_w numbers of a weight table; neither grows with the number of ids.

It is MEmCom with both tables hashed: with k_t = k_w = 1 a row is shared by bucket and so is its weight. Hashes are
`bucket(mix64(x, seed + j), .)`, the first k_t for rows, the next k_w for numbers.

Stored: `tokens` float32 [m, D] and `weights` float32 [K, 1]; 4 m D + 4 K bytes, whatever the number of ids.
Lookup: 4 k_t D + 4 k_w bytes read, k_t D + k_w operations, k_t + k_w hashes; meant for tables that fit the last cache.

Unseen ids: any id has a vector, an untrained mixture of trained rows that cannot be told from a trained vector.
Starts: rows N(0, s / sqrt k_t) (less what ids that hit one row twice add), weights 1 / k_w, so that they sum to 1.
Do not normalise the vectors afterwards: that erases the weights' size.
"""

# Shapes: N num_embeddings, D embedding_dim, M num_buckets, S num_weights, K rows or numbers an id reads.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.hashing import MAX_BUCKETS, bucket_torch
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, buckets_in, normal, only_budget

cpu_hashed, cuda_hashed = Loops("cpu.hashed"), Loops("cuda.hashed")

WEIGHT_SHARE = 0.25
"""Of a budget for weights unless given: at 16x and D = 64 that is a number an id, which is what MEmCom spends."""
ROUNDS = 20
"""How often a fit goes from rows to weights and back: about what distillation by gradients reaches, much sooner."""


@dataclass(frozen=True, kw_only=True)
class MEMRecConfig(SchemeConfig):
    """num_buckets: rows of the token table (m); num_weights: numbers of the weight table (K); num_hashes and
    num_weight_hashes: rows and numbers that an id reads (k_t, k_w); seed: that of the first hash."""

    num_buckets: int
    num_weights: int
    num_hashes: int = 4
    num_weight_hashes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_BUCKETS)
        self.require("num_weights", at_least=1, at_most=MAX_BUCKETS)
        self.require("num_hashes", at_least=1, at_most=64)
        self.require("num_weight_hashes", at_least=1, at_most=64)
        self.require("seed", at_least=0, at_most=(1 << 63) - 1)


class MEMRec(Scheme):
    """A sum of hashed rows times a sum of hashed numbers."""

    name = "mem_rec"
    Config = MEMRecConfig
    facts = Facts(
        vector="the sum of k shared rows times a hashed number",
        stored="4 m D + 4 w",
        reads="4 k D",
        ceiling="none",
        unseen="a mixture",
    )
    config: MEMRecConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, num_hashes = self.config, self.config.num_hashes
        # Two hashes of one id that meet in one row (chance 1 / m) add their covariance.
        std /= (num_hashes + num_hashes * (num_hashes - 1) / config.num_buckets) ** 0.5
        self.tokens = normal((config.num_buckets, config.embedding_dim), std, generator=generator)
        self.weights = nn.Parameter(torch.full((config.num_weights, 1), 1 / config.num_weight_hashes))

    @staticmethod
    def compose(config: MEMRecConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = (sum_j w[g_j(x)]) * (sum_j T[h_j(x)])."""
        vectors = _sum(rows(tensors["tokens"], token_index(config, ids)))
        return vectors * _sum(rows(tensors["weights"], weight_index(config, ids)))

    @staticmethod
    def lookup_cpu(config: MEMRecConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (sum_j w[g_j(x)]) * (sum_j T[h_j(x)])."""
        hashes = (config.seed, config.num_hashes, config.num_weight_hashes)
        cpu_hashed.gather_mem_rec(tensors["tokens"], tensors["weights"], ids_B, *hashes, out_BD)

    @classmethod
    def lookup_gpu(cls, config: MEMRecConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (sum_j w[g_j(x)]) * (sum_j T[h_j(x)])."""
        hashes = (config.seed, config.num_hashes, config.num_weight_hashes)
        cuda_hashed.gather_mem_rec(tensors["tokens"], tensors["weights"], ids_B, *hashes, out_BD)

    @classmethod
    def layout(cls, config: MEMRecConfig) -> dict[str, TensorSpec]:
        """The token table and the weights."""
        return {
            "tokens": TensorSpec((config.num_buckets, config.embedding_dim), rows=True),
            "weights": TensorSpec((config.num_weights, 1)),
        }

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        num_weights: int | None = None,
        weight_share: float = WEIGHT_SHARE,
        **options: Any,
    ) -> Self:
        """The weights first, as many rows as the rest holds, never more than there are ids.

        num_weights: as many; None: `weight_share` of the budget, at least one weight and at most one an id.
        """
        only_budget(options, "num_buckets")
        if not 0 <= weight_share < 1:
            raise ConfigError(f"weight_share must be at least 0 and below 1, got {weight_share}")
        if num_weights is None:
            affordable = max(num_bytes, 0) - 4 * max(embedding_dim, 1)  # the least is one row and one number
            num_weights = int(min(weight_share * num_bytes, affordable) // 4)
            num_weights = max(1, min(num_weights, num_embeddings, MAX_BUCKETS))
        elif not isinstance(num_weights, int) or num_weights < 1:
            raise ConfigError(f"num_weights must be a whole number from 1, got {num_weights!r}")
        num_buckets = buckets_in(num_bytes, 4 * embedding_dim, 4 * num_weights, cls.name)
        num_buckets = min(num_buckets, num_embeddings, MAX_BUCKETS)
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, num_weights=num_weights, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Alternating least squares, by conjugate gradients: rows for given weights, then weights for given rows."""
        from embstore.fitting.checks import check_weights
        from embstore.fitting.sums import best_rows, compose

        config, ids_N = self.config, torch.arange(len(vectors_ND))
        token_NK, weight_NK = token_index(config, ids_N), weight_index(config, ids_N)
        mass_N = check_weights(weights_N, len(vectors_ND), vectors_ND.device)
        rows_MD, numbers_S1 = torch.zeros_like(self.tokens.data), self.weights.data
        for round_ in range(ROUNDS):
            alpha_N1 = compose(numbers_S1, weight_NK)
            rows_MD = best_rows(
                vectors_ND,
                token_NK,
                config.num_buckets,
                weights_N=weights_N,
                factors_NK=alpha_N1.expand(-1, config.num_hashes),
                start_RD=rows_MD,
            )
            sums_ND = compose(rows_MD, token_NK)
            square_N = sums_ND.double().square().sum(dim=1)
            if not square_N.any():
                break  # all vectors are 0
            wanted_N = (sums_ND.double() * vectors_ND).sum(dim=1) / square_N.clamp_min(1e-30)
            numbers_S1 = best_rows(
                wanted_N[:, None],
                weight_NK,
                config.num_weights,
                weights_N=mass_N * square_N,
                start_RD=numbers_S1.double(),
            )
            size = float(compose(numbers_S1, weight_NK).square().mean().sqrt()) or 1.0
            numbers_S1, rows_MD = (numbers_S1 / size).float(), (rows_MD * size).float()  # only the product counts
            if progress is not None:
                progress("rows and weights", round_ + 1, ROUNDS)
        self.load_state_dict({"tokens": rows_MD, "weights": numbers_S1})


def token_index(config: MEMRecConfig, ids: Tensor) -> Tensor:
    """The rows of `tokens` that ids read: `(*ids.shape, num_hashes)`."""
    seeds = range(config.seed, config.seed + config.num_hashes)
    return torch.stack([bucket_torch(ids, config.num_buckets, seed) for seed in seeds], dim=-1)


def weight_index(config: MEMRecConfig, ids: Tensor) -> Tensor:
    """The rows of `weights` that ids read: `(*ids.shape, num_weight_hashes)`."""
    first = config.seed + config.num_hashes
    seeds = range(first, first + config.num_weight_hashes)
    return torch.stack([bucket_torch(ids, config.num_weights, seed) for seed in seeds], dim=-1)


def _sum(rows: Tensor) -> Tensor:
    """The sum over the last dimension but one, first to last: the order is part of the definition."""
    first, *others = rows.unbind(-2)
    for other in others:
        first = first + other
    return first
