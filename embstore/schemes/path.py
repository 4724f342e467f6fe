"""Path-based composition: `e = V_q relu(U_q W[r] + b_q) + c_q` with r = x mod m, q = floor(x / m).

(Shi et al., KDD 2020, arXiv 1909.02107.) Two complementary partitions, as in quotient-remainder, but the second one
chooses a function and not a row: each of its buckets has a network with one hidden layer, through which the shared
row goes. The paper's best hidden layers have 16 to 64 units; it finds path-based composition no better than plain
operations.

Stored: `weight` float32 [m, W], and for each of the Q = ceil(n / m) networks `hidden` [Q, W, H], `hidden_bias` [Q, H],
`output` [Q, H, D] and `output_bias` [Q, D], P = (W + 1) H + (H + 1) D numbers; W = D unless `input_dim` says otherwise.
4 W m + 4 P Q bytes. The networks stay float32 when rows are stored in fewer bits. The least is about 8 sqrt(n W P)
bytes, half of them networks, so the ratio cannot pass about D / 2 sqrt(n / (W P)): with W = D = 64 and H = 16, where a
network is as large as 33 rows, 8.7 for 10,000 ids and 122 for 2,000,000.
Lookup: 4 W bytes of a row, the bucket's network (8.5 KB, once per batch), 2 H (W + D) operations; one division.

Sums over W and H terms: the compiled lookup takes them in order, one id like another, whatever the batch; torch takes
them in an order of its own.

Starts: rows ~ N(0, s), layers scaled so that every bucket's vectors have mean 0 and standard deviation s.
Unseen ids below n get their bucket's function of their row, both of which other ids trained.
"""

# Shapes: B ids in a batch, W width of a row, H hidden units, D embedding_dim, Q networks; T tiles of P ids, one network
# each.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.kernels.reference import quotient
from embstore.quantize import TensorSpec
from embstore.schemes.base import MAX_IDS, Facts, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget
from embstore.schemes.parts.partitions import Search

cpu_path, cuda_path = Loops("cpu.path"), Loops("cuda.path")

_RELU_VARIANCE = 0.5 - 0.5 / math.pi
"""The variance of max(z, 0) for z ~ N(0, 1); its mean is (2 pi) ** -0.5."""


