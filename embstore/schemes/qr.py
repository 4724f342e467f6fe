"""Complementary partitions, quotient-remainder first of all: `e = P_1[i_1] op P_2[i_2] (op ...)`.

(Shi et al., KDD 2020, arXiv 1909.02107.) Partition j sorts the ids into m_j buckets such that no two ids share all k
of theirs. Two families of indices do that:

* radix: `i_j = floor(x / (m_1 ... m_(j-1))) mod m_j`, the digits of x in a mixed radix. With k = 2 these are the
  remainder `x mod m` and the quotient `floor(x / m)`;
* crt: `i_j = x mod m_j` for moduli that are coprime in pairs (Chinese remainder theorem).

With `concat` no two ids share a vector, as long as no two rows of a partition are equal; with `mult` and `add` that
holds for almost all tables. `add` is separable: the difference of two rows is the same vector wherever it occurs, so
dot products tell ids apart worst with it.

Stored: `weight` float32 [m_1 + ... + m_k, W], the partitions' tables one below the other; W = D for `mult` and `add`,
D / k for `concat`. For k = 2 these are m + ceil(n / m) rows; the least is about k n^(1 / k).
Lookup: 4 D k bytes read and (k - 1) D operations (`mult`, `add`), or 4 D bytes (`concat`); k - 1 divisions (crt: k).

m_1 is `num_buckets`. Each further modulus takes an even share of what is left: the least whole number whose power
reaches it (crt: the least from there on that is coprime to those before), so the product is at least n.
A table of no more than `threshold` ids is one plain row per id, whatever the other parameters.

Starts: `mult` the first partition ~ N(0, s') and the others ~ N(1, 0.1), so that the m_1 most frequent ids start apart;
`add` all ~ N(0, s / sqrt k), `concat` ~ N(0, s); composed vectors have the standard deviation s asked for. (The
reference code draws `mult` from U(sqrt(1/n), 1), all positive.)
Unseen ids below n get what their buckets' rows, which other ids trained, combine to.
"""

# Shapes: B ids in a batch, N num_embeddings, D embedding_dim, K partitions, W width of a partition's rows.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.kernels.reference import quotient
from embstore.quantize import TensorSpec
from embstore.schemes.base import MAX_IDS, Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, only_budget
from embstore.schemes.parts.partitions import first_moduli, moduli

cpu_gather = Loops("cpu.gather")
cpu_qr, cuda_qr = Loops("cpu.qr"), Loops("cuda.qr")

OPS = ("mult", "add", "concat")
PARTITIONS = ("radix", "crt")
MAX_PARTITIONS = 16
"""So many tables of 16 rows tell all int64 ids apart."""
_SPREAD = 0.1
"""Standard deviation of the factors of `mult` that start around 1: all but the first partition's. Were it the last
partition whose rows start around 0, ids of one quotient would start alike, and the most frequent m ids have one
quotient (demo data at a ratio of 2.5, two seeds: nDCG@10 0.098 and 0.092 this way, 0.049 and 0.050 that way)."""
_ROUNDS = 25
_ENOUGH = 1e-4
"""`fit` stops after so many rounds over the partitions, or when one lowers the error by less than this share."""


@dataclass(frozen=True, kw_only=True)
class QRConfig(SchemeConfig):
    """num_buckets: rows of the first partition (m_1); op: how rows become one vector; num_partitions: k;
    partition: "radix" or "crt"; threshold: tables of so many ids or fewer are plain."""

    num_buckets: int
    op: str = "mult"
    num_partitions: int = 2
    partition: str = "radix"
    threshold: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_IDS)
        self.require("num_partitions", at_least=2, at_most=MAX_PARTITIONS)
        self.require("threshold", at_least=0)
        self.require_one_of("op", OPS)
        self.require_one_of("partition", PARTITIONS)
        if self.op == "concat" and self.embedding_dim % self.num_partitions:
            raise ConfigError(
                f"op 'concat' needs an embedding_dim that num_partitions divides, "
                f"got {self.embedding_dim} and {self.num_partitions}"
            )

    @cached_property
    def moduli(self) -> tuple[int, ...]:
        """Rows of each partition's table, m_1 .. m_k; only n where the table is plain."""
        if self.num_embeddings <= self.threshold:
            return (self.num_embeddings,)
        return moduli(self.num_embeddings, self.num_buckets, self.num_partitions, coprime=self.partition == "crt")

    @property
    def width(self) -> int:
        """Columns of every partition's table."""
        split = self.op == "concat" and len(self.moduli) > 1
        return self.embedding_dim // self.num_partitions if split else self.embedding_dim


