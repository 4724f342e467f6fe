"""What both forms of `pq` store and serve: codes of ids, codebooks, and the rotation where there is one.

`embstore.schemes.pq` has the formula; `PQ` there has its codes fixed, `pq_learner` learns them.
"""

# Shapes: N ids, B of them in a batch, D embedding_dim, M parts, W = D / M columns of a part, S stages, K codes,
# C = S M columns of codes, ordered by stage, then part.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Rows, Scheme, SchemeConfig, Tensors, normal

cpu_pq, cuda_pq = Loops("cpu.pq"), Loops("cuda.pq")

MAX_CODES = 256
CHUNK_ELEMENTS = 1 << 22
ENCODED_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PQConfig(SchemeConfig):
    """num_parts: parts of a vector (M), a divisor of embedding_dim; num_codes: codewords of a part (K), up to 256;
    num_stages: codewords that are added (S); rotation: whether a matrix follows."""

    num_parts: int
    num_codes: int = MAX_CODES
    num_stages: int = 1
    rotation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_parts", at_least=1, at_most=self.embedding_dim)
        self.require("num_codes", at_least=1, at_most=MAX_CODES)
        self.require("num_stages", at_least=1)
        if self.embedding_dim % self.num_parts:
            raise ConfigError(
                f"num_parts must divide embedding_dim, {self.embedding_dim}, got {self.num_parts}: "
                f"use one of {', '.join(str(part) for part in divisors(self.embedding_dim))}"
            )
        self.require_bool("rotation")

    @property
    def num_columns(self) -> int:
        """Bytes of an id's codes."""
        return self.num_stages * self.num_parts


