"""Product quantisation: `e = (C_1[c_x1], .., C_M[c_xM])`, codewords side by side, each named by a byte (Jegou, Douze
and Schmid, TPAMI 2011; for embedding tables, learned by popularity: MEC, arXiv 2502.15355).

A vector is cut into M parts and each part is one of K codewords of a codebook that all ids share. `num_stages` S: the
codewords of S codebooks are added up, each stage quantising what the ones before it left (residual quantisation).
`rotation`: one matrix R more, `e = (..) R`, so that the parts need not be the columns as they come: on vectors with
correlated columns it is worth as much as twice the bytes.

Stored: `codes` uint8 [n, S M], `codebooks` float32 [S M K, D / M], with rotation `rotation` float32 [D, D]:
n S M + 4 S K D (+ 4 D^2) bytes. At K = 256, D = 64: S M bytes an id and S x 64 KB. The ratio cannot pass 4 D / (S M).
Only the codebooks may be stored in fewer bits; they hardly count.
Lookup: S M bytes read, 4 S D bytes of codewords from the cache, (S - 1) D additions; with rotation 2 S D^2 operations
in small batches, S M D additions in large ones.

Three ways to one: `fit` quantises given vectors, weighted by popularity. `from_budget` gives a module that trains
vectors and codes together (`CodeLearner`). The class itself has its codes fixed and trains codebooks (and rotation):
what `fit` and `from_tensors` give, for MEC's last step, an epoch of fine-tuning.

Starts with random codes, codewords ~ N(0, s / sqrt S) and the identity as rotation. An id past the end has no codes;
`on_missing = "default"` is the best answer for it (the mean vector), `encode` gives the codes of ids that are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import log2
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError, DataError, VerificationFailed
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Progress, Rows, Scheme, SchemeConfig, Tensors, normal, target_std

# Shapes: N ids, B of them in a batch, D embedding_dim, M parts, W = D / M columns of a part, S stages, K codes,
# C = S M columns of codes, ordered by stage, then part.

cpu_pq = Loops("cpu.pq")

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
                f"use one of {', '.join(str(part) for part in _divisors(self.embedding_dim))}"
            )
        if not isinstance(self.rotation, bool):
            raise ConfigError(f"rotation must be true or false, got {self.rotation!r}")

    @property
    def num_columns(self) -> int:
        """Bytes of an id's codes."""
        return self.num_stages * self.num_parts


