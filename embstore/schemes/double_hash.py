"""Several hashes an id: `e = sum_j T_j[h_j(x)]`, or the concatenation of the rows (Zhang et al., RecSys 2020, arXiv
2007.14523; Bloom embeddings, Serra and Karatzoglou, RecSys 2017). Two ids share a vector only if they share every row.

`h_j(x) = bucket(mix64(x, seed + j), m)`, j < k. The k hashes read one table (`shared_table`) or one each, stacked in
one tensor. With `num_weights` = K, row j is multiplied by `weights[x mod K, j]`, a number that the K most frequent ids
own and the others share (Hash Embeddings, Svenstrup et al., NeurIPS 2017): at equal bytes that is worth far more than
rows (the cce library's logs of MovieLens-1M at 19x, AUC, full 0.874: mean of 4 rows 0.622, 4 rows concatenated 0.726,
weighted 0.810).

Stored: `weight` float32 [m, W], [k m, W] for a table each, where W is D (`sum`) or D / k (`concat`); `weights` float32
[K, k]. 4 m W (k) + 4 K k bytes, whatever the number of ids.
Lookup: `sum` reads 4 k D bytes, `concat` 4 D in k places; k hashes, (k - 1) D additions, k D multiplications with
weights, which are 4 k bytes more.

Unseen ids: any id has a vector, an untrained mixture of trained rows that cannot be told from a trained vector.
Starts: rows N(0, s / sqrt k) for `sum` (less what ids that hit one row twice add), N(0, s) for `concat`; weights 1.
"""

# Shapes: N num_embeddings, D embedding_dim, K hashes an id, M num_buckets, S num_weights, W columns of the table.

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

OPS = ("sum", "concat")
ROUNDS = 20
"""How often a fit goes from rows to weights and back: about what distillation by gradients reaches, much sooner."""


@dataclass(frozen=True, kw_only=True)
class DoubleHashConfig(SchemeConfig):
    """num_buckets: rows of a table; num_hashes: rows an id reads; op: how they become one vector; shared_table: all
    hashes read one table; num_weights: slots of weights (None: no weights); seed: that of the first hash."""

    num_buckets: int
    num_hashes: int = 2
    op: str = "sum"
    shared_table: bool = True
    num_weights: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_BUCKETS)
        self.require("num_hashes", at_least=1, at_most=64)
        self.require("seed", at_least=0, at_most=(1 << 63) - 1)
        if self.num_weights is not None:
            self.require("num_weights", at_least=1)
        self.require_bool("shared_table")
        self.require_one_of("op", OPS)
        if self.op == "concat" and self.embedding_dim % self.num_hashes:
            raise ConfigError(
                f"op 'concat' cuts a vector into {self.num_hashes} equal parts: embedding_dim must be a multiple of "
                f"num_hashes, got {self.embedding_dim}"
            )

    @property
    def width(self) -> int:
        """Columns of the table."""
        return self.embedding_dim if self.op == "sum" else self.embedding_dim // self.num_hashes

    @property
    def num_tables(self) -> int:
        """Tables stacked in `weight`."""
        return 1 if self.shared_table else self.num_hashes


