"""Frequency split: the most frequent ids own their rows, the others share what is left (the split of Twitter's
hybrid, arXiv 2007.14523, whose rest is hashed twice; here once).

`e = T[x]` for x < H (ids are numbered by falling frequency, so these are the H most frequent), else
`e = T[H + (x - H) mod C]`, or, with a seed, `e = T[H + bucket(mix64(x, seed), C)]`.

Stored: `weight` float32 [H + C, D], the hot rows first; 4 (H + C) D bytes, no map.
Lookup: 4 D bytes read, one comparison, and for cold ids one modulo or hash.

Unseen ids land in the shared rows, as rare ids do: the best behaved scheme here. H = n is the full table, H = 0 the
hashing trick, C = 1 a table of the frequent ids with one row for all others.
"""

# Shapes: N num_embeddings, D embedding_dim, R rows stored.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any, Self

import torch
from torch import Tensor

from embstore.errors import ConfigError
from embstore.hashing import MAX_BUCKETS, bucket_torch
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, buckets_in, normal, only_budget
from embstore.schemes.parts.popularity import checked_frequencies

cpu_split, cuda_split = Loops("cpu.split"), Loops("cuda.split")

MOST_HOT = 0.9
"""Of the rows, when frequencies decide: rare ids keep a tenth."""


@dataclass(frozen=True, kw_only=True)
class FrequencyConfig(SchemeConfig):
    """num_hot: ids that own a row (H); num_cold: rows that the others share (C); seed: None for `mod`, or a mixer's."""

    num_hot: int
    num_cold: int
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_hot", at_least=0, at_most=self.num_embeddings)
        self.require("num_cold", at_least=0 if self.num_hot == self.num_embeddings else 1, at_most=MAX_BUCKETS)
        if self.seed is not None:
            self.require("seed", at_least=0, at_most=(1 << 63) - 1)


