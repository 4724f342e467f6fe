"""Mixed precision: hot ids have float32 rows, the rest int8 or int4 ones (Yang et al., arXiv 2010.11305, where the
float rows are a cache in front of a quantised table).

`e = H[x]` for x < num_hot (ids are numbered by falling frequency, so these are the most frequent), else
`e = code * scale + bias`, with codes, scale and bias of row x - num_hot of the cold table.

Stored: `hot` float32 [num_hot, D] and `cold` [n - num_hot, P] in the layout of embstore/quantize.py: P = D + 8 bytes
for int8, D / 2 + 4 for int4 (uint8 and int8 arrays). 4 D num_hot + P (n - num_hot) bytes; the ratio cannot pass
4 D / (D + 8), or 4 D / (D / 2 + 4): 3.6 and 7.1 at D = 64. There is nothing left to store in fewer bits.
Lookup: P bytes read (4 D for a hot id), 2 D operations. What is served never depends on what was asked for before:
the hot rows are published ones, not a cache that an id may hit or miss.

Training keeps float32 rows of all ids and rounds the cold ones in `forward`, with the gradient passed on as if they
were not rounded. The paper rounds what it writes back instead, so that training itself takes the space of the
quantised table; here only the published table does. What is common: rounding is stochastic, up with the probability
of the distance, so on average the model sees the rows as they are, and updates smaller than a step add up. Without
gradients or in evaluation rounding is to the nearest, which is what `export` publishes. (int4 keeps scale and bias in
float16: a row's extremes may lie up to 2^-11 of its range outside what its codes reach.)

Starts as a full table. An id past the end has no row, as in a full table: `on_missing` decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec, dequantize, pack, take
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget
from embstore.schemes.parts.straight_through import straight_through

# Shapes: N ids, D embedding_dim, H hot ids, C cold ones, P bytes of a packed row.

cpu_split, cuda_split = Loops("cpu.split"), Loops("cuda.split")

HOT_SHARE = {8: 0.05, 4: 0.01}
"""Of the ids, by bits: what the paper gives its cache."""
CODES = {8: torch.uint8, 4: torch.int8}
PACKED_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig(SchemeConfig):
    """num_hot: ids with float32 rows (H); bits: of the others' numbers, 8 or 4."""

    num_hot: int
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_hot", at_least=0, at_most=self.num_embeddings)
        if type(self.bits) is not int or self.bits not in HOT_SHARE:
            raise ConfigError(f"bits must be 8 or 4, got {self.bits!r}")
        if self.bits == 4 and self.embedding_dim % 2:
            raise ConfigError(
                f"4 bits keep two numbers in a byte: embedding_dim must be even, got {self.embedding_dim}; use 8 bits"
            )

    @property
    def packed_bytes(self) -> int:
        """Bytes of a cold row (P)."""
        return self.embedding_dim + 8 if self.bits == 8 else self.embedding_dim // 2 + 4


