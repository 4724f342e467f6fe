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
vectors and codes together (`PQLearner`). The class itself has its codes fixed and trains codebooks (and rotation):
what `fit` and `from_tensors` give, for MEC's last step, an epoch of fine-tuning.

Starts with random codes, codewords ~ N(0, s / sqrt S) and the identity as rotation. An id past the end has no codes;
`on_missing = "default"` is the best answer for it (the mean vector), `encode` gives the codes of ids that are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from math import log2
from typing import Any, Self

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes.base import Progress, SchemeConfig
from embstore.schemes.parts.code_table import MAX_CODES, CodeTable, PQConfig, divisors
from embstore.schemes.parts.pq_learner import PQLearner

# Shapes: N ids, D embedding_dim.


class PQ(CodeTable):
    """Codes fixed, codebooks trained. `from_budget` gives a module that learns its codes."""

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config = self.config
        codes = torch.empty((config.num_embeddings, config.num_columns), dtype=torch.uint8)
        self.register_buffer("codes", codes.random_(0, config.num_codes, generator=generator))
        self.codebooks = self.initial_codebooks(std, generator)
        if config.rotation:
            self.rotation = nn.Parameter(torch.eye(config.embedding_dim))

    def networks(self) -> Iterable[nn.Parameter]:
        """The rotation."""
        return (self.rotation,) if self.config.rotation else ()

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
    ) -> CodeTable:
        """The parts and codes that fit and make the most of an id, S M log2(K) bits; of equals, the fewer parts.

        Where ids are many that is the largest M that fits, with 256 codes. num_parts, num_codes: fixed where given.
        end_to_end: a `PQLearner`, which takes `frequencies` (how often each id occurs) and `commitment`; without it
        a module with random codes.
        """
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        config = _largest(num_embeddings, embedding_dim, num_bytes, num_parts, num_codes, num_stages, rotation)
        if end_to_end:
            return PQLearner(**asdict(config), frequencies=frequencies, commitment=commitment, **options)
        if commitment is not None:
            raise ConfigError("commitment is for training end to end; leave it out, or set end_to_end")
        return cls(**asdict(config), **options)

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
        assert isinstance(module, cls)
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
        return sum(spec.num_bytes for spec in CodeTable.layout(config(parts, codes)).values())

    candidates = divisors(embedding_dim) if num_parts is None else [num_parts]
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