class Frequency(Scheme):
    """Own rows for the hot ids, shared rows for the rest."""

    name = "frequency"
    Config = FrequencyConfig
    by_rank = True
    uses = frozenset({"frequencies"})
    facts = Facts(
        vector="its row if hot, else a shared one",
        stored="4 (hot + cold) D",
        reads="4 D",
        ceiling="none",
        unseen="shares a cold row",
    )
    config: FrequencyConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        num_rows = self.config.num_hot + self.config.num_cold
        self.weight = normal((num_rows, self.embedding_dim), std, generator=generator)

    @staticmethod
    def compose(config: FrequencyConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = T[x], or e = T[H + h(x)] from id H on."""
        return rows(tensors["weight"], row_index(config, ids))

    @staticmethod
    def lookup_cpu(config: FrequencyConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[x], or e = T[H + h(x)] from id H on."""
        if config.seed is None:
            cpu_split.gather_hot_mod(tensors["weight"], config.num_hot, ids_B, out_BD)
        else:
            cpu_split.gather_hot_hash(tensors["weight"], config.num_hot, ids_B, config.seed, out_BD)

    @classmethod
    def lookup_gpu(cls, config: FrequencyConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = T[x], or e = T[H + h(x)] from id H on."""
        if config.seed is None:
            cuda_split.gather_hot_mod(tensors["weight"], config.num_hot, ids_B, out_BD)
        else:
            cuda_split.gather_hot_hash(tensors["weight"], config.num_hot, ids_B, config.seed, out_BD)

    @classmethod
    def layout(cls, config: FrequencyConfig) -> dict[str, TensorSpec]:
        """One table: hot rows, then shared ones."""
        return {"weight": TensorSpec((config.num_hot + config.num_cold, config.embedding_dim), rows=True)}

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        hot_share: float | None = None,
        **options: Any,
    ) -> Self:
        """All the rows that fit, split into hot and shared ones; a row for every id where that fits.

        hot_share: of the rows; None: the split that `frequencies` ask for (`best_split`), or without them
        `usual_hot_share` of the compression.
        """
        only_budget(options, "num_hot", "num_cold")
        if hot_share is not None and not 0 <= hot_share <= 1:
            raise ConfigError(f"hot_share must be at least 0 and at most 1, got {hot_share}")
        num_rows = buckets_in(num_bytes, 4 * embedding_dim, 0, cls.name)
        if num_rows >= num_embeddings:
            return cls(num_embeddings, embedding_dim, num_hot=num_embeddings, num_cold=0, **options)
        if hot_share is None and frequencies is not None:
            frequencies_N = checked_frequencies(frequencies, num_embeddings)
            sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "num_cold": num_rows}
            all_cold = FrequencyConfig(num_hot=0, **sizes, **cls.parameters_in(options))
            num_hot = best_split(all_cold, frequencies_N)
        else:
            share = usual_hot_share(num_embeddings / num_rows) if hot_share is None else hot_share
            num_hot = min(round(share * num_rows), num_rows - 1)
        return cls(num_embeddings, embedding_dim, num_hot=num_hot, num_cold=num_rows - num_hot, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Hot rows are their ids' vectors, each shared row the weighted mean of its ids': the least squares optimum."""
        from embstore.fitting import weighted_bucket_means

        row_N, num_rows = row_index(self.config, torch.arange(len(vectors_ND))), len(self.weight)
        self.load_state_dict({"weight": weighted_bucket_means(vectors_ND, row_N, num_rows, weights_N).float()})


def row_index(config: FrequencyConfig, ids: Tensor) -> Tensor:
    """The row that each id reads."""
    if config.num_hot == config.num_embeddings:
        return ids
    if config.seed is None:
        shared = (ids - config.num_hot) % config.num_cold
    else:
        shared = bucket_torch(ids, config.num_cold, config.seed)
    return torch.where(ids < config.num_hot, ids, config.num_hot + shared)


def usual_hot_share(compression: float) -> float:
    """Of the rows, how many go to hot ids when nothing is known of frequencies: 0.3 at 2x to 0.9 at 2,000x.

    Linear in the logarithm, through what CAFE (SIGMOD 2024) sets on Criteo, whose hash table gets 0.7 of the memory at
    2x and 0.1 from 2,000x on: mild compression spends on cold ids, extreme compression on hot ones. At 16x it is 0.48;
    GraphHash's cutoff is 0.5.
    """
    return 0.3 + 0.6 * min(max(log(compression / 2) / log(1000), 0.0), 1.0)


def expected_collisions(config: FrequencyConfig, frequencies_N: Tensor) -> float:
    """The share of lookups that would meet another id: of two events on one row, how often they differ in their id.

    An id of frequency f on a row of total frequency L counts f (1 - f / L). That is also the weighted squared error of
    the best rows for random vectors of length 1.
    """
    row_N, num_rows = row_index(config, torch.arange(len(frequencies_N))), config.num_hot + config.num_cold
    load_R = torch.bincount(row_N, frequencies_N, minlength=num_rows)
    square_R = torch.bincount(row_N, frequencies_N.square(), minlength=num_rows)
    apart = float((square_R / load_R.clamp_min(1e-300)).sum())
    return 1 - apart / float(frequencies_N.sum())


def best_split(config: FrequencyConfig, frequencies_N: Tensor) -> int:
    """The num_hot with the fewest expected collisions among hot shares 0, 0.05, .. MOST_HOT of `config`'s rows.

    Where frequencies fall with the id, more hot rows hardly ever collide more, so MOST_HOT decides. It is 0.9
    because one row for all cold ids is no better and may be worse. Measured on MovieLens-1M, nDCG@10 at 16x with hot
    shares 0.1, 0.5, 0.9 and 1: 0.022, 0.040, 0.045, 0.045 (films compressed), 0.012, 0.024, 0.025, 0.021 (films and
    users, whose counts are alike).
    """
    num_rows = config.num_hot + config.num_cold
    choices = [int(num_rows * MOST_HOT * step / 18) for step in range(19)]
    splits = [replace(config, num_hot=num_hot, num_cold=num_rows - num_hot) for num_hot in choices]
    fewest = min(reversed(splits), key=lambda split: round(expected_collisions(split, frequencies_N), 9))
    return fewest.num_hot
