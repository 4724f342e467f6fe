"""Quotient-remainder: `e = Q[x // m] op R[x mod m]` (Shi et al., KDD 2020, arXiv 1909.02107).

The pair (quotient, remainder) is unique for every id, so with `concat` no two ids share a vector; with `mult` and
`add` that holds for almost all tables.

Stored: `remainder` float32 [m, .] and `quotient` float32 [ceil(n / m), .]; for `mult` and `add` both are D wide, for
`concat` each is half of it. The least is about 2 sqrt(n) rows.
Lookup: 8 D bytes read and D operations (`mult`, `add`), or 4 D bytes (`concat`); one division.

Starts: `mult` R ~ N(1, 0.1) times Q ~ N(0, s), `add` both N(0, s / sqrt 2), `concat` both N(0, s); composed vectors
have the standard deviation asked for. (The reference code draws `mult` from U(sqrt(1/n), 1), all positive.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, Self

import torch
from torch import Tensor

from embstore import kernels
from embstore.errors import ConfigError
from embstore.kernels.reference import quotient
from embstore.schemes.base import Scheme, SchemeConfig, Tensors, normal, target_std

OPS = ("mult", "add", "concat")
_SPREAD = 0.1
"""Standard deviation of the remainder factor of `mult` around 1."""


@dataclass(frozen=True, kw_only=True)
class QRConfig(SchemeConfig):
    """num_buckets: rows of the remainder table (m); op: how the two rows become one vector."""

    num_buckets: int
    op: str = "mult"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1)
        if self.op not in OPS:
            raise ConfigError(f"op must be one of {', '.join(OPS)}, got {self.op!r}")
        if self.op == "concat" and self.embedding_dim < 2:
            raise ConfigError("op 'concat' needs embedding_dim of at least 2")

    @property
    def num_quotients(self) -> int:
        """Rows of the quotient table: ceil(n / m)."""
        return -(-self.num_embeddings // self.num_buckets)

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the quotient and of the remainder table."""
        if self.op != "concat":
            return self.embedding_dim, self.embedding_dim
        return self.embedding_dim // 2, self.embedding_dim - self.embedding_dim // 2


class QR(Scheme):
    """Two small tables whose rows are multiplied, added or concatenated."""

    name = "qr"
    Config = QRConfig
    config: QRConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_buckets: int,
        op: str = "mult",
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        config = QRConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=num_buckets, op=op)
        super().__init__(config, sparse=sparse)
        std = target_std(embedding_dim, init_std)
        shapes = self.shapes(config)
        if op == "mult":
            std /= (1 + _SPREAD**2) ** 0.5
        elif op == "add":
            std /= 2**0.5
        self.quotient = normal(shapes["quotient"], std, generator=generator)
        remainder_mean, remainder_std = (1.0, _SPREAD) if op == "mult" else (0.0, std)
        self.remainder = normal(shapes["remainder"], remainder_std, mean=remainder_mean, generator=generator)

    def compose(self, ids: Tensor) -> Tensor:
        """e = Q[x // m] op R[x mod m]."""
        m, op = self.config.num_buckets, self.config.op
        q, r = self.rows(self.quotient, quotient(ids, m)), self.rows(self.remainder, ids % m)
        if op == "mult":
            return q * r
        return q + r if op == "add" else torch.cat([q, r], dim=-1)

    @staticmethod
    def lookup(config: QRConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = Q[x // m] op R[x mod m]."""
        if config.op == "mult":
            kernels.gather_pair_mul(tensors["quotient"], tensors["remainder"], ids_B, out_BD)
        elif config.op == "add":
            kernels.gather_pair_add(tensors["quotient"], tensors["remainder"], ids_B, out_BD)
        else:
            kernels.gather_pair_concat(tensors["quotient"], tensors["remainder"], ids_B, out_BD)

    @classmethod
    def shapes(cls, config: QRConfig) -> dict[str, tuple[int, ...]]:
        """Quotient and remainder table."""
        width_q, width_r = config.widths
        return {"quotient": (config.num_quotients, width_q), "remainder": (config.num_buckets, width_r)}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, op: str = "mult", **options: Any
    ) -> Self:
        """The largest remainder table such that both tables fit: it gives the hottest ids rows of their own."""
        if "num_buckets" in options:
            raise ConfigError("give either a budget or num_buckets, not both")

        n = num_embeddings
        width_q, width_r = QRConfig(num_embeddings=n, embedding_dim=embedding_dim, num_buckets=1, op=op).widths

        def size(num_buckets: int) -> int:
            return 4 * (width_r * num_buckets + width_q * -(-n // num_buckets))

        # Both tables take 4 (w_r m + w_q n / m) bytes, up to 4 w_q more where the division is not exact. So the least
        # lies within about n^(1/4) of m = sqrt(n w_q / w_r), and the largest m that fits at or below the upper root
        # of w_r m + w_q n / m = num_bytes / 4.
        middle = isqrt(n * width_q // width_r)
        reach = isqrt(middle) + 3
        least = min(range(max(1, middle - reach), middle + reach + 1), key=size)
        if size(least) > num_bytes:
            raise ConfigError(
                f"qr cannot be stored in {num_bytes:,} bytes here: the least is {size(least):,} (m = {least:,})"
            )
        floats = int(num_bytes // 4)
        num_buckets = min(n, (floats + isqrt(floats**2 - 4 * width_r * width_q * n)) // (2 * width_r))
        while size(num_buckets) > num_bytes:
            num_buckets -= 1
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, op=op, **options)