class PQ(Scheme):
    """Codes fixed, codebooks trained. `from_budget` gives a module that learns its codes."""

    name = "pq"
    Config = PQConfig
    uses = frozenset({"frequencies"})
    tolerance = 2e-6  # with rotation; without it the loops do what torch does
    config: PQConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        num_parts: int,
        num_codes: int = MAX_CODES,
        num_stages: int = 1,
        rotation: bool = False,
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        config = PQConfig(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_parts=num_parts,
            num_codes=num_codes,
            num_stages=num_stages,
            rotation=rotation,
        )
        super().__init__(config, sparse=sparse)
        codes = torch.empty((num_embeddings, config.num_columns), dtype=torch.uint8)
        self.register_buffer("codes", codes.random_(0, num_codes, generator=generator))
        self.codebooks = initial_codebooks(config, init_std, generator)
        if rotation:
            self.rotation = nn.Parameter(torch.eye(embedding_dim))

    @classmethod
    def from_config(cls, config: SchemeConfig) -> Self:
        """The form with fixed codes, whichever class is asked."""
        return cast(Self, PQ(**asdict(config)))

    def networks(self) -> Iterable[nn.Parameter]:
        """The rotation."""
        return (self.rotation,) if self.config.rotation else ()

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
        from embstore.kernels.cuda import pq as cuda_pq

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

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        num_parts: int | None = None,
        num_codes: int | None = None,
        num_stages: int = 1,
        rotation: bool = False,
        end_to_end: bool = True,
        commitment: float | None = None,
        **options: Any,
    ) -> Self:
        """The parts and codes that fit and make the most of an id, S M log2(K) bits; of equals, the fewer parts.

        Where ids are many that is the largest M that fits, with 256 codes. num_parts, num_codes: fixed where given.
        end_to_end: a `CodeLearner`, which takes `frequencies` (how often each id occurs) and `commitment`; without it
        a module with random codes.
        """
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        config = _largest(num_embeddings, embedding_dim, num_bytes, num_parts, num_codes, num_stages, rotation)
        if end_to_end:
            from embstore.schemes.parts.pq_learner import CodeLearner

            return cast(Self, CodeLearner(config, frequencies=frequencies, commitment=commitment, **options))
        if commitment is not None:
            raise ConfigError("commitment is for training end to end; leave it out, or set end_to_end")
        return cast(Self, PQ(**asdict(config), **options))

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        iterations: int = 25,
        **options: Any,
    ) -> Self:
        """Weighted k-means in every part, after a learned rotation and in stages where asked.

        100,000 ids x 64 in 16 parts take 13 s on one core, with a rotation 31 s. iterations: of each k-means.
        """
        from embstore.fitting.product import product_codes

        if options.pop("end_to_end", False):
            raise ConfigError("a fit has its codes fixed: leave end_to_end out")
        n, dim = vectors_ND.shape
        module = cls.from_budget(n, dim, num_bytes, generator=generator, end_to_end=False, **options)
        config = module.config
        found = product_codes(
            vectors_ND,
            config.num_parts,
            config.num_codes,
            num_stages=config.num_stages,
            rotation=config.rotation,
            weights_N=weights_N,
            iterations=iterations,
            generator=generator,
            progress=progress,
        )
        rotation = {} if found.rotation is None else {"rotation": found.rotation.float()}
        module.load_state_dict({"codes": found.codes, "codebooks": found.codebooks.float(), **rotation})
        return module

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


def initial_codebooks(config: PQConfig, init_std: float | None, generator: torch.Generator | None) -> nn.Parameter:
    """Codewords whose sums over the stages have the standard deviation that vectors start with."""
    std = target_std(config.embedding_dim, init_std) / config.num_stages**0.5
    return normal(PQ.layout(config)["codebooks"].shape, std, generator=generator)


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


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _largest(
    num_embeddings: int,
    embedding_dim: int,
    num_bytes: int,
    num_parts: int | None,
    num_codes: int | None,
    num_stages: int,
    rotation: bool,
) -> PQConfig:
    """The config with the most bits an id that fits; ConfigError that names the least and the ceiling."""

    def config(parts: int, codes: int) -> PQConfig:
        return PQConfig(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_parts=parts,
            num_codes=codes,
            num_stages=num_stages,
            rotation=rotation,
        )

    def size(parts: int, codes: int) -> int:
        return sum(slot.num_bytes for slot in PQ.layout(config(parts, codes)).values())

    candidates = _divisors(embedding_dim) if num_parts is None else [num_parts]
    least = size(candidates[0], 1 if num_codes is None else num_codes)  # which refuses what no config can have
    if num_bytes < least:
        column = num_stages * candidates[0]
        raise ConfigError(
            f"pq cannot be stored in {num_bytes:,} bytes here: the least is {least:,}, because each id keeps {column} "
            f"byte{'s' if column > 1 else ''} of codes; its ratio stays below {4 * embedding_dim / column:g}"
        )
    fitting: list[tuple[float, int, int]] = []
    for parts in candidates:
        word_bytes = size(parts, 2) - size(parts, 1)
        most = min((num_bytes - size(parts, 1)) // word_bytes + 1, MAX_CODES, num_embeddings)
        codes = most if num_codes is None else num_codes
        if codes >= 1 and size(parts, codes) <= num_bytes:
            fitting.append((round(parts * num_stages * log2(codes), 9), -parts, codes))
    _, parts, codes = max(fitting)
    return config(-parts, codes)