class MixedPrecision(Scheme):
    """Float rows of all ids, of which the cold ones are seen rounded."""

    name = "mixed_precision"
    Config = MixedPrecisionConfig
    by_rank = True
    facts = Facts(
        vector="float32 if hot, else int8 or int4",
        stored="n (D + 8) or n (D / 2 + 4), + 4 D a hot id",
        reads="D + 8 or D / 2 + 4",
        ceiling="4 D / (D + 8) or 4 D / (D / 2 + 4)",
        unseen="its row, as it started",
    )
    config: MixedPrecisionConfig
    packed: Tensor | None
    """The cold rows that this module was made from, if it was made from such."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, num_hot: int | None = None, bits: int = 8, **options: Any
    ) -> None:
        """num_hot: None for the paper's share, 5% of the ids with 8 bits and 1% with 4."""
        if num_hot is None and isinstance(num_embeddings, int):
            num_hot = int(HOT_SHARE.get(bits, 0.0) * num_embeddings)
        super().__init__(num_embeddings, embedding_dim, num_hot=num_hot, bits=bits, **options)

    def start(self, std: float, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.weight = normal((self.num_embeddings, self.embedding_dim), std, generator=generator)
        self.register_buffer("packed", None, persistent=False)

    @classmethod
    def from_tensors(cls, config: SchemeConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Cold rows read back as floats; those that training leaves alone are published as they were, bit for bit."""
        module = cls.from_config(config)
        rows_ND = torch.cat([tensors["hot"], dequantize(tensors["cold"])])
        module.load_state_dict({"weight": rows_ND})
        module.register_buffer("packed", tensors["cold"].clone(), persistent=False)
        return module

    def vectors(self, ids: Tensor) -> Tensor:
        """e = W[x], rounded from id H on; stochastically while gradients are asked for in training."""
        own = F.embedding(ids, self.weight, sparse=self.sparse)
        exact = own.detach()
        if self.training and torch.is_grad_enabled():
            device = None if self.generator is None else self.generator.device
            noise = torch.rand(own.shape, generator=self.generator, device=device).to(own.device)
            rounded = round_rows(exact, self.config.bits, noise)
        else:
            rounded = round_rows(exact, self.config.bits)
            if self.packed is not None and len(self.packed):
                before = take(self.packed, (ids - self.config.num_hot).clamp_min(0)).to(exact.dtype)
                rounded = torch.where((before == exact).all(dim=-1, keepdim=True), before, rounded)
        cold = (ids >= self.config.num_hot)[..., None]
        return straight_through(own, torch.where(cold, rounded, exact))

    @torch.no_grad()
    def export(self) -> tuple[SchemeConfig, dict[str, Tensor]]:
        """Hot rows as they are, cold rows packed; DataError when they are not finite."""
        hot_HD, cold_CD = self.weight.detach()[: self.config.num_hot], self.weight.detach()[self.config.num_hot :]
        cold_CP = torch.empty(
            self.layout(self.config)["cold"].shape, dtype=CODES[self.config.bits], device=cold_CD.device
        )
        if cold_CD.is_meta:  # sizes without numbers
            return self.config, {"hot": hot_HD, "cold": cold_CP}
        if not torch.isfinite(cold_CD).all():
            raise DataError("rows hold NaN or infinity: training diverged; use a lower learning rate")
        for first in range(0, len(cold_CD), PACKED_AT_ONCE):
            part = slice(first, first + PACKED_AT_ONCE)
            cold_CP[part] = torch.from_numpy(pack(cold_CD[part].float().cpu().numpy(), f"int{self.config.bits}"))
            if self.packed is not None:
                same_c1 = (dequantize(self.packed[part]) == cold_CD[part]).all(dim=1, keepdim=True)
                cold_CP[part] = torch.where(same_c1, self.packed[part], cold_CP[part])
        return self.config, {"hot": hot_HD, "cold": cold_CP}

    @staticmethod
    def compose(config: MixedPrecisionConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = H[x], or the packed row of x - H from id H on."""
        if config.num_hot == 0:
            return rows(tensors["cold"], ids)
        hot = rows(tensors["hot"], ids.clamp_max(config.num_hot - 1))
        if config.num_hot == config.num_embeddings:
            return hot
        cold = rows(tensors["cold"], (ids - config.num_hot).clamp_min(0))
        return torch.where((ids >= config.num_hot)[..., None], cold, hot)

    @staticmethod
    def lookup_cpu(config: MixedPrecisionConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = H[x], or the packed row of x - H from id H on."""
        cpu_split.gather_split(tensors["cold"], tensors["hot"], 0, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: MixedPrecisionConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = H[x], or the packed row of x - H from id H on."""
        cuda_split.gather_split(tensors["cold"], tensors["hot"], 0, ids_B, out_BD)

    @classmethod
    def layout(cls, config: MixedPrecisionConfig) -> dict[str, TensorSpec]:
        """Float rows of hot ids, packed rows of the others."""
        num_cold = config.num_embeddings - config.num_hot
        return {
            "hot": TensorSpec((config.num_hot, config.embedding_dim)),
            "cold": TensorSpec((num_cold, config.packed_bytes), f"int{config.bits}"),
        }

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        bits: int | None = None,
        **options: Any,
    ) -> Self:
        """A packed row for every id first, float rows for as many hot ids as the rest holds.

        bits: None for 8 where that fits, else 4. Rows so short that packing does not shrink them are all hot.
        """
        only_budget(options, "num_hot")
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        kinds = [8] if embedding_dim % 2 else [8, 4]
        configs = [
            MixedPrecisionConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_hot=0, bits=kind)
            for kind in (kinds if bits is None else [bits])
        ]
        row_bytes = 4 * embedding_dim
        for config in configs:
            saved = row_bytes - config.packed_bytes
            if saved <= 0 and num_bytes >= row_bytes * num_embeddings:
                return cls(num_embeddings, embedding_dim, num_hot=num_embeddings, bits=config.bits, **options)
            if saved > 0 and num_bytes >= config.packed_bytes * num_embeddings:
                num_hot = min((num_bytes - config.packed_bytes * num_embeddings) // saved, num_embeddings)
                return cls(num_embeddings, embedding_dim, num_hot=num_hot, bits=config.bits, **options)
        least = min(min(config.packed_bytes, row_bytes) for config in configs)
        raise ConfigError(
            f"mixed_precision cannot be stored in {num_bytes:,} bytes here: the least is {least * num_embeddings:,}, "
            f"{least} bytes an id; its ratio cannot pass {row_bytes / least:.3g}"
        )

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """The vectors themselves, the cold ones rounded. The hot ids are the first ones, whatever the weights say:
        number ids by falling popularity."""
        from embstore.fitting.checks import checked

        checked(vectors_ND, weights_N)
        self.load_state_dict({"weight": vectors_ND.float()})


def round_rows(rows: Tensor, bits: int, noise: Tensor | None = None) -> Tensor:
    """What rows [..., D] read back as once they are packed: rounded to the nearest, or up where `noise` says so.

    noise: numbers in [0, 1), of the rows' shape. Drawn evenly, they make the mean of many roundings the number itself.
    Without noise every operation is that of `quantize.pack` and `dequantize`.
    """
    if bits == 8:
        low = rows.amin(dim=-1, keepdim=True)
        span = rows.amax(dim=-1, keepdim=True) - low
        scale, top = span / 255, 255
        inverse = torch.full_like(span, 255) / (span + 1e-8)  # `255 / x` is 255 times a rounded 1 / x
    else:
        low = rows.amin(dim=-1, keepdim=True).half().to(rows.dtype)
        half = ((rows.amax(dim=-1, keepdim=True) - low) / 15).half()
        scale, top = torch.where(half == 0, 1.0, half).to(rows.dtype), 15
        inverse = 1 / scale
    if noise is None:
        codes = ((rows - low) * inverse).round()
    else:
        codes = ((rows - low) / torch.where(scale > 0, scale, 1.0) + noise).floor()
    return codes.clamp(0, top) * scale + low