class QR(Scheme):
    """A row of each of a few small tables, multiplied, added or concatenated."""

    name = "qr"
    Config = QRConfig
    by_rank = True
    facts = Facts(
        vector="a row of each of k partitions, multiplied, added or joined",
        stored="4 D sum of m_j",
        reads="4 k D (joined: 4 D)",
        ceiling="n^(1-1/k) / k",
        unseen="in range: a composed vector",
    )
    config: QRConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, others = self.config, len(self.config.moduli) - 1
        if config.op == "mult":
            std /= (1 + _SPREAD**2) ** (others / 2)
        elif config.op == "add":
            std /= (1 + others) ** 0.5
        weight = torch.empty(sum(config.moduli), config.width).normal_(0.0, std, generator=generator)
        if config.op == "mult":
            weight[config.moduli[0] :].normal_(1.0, _SPREAD, generator=generator)
        self.weight = nn.Parameter(weight)

    @staticmethod
    def compose(config: QRConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = P_1[i_1] op P_2[i_2] (op ...)."""
        starts = accumulate(config.moduli[:-1], initial=0)
        index = torch.stack([i + start for i, start in zip(indices(config, ids), starts, strict=True)])
        return _combine(config.op, rows(tensors["weight"], index).unbind(0))

    @staticmethod
    def lookup_cpu(config: QRConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = P_1[i_1] op P_2[i_2] (op ...)."""
        if len(config.moduli) == 1:
            cpu_gather.gather(tensors["weight"], ids_B, out_BD)
        else:
            cpu_qr.gather_partitions(config.op, config.partition, tensors["weight"], config.moduli, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: QRConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = P_1[i_1] op P_2[i_2] (op ...)."""
        how = (config.op, config.partition)
        cuda_qr.gather_partitions(*how, tensors["weight"], config.moduli, ids_B, out_BD)

    @classmethod
    def layout(cls, config: QRConfig) -> dict[str, TensorSpec]:
        """The partitions' tables, one below the other."""
        return {"weight": TensorSpec((sum(config.moduli), config.width), rows=True)}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The largest first partition such that all of them fit: it gives the hottest ids rows of their own."""
        only_budget(options, "num_buckets")
        kind = cls.parameters_in(options)
        config = QRConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=1, **kind)
        row_bytes = 4 * config.width
        if num_embeddings <= config.threshold:
            num_buckets = num_embeddings if num_embeddings * row_bytes <= num_bytes else None
            least, why = num_embeddings, f"a table of {config.threshold:,} ids or fewer is plain"
        else:
            search = first_moduli(num_embeddings, config.num_partitions, coprime=config.partition == "crt")
            num_buckets, first = search.largest(num_bytes // row_bytes), search.least()
            least, why = search.total(first), f"m = {first:,}"
        if num_buckets is None:
            raise ConfigError(
                f"qr cannot be stored in {num_bytes:,} bytes here: the least is {least * row_bytes:,} ({why}); "
                f"its ratio cannot pass {4 * num_embeddings * embedding_dim / (least * row_bytes):.4g}"
            )
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Alternating least squares: each partition's rows have a closed form, given the others'.

        The first partition starts from the best rows of the hashing trick, or nearly, and no step makes the error
        larger. `concat` needs one round: none of its columns depends on two partitions.
        """
        from embstore.fitting.checks import checked

        mass_N = checked(vectors_ND, weights_N).clamp_min(1e-9)  # rows that no weight decides still get a best fit
        weight = self.weight.detach().double()
        if self.config.op == "add":
            weight.zero_()
        _alternate(self.config, vectors_ND, mass_N, weight, progress)
        self.load_state_dict({"weight": weight.float()})


def indices(config: QRConfig, ids: Tensor) -> list[Tensor]:
    """i_1 .. i_k: the bucket of every id in each partition."""
    if config.partition == "crt" or len(config.moduli) == 1:
        return [ids % modulus for modulus in config.moduli]
    found, rest = [], ids
    for modulus in config.moduli[:-1]:
        found.append(rest % modulus)
        rest = quotient(rest, modulus)
    return [*found, rest]


def _combine(op: str, parts: Sequence[Tensor]) -> Tensor:
    """((p_1 op p_2) op p_3) ..."""
    if op == "concat":
        return torch.cat(list(parts), dim=-1)
    return reduce(torch.mul if op == "mult" else torch.add, parts)


def _alternate(config: QRConfig, vectors_ND: Tensor, mass_N: Tensor, weight: Tensor, progress: Progress | None) -> None:
    """Improve the stacked tables in place, one partition after the other, until a round gains next to nothing."""
    tables = torch.split(weight, list(config.moduli))
    index = indices(config, torch.arange(len(vectors_ND), device=vectors_ND.device))
    rounds = 1 if config.op == "concat" or len(tables) == 1 else _ROUNDS
    before = math.inf
    for number in range(rounds):
        for j in range(len(tables)):
            error = _solve(config, vectors_ND, mass_N, tables, index, j)
        if progress is not None:
            progress("alternating", number + 1, rounds)
        if error >= before * (1 - _ENOUGH):
            break
        before = error


def _solve(
    config: QRConfig, vectors_ND: Tensor, mass_N: Tensor, tables: Sequence[Tensor], index: Sequence[Tensor], j: int
) -> float:
    """Put the best rows of partition j, given the others', into its table; returns the weighted squared error left."""
    from embstore.fitting.checks import chunks

    sums, squares, energy = torch.zeros_like(tables[j]), torch.zeros_like(tables[j]), 0.0
    others = [part for part in range(len(tables)) if part != j] if config.op != "concat" else []
    columns = slice(j * config.width, (j + 1) * config.width)
    for at in chunks(*vectors_ND.shape):
        target, factor = vectors_ND[at, columns if config.op == "concat" else slice(None)].double(), mass_N[at, None]
        gain = torch.ones_like(target)
        for other in others:
            row = tables[other][index[other][at]]
            if config.op == "mult":
                gain *= row
            else:
                target = target - row  # not in place: it may be the caller's
        energy += float((factor * target.square()).sum())
        sums.index_add_(0, index[j][at], factor * gain * target)
        squares.index_add_(0, index[j][at], factor * gain.square())
    decided = squares > 0
    best = sums / torch.where(decided, squares, 1.0)
    tables[j].copy_(torch.where(decided, best, tables[j]))
    return energy - float((best * sums).sum())