@dataclass(frozen=True, kw_only=True)
class PathConfig(SchemeConfig):
    """num_buckets: rows of the shared table (m); hidden_dim: hidden units of each network;
    input_dim: floats in a row, None: as many as in a vector."""

    num_buckets: int
    hidden_dim: int = 16
    input_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_buckets", at_least=1, at_most=MAX_IDS)
        self.require("hidden_dim", at_least=1)
        if self.input_dim is not None:
            self.require("input_dim", at_least=1)

    @property
    def width(self) -> int:
        """Floats in a row of the shared table."""
        return self.embedding_dim if self.input_dim is None else self.input_dim

    @property
    def num_networks(self) -> int:
        """Buckets of the quotient: ceil(n / m)."""
        return -(-self.num_embeddings // self.num_buckets)

    @property
    def network_floats(self) -> int:
        """Numbers in one network."""
        return (
            self.width * self.hidden_dim + self.hidden_dim + self.hidden_dim * self.embedding_dim + self.embedding_dim
        )


class PathBased(Scheme):
    """A shared row through the small network of the id's bucket."""

    name = "path"
    Config = PathConfig
    by_rank = True
    tolerance = 1e-5
    facts = Facts(
        vector="a shared row through the small network of its bucket",
        stored="4 m D + networks",
        reads="row + network",
        ceiling="see its file",
        unseen="in range: a composed vector",
    )
    config: PathConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, num_hidden, dim = self.config, self.config.hidden_dim, self.embedding_dim
        num_networks, width = config.num_networks, config.width
        self.weight = normal((config.num_buckets, width), std, generator=generator)
        self.hidden = normal((num_networks, width, num_hidden), width**-0.5, generator=generator)
        self.hidden_bias = nn.Parameter(torch.zeros(num_networks, num_hidden))
        out_std = (num_hidden * _RELU_VARIANCE) ** -0.5
        self.output = normal((num_networks, num_hidden, dim), out_std, generator=generator)
        with torch.no_grad():  # hidden units are positive on average: what that adds up to is taken off again
            means_QH = self.hidden.norm(dim=1) * std * (2 * math.pi) ** -0.5
            self.output_bias = nn.Parameter(-torch.einsum("qh,qhd->qd", means_QH, self.output))

    def networks(self) -> Iterable[nn.Parameter]:
        """The layers of all networks."""
        return self.hidden, self.hidden_bias, self.output, self.output_bias

    @staticmethod
    def compose(config: PathConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = V_q relu(U_q W[r] + b_q) + c_q, for tiles of ids that share a network.

        With tiles of the mean number of ids per network there are no more than twice as many tiles as networks, and
        no more than twice as many places as ids.
        """
        ids_B = ids.reshape(-1)
        rows_BW = rows(tensors["weight"], ids_B % config.num_buckets)
        bucket_B, order_B = quotient(ids_B, config.num_buckets).sort()
        bucket_G, size_G = torch.unique_consecutive(bucket_B, return_counts=True)
        per_tile = -(-len(ids_B) // max(1, len(size_G)))
        tiles_G = quotient(size_G + per_tile - 1, max(1, per_tile))
        # An id's place: its group's first tile, and how many ids of its group come before it.
        shift_G = (tiles_G.cumsum(0) - tiles_G) * per_tile - (size_G.cumsum(0) - size_G)
        place_B = torch.empty_like(order_B)
        place_B[order_B] = torch.arange(len(ids_B), device=ids.device) + shift_G.repeat_interleave(size_G)
        q_T = bucket_G.repeat_interleave(tiles_G)

        x_TPW = rows_BW.new_zeros(len(q_T) * per_tile, config.width).index_copy(0, place_B, rows_BW)
        x_TPW = x_TPW.view(len(q_T), per_tile, config.width)
        z_TPH = torch.baddbmm(tensors["hidden_bias"][q_T, None], x_TPW, tensors["hidden"][q_T]).relu()
        e_TPD = torch.baddbmm(tensors["output_bias"][q_T, None], z_TPH, tensors["output"][q_T])
        return e_TPD.view(-1, config.embedding_dim)[place_B].view(*ids.shape, config.embedding_dim)

    @staticmethod
    def lookup_cpu(config: PathConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = V_q relu(U_q W[r] + b_q) + c_q."""
        cpu_path.gather_through(
            tensors["weight"],
            tensors["hidden"],
            tensors["hidden_bias"],
            tensors["output"],
            tensors["output_bias"],
            ids_B,
            out_BD,
        )

    @classmethod
    def lookup_gpu(cls, config: PathConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = V_q relu(U_q W[r] + b_q) + c_q."""
        cuda_path.gather_through(
            tensors["weight"],
            tensors["hidden"],
            tensors["hidden_bias"],
            tensors["output"],
            tensors["output_bias"],
            ids_B,
            out_BD,
        )

    @classmethod
    def layout(cls, config: PathConfig) -> dict[str, TensorSpec]:
        """The shared rows, and every network's layers."""
        num_networks, num_hidden, dim = config.num_networks, config.hidden_dim, config.embedding_dim
        return {
            "weight": TensorSpec((config.num_buckets, config.width), rows=True),
            "hidden": TensorSpec((num_networks, config.width, num_hidden)),
            "hidden_bias": TensorSpec((num_networks, num_hidden)),
            "output": TensorSpec((num_networks, num_hidden, dim)),
            "output_bias": TensorSpec((num_networks, dim)),
        }

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The largest shared table such that it and its networks fit: the fewer networks, the more rows."""
        only_budget(options, "num_buckets")
        sizes = cls.parameters_in(options)
        config = PathConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_buckets=1, **sizes)
        search = _sizes(num_embeddings, config.width, config.network_floats)
        num_buckets = search.largest(num_bytes // 4)
        if num_buckets is None:
            first = search.least()
            least = 4 * search.total(first)
            raise ConfigError(
                f"path cannot be stored in {num_bytes:,} bytes here: the least is {least:,} (m = {first:,}), because "
                f"each of ceil(n / m) networks takes {4 * config.network_floats:,}; "
                f"its ratio cannot pass {4 * num_embeddings * embedding_dim / least:.4g}"
            )
        return cls(num_embeddings, embedding_dim, num_buckets=num_buckets, **options)


def _sizes(num_ids: int, row_floats: int, network_floats: int) -> Search:
    """The search for a number of rows, whose total is the floats of rows and networks."""

    def bound(num_rows: int) -> int:
        return row_floats * num_rows - (-network_floats * num_ids // num_rows)

    balance = min(math.isqrt(network_floats * num_ids // row_floats), num_ids)
    return Search(
        total=lambda num_rows: row_floats * num_rows + network_floats * -(-num_ids // num_rows),
        bound=bound,
        middle=min(max(balance, 1), min(balance + 1, num_ids), key=bound),
        most=num_ids,
    )