class CodeTable(Scheme):
    """Codes and codebooks: how vectors are read from them, and which codes are nearest to given vectors."""

    name = "pq"
    Config = PQConfig
    uses = frozenset({"frequencies"})
    tolerance = 2e-6  # with rotation; without it the loops do what torch does
    facts = Facts(
        vector="M codewords, joined (S stages added, D x D rotation)",
        stored="n S M + 1,024 S D (+ 4 D^2)",
        reads="S M + cached",
        ceiling="4 D / M",
        unseen="its codes, as they started",
    )
    config: PQConfig
    codebooks: nn.Parameter

    def rows(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Rows of the codebooks: few, and most of them in every batch, so their gradient is dense."""
        return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])

    @staticmethod
    def compose(config: PQConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = (C_1[c_x1], .., C_M[c_xM]) (R)."""
        return decode(config, tensors, tensors["codes"][ids], rows)

    @staticmethod
    def lookup_cpu(config: PQConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (C_1[c_x1], .., C_M[c_xM]) (R)."""
        codebooks, codes = tensors["codebooks"], tensors["codes"]
        if config.rotation:
            cpu_pq.gather_codes_rotated(codebooks, codes, config.num_parts, tensors["rotation"], ids_B, out_BD)
        else:
            cpu_pq.gather_codes(codebooks, codes, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: PQConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (C_1[c_x1], .., C_M[c_xM]) (R)."""
        codebooks, codes = tensors["codebooks"], tensors["codes"]
        if config.rotation:
            cuda_pq.gather_codes_rotated(codebooks, codes, config.num_parts, tensors["rotation"], ids_B, out_BD)
        else:
            cuda_pq.gather_codes(codebooks, codes, ids_B, out_BD)

    @classmethod
    def layout(cls, config: PQConfig) -> dict[str, TensorSpec]:
        """Codes, codebooks, the rotation."""
        dim = config.embedding_dim
        return {
            "codes": TensorSpec((config.num_embeddings, config.num_columns), "uint8"),
            "codebooks": TensorSpec((config.num_columns * config.num_codes, dim // config.num_parts), rows=True),
            **({"rotation": TensorSpec((dim, dim))} if config.rotation else {}),
        }

    @classmethod
    def check_tensors(cls, config: PQConfig, tensors: Mapping[str, Any]) -> None:
        """VerificationFailed when a code names no codeword."""
        if config.num_codes < MAX_CODES and int(tensors["codes"].max()) >= config.num_codes:
            row = int((tensors["codes"] >= config.num_codes).any(axis=1).argmax())
            raise VerificationFailed(
                f"array 'codes' names codeword {int(tensors['codes'][row].max())} in row {row:,}, "
                f"there are {config.num_codes} of a part"
            )

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """The codes uint8 [B, S M] of any vectors [B, D]; DataError when they hold NaN or infinity.

        In float64: what is nearest does not depend on the batch.
        """
        if not torch.isfinite(vectors).all():
            raise DataError("vectors to encode hold NaN or infinity")
        rotation, codebooks = self.get_rotation(), self.codebooks.double()
        rotation = None if rotation is None else rotation.double()
        parts = [
            nearest_codes(self.config, codebooks, part.double(), rotation)
            for part in torch.split(vectors, ENCODED_AT_ONCE)
        ]
        return torch.cat(parts).to(torch.uint8)

    def get_rotation(self) -> Tensor | None:
        """R, where there is one."""
        return self.tensors()["rotation"] if self.config.rotation else None

    def initial_codebooks(self, std: float, generator: torch.Generator | None) -> nn.Parameter:
        """Codewords whose sums over the stages have the standard deviation that vectors start with."""
        shape = self.layout(self.config)["codebooks"].shape
        return normal(shape, std / self.config.num_stages**0.5, generator=generator)


def decode(config: PQConfig, tensors: Mapping[str, Tensor], codes: Tensor, rows: Rows) -> Tensor:
    """Codes [..., C] to vectors [..., D]."""
    num_parts = config.num_parts
    first_C = torch.arange(config.num_columns, device=codes.device) * config.num_codes
    words = rows(tensors["codebooks"], codes.long() + first_C)
    parts = words[..., :num_parts, :]
    for stage in range(1, config.num_stages):
        parts = parts + words[..., stage * num_parts : (stage + 1) * num_parts, :]
    vectors = parts.flatten(-2)
    return vectors @ tensors["rotation"] if config.rotation else vectors


def nearest_codes(config: PQConfig, codebooks: Tensor, vectors_BD: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Codes int64 [B, C]: stage by stage the nearest codeword of every part, the first of equals."""
    num_parts, width = config.num_parts, config.embedding_dim // config.num_parts
    books_SMKW = codebooks.view(config.num_stages, num_parts, config.num_codes, width)
    half_SMK1 = books_SMKW.square().sum(dim=3, keepdim=True) / 2
    # V = W + 1: one product gives x c - |c|^2 / 2, in a quarter of the time that adding afterwards takes.
    against_SMVK = torch.cat([books_SMKW, -half_SMK1], dim=3).transpose(2, 3).contiguous()
    part_M = torch.arange(num_parts, device=vectors_BD.device)
    chunk = max(1, CHUNK_ELEMENTS // (num_parts * config.num_codes))
    found = [torch.empty((0, config.num_columns), dtype=torch.int64, device=vectors_BD.device)]
    for some_bD in torch.split(vectors_BD, chunk):
        turned_bD = some_bD if rotation is None else some_bD @ rotation.T
        rest_MbW = turned_bD.reshape(len(some_bD), num_parts, width).transpose(0, 1)
        one_Mb1 = rest_MbW.new_ones(num_parts, len(some_bD), 1)
        codes = []
        for stage, against_MVK in enumerate(against_SMVK):
            codes.append(_argmax(torch.bmm(torch.cat([rest_MbW, one_Mb1], dim=2), against_MVK)))
            rest_MbW = rest_MbW - books_SMKW[stage, part_M[:, None], codes[-1]]
        found.append(torch.cat(codes).T)
    return torch.cat(found)


def _argmax(values: Tensor) -> Tensor:
    """Where the largest of the last dimension is: by numpy on a CPU, which takes a quarter of torch's time for it."""
    return torch.from_numpy(values.numpy().argmax(-1)) if values.device.type == "cpu" else values.argmax(-1)


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it, from 1 on."""
    return [part for part in range(1, number + 1) if number % part == 0]