class DoubleHash(Scheme):
    """Several hashed rows, summed or concatenated."""

    name = "double_hash"
    Config = DoubleHashConfig
    facts = Facts(
        vector="k shared rows, added or joined",
        stored="4 m D (+ weights)",
        reads="4 k D (joined: 4 D)",
        ceiling="none",
        unseen="a mixture of trained rows",
    )
    config: DoubleHashConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, num_hashes = self.config, self.config.num_hashes
        if config.op == "sum":  # two hashes of one id that meet in one row (chance 1 / m) add their covariance
            twice = num_hashes * (num_hashes - 1) / config.num_buckets if config.shared_table else 0
            std /= (num_hashes + twice) ** 0.5
        self.weight = normal((config.num_tables * config.num_buckets, config.width), std, generator=generator)
        if config.num_weights is not None:
            self.weights = nn.Parameter(torch.ones(config.num_weights, num_hashes))

    @staticmethod
    def compose(config: DoubleHashConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = sum_j (w_j(x)) T_j[h_j(x)], or their concatenation."""
        parts = list(rows(tensors["weight"], row_index(config, ids)).unbind(-2))
        if config.num_weights is not None:
            factors = rows(tensors["weights"], ids % config.num_weights)
            parts = [part * factors[..., j, None] for j, part in enumerate(parts)]
        if config.op == "concat":
            return torch.cat(parts, dim=-1)
        vectors = parts[0]
        for part in parts[1:]:
            vectors = vectors + part
        return vectors

    @staticmethod
    def lookup_cpu(config: DoubleHashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = sum_j (w_j(x)) T_j[h_j(x)], or their concatenation."""
        hashes = (config.seed, config.num_hashes, config.num_buckets, config.shared_table, config.op == "concat")
        cpu_hashed.gather_hashes(tensors["weight"], tensors.get("weights"), ids_B, *hashes, out_BD)

    @classmethod
    def lookup_gpu(cls, config: DoubleHashConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = sum_j (w_j(x)) T_j[h_j(x)], or their concatenation."""
        how = {"shared": config.shared_table, "concat": config.op == "concat", "out_BD": out_BD}
        hashes = (config.seed, config.num_hashes, config.num_buckets)
        cuda_hashed.gather_hashes(tensors["weight"], tensors.get("weights"), ids_B, *hashes, **how)

    @classmethod
    def layout(cls, config: DoubleHashConfig) -> dict[str, TensorSpec]:
        """The table (or the stacked tables), and the weights."""
        own = {} if config.num_weights is None else {"weights": TensorSpec((config.num_weights, config.num_hashes))}
        return {"weight": TensorSpec((config.num_tables * config.num_buckets, config.width), rows=True), **own}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The weights first, as many buckets as the rest holds, never more than there are ids."""
        only_budget(options, "num_buckets")
        shape = cls.parameters_in(options)
        one = DoubleHashConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=1, **shape)
        weight_bytes = 4 * (one.num_weights or 0) * one.num_hashes
        fitting = buckets_in(num_bytes, 4 * one.width * one.num_tables, weight_bytes, cls.name)
        num_buckets = min(fitting, num_embeddings, MAX_BUCKETS)
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """The least squares rows, by conjugate gradients; with weights, alternating with the least squares weights.

        `concat` without weights is exact at once: every row is the mean of the parts that read it.
        """
        from embstore.fitting.sums import best_factors, best_rows

        config, num_hashes, num_rows = self.config, self.config.num_hashes, len(self.weight)
        ids_N = torch.arange(len(vectors_ND))
        index_NK = row_index(config, ids_N)
        num_slots = config.num_weights or 1
        slot_N = ids_N % num_slots
        if config.op == "concat":  # every part of a vector is a vector of one row
            vectors_ND, index_NK = vectors_ND.reshape(-1, config.width), index_NK.reshape(-1, 1)
            weights_N = None if weights_N is None else weights_N.repeat_interleave(num_hashes)
            slot_N = (slot_N[:, None] * num_hashes + torch.arange(num_hashes)).reshape(-1)
            num_slots *= num_hashes
        if config.num_weights is None:
            rows_RW = best_rows(vectors_ND, index_NK, num_rows, weights_N=weights_N, progress=progress)
            self.load_state_dict({"weight": rows_RW.float()})
            return

        factors_SK, rows_RW = torch.ones(num_slots, index_NK.shape[1]), torch.zeros(num_rows, config.width)
        for round_ in range(ROUNDS):
            factors_NK = factors_SK[slot_N]
            rows_RW = best_rows(
                vectors_ND, index_NK, num_rows, weights_N=weights_N, factors_NK=factors_NK, start_RD=rows_RW
            )
            factors_SK = best_factors(vectors_ND, index_NK, rows_RW, slot_N, num_slots, weights_N=weights_N)
            size = float(factors_SK.square().mean().sqrt()) or 1.0  # only the product counts: weights of size 1
            factors_SK, rows_RW = factors_SK / size, rows_RW * size
            if progress is not None:
                progress("rows and weights", round_ + 1, ROUNDS)
        self.load_state_dict({"weight": rows_RW.float(), "weights": factors_SK.float().reshape(-1, num_hashes)})


def row_index(config: DoubleHashConfig, ids: Tensor) -> Tensor:
    """The rows of `weight` that ids read: `(*ids.shape, num_hashes)`."""
    stride = 0 if config.shared_table else config.num_buckets
    hashed = [bucket_torch(ids, config.num_buckets, config.seed + j) + j * stride for j in range(config.num_hashes)]
    return torch.stack(hashed, dim=-1)
