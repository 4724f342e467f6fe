"""ROBE: one circular array for all ids (Desai et al., MLSys 2022, arXiv 2108.02191).

A vector is cut into chunks of Z numbers; each chunk is Z neighbours of the array from a hashed place on, round its end:

    e[x, c Z + j] = scale * g * memory[(h + j) mod M]        0 <= j < Z

The index function, all in unsigned 64-bit integers, with K = ceil(D / Z) chunks a vector:

    t    = mix64(table_index, seed)                           the table's own seed
    word = mix64(x K + c, t)                                  one hash a chunk
    h    = ((word >> 32) * M) >> 32
    g    = -1 where bit j mod 64 of mix64(word, j div 64) is 1, else +1

Signs make what two ids share cancel on average instead of adding up. Z = 16 unless said otherwise: 64 bytes, a cache
line's worth, so a chunk costs two lines at most, and vectors of 64 have four places (the D / 4 of published code),
so that two ids hardly ever share all of a vector. Larger Z is faster, smaller Z spreads a little more evenly.

Stored: `memory` float32 [memory_size], 4 M bytes, whatever the number of ids: no ceiling on the ratio.
Lookup: 4 D bytes read in K places, 2 K hashes, D multiplications.

Several tables of one training run share an array: `ROBE(n, d, memory=other.memory, table_index=1)`; `table_index` keeps
their places apart, and `scale` (a float in the config) lets each have its own size of numbers from one array, as in
ROAST (Desai et al., ICML 2023, arXiv 2207.10702). The store writes the array with every table that is published:
sharing saves memory in training, not on disk.

Every id of every table has a vector, seen or not: there is no telling them apart. Gradients of the array are dense
(`sparse` has no effect): the whole array is small, and its numbers are touched by all ids anyway.
"""

# Shapes: N num_embeddings, D embedding_dim, K chunks of a vector, Z block_size, M memory_size.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.hashing import MASK64, MAX_BUCKETS, bucket_torch, mix64, mix64_torch, seed_offset
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import (
    Facts,
    Progress,
    Rows,
    Scheme,
    SchemeConfig,
    Tensors,
    buckets_in,
    normal,
    only_budget,
    target_std,
)

cpu_memory, cuda_memory = Loops("cpu.memory"), Loops("cuda.memory")

MAX_SEED = (1 << 63) - 1
WORD_BITS = 64
FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, kw_only=True)
class ROBEConfig(SchemeConfig):
    """memory_size: floats in the array (M); block_size: neighbours that are read together (Z); signs: hashed signs;
    scale: what is read is multiplied by it; table_index: which of the tables that share an array; seed: of the hash."""

    memory_size: int
    block_size: int = 16
    signs: bool = True
    scale: float = 1.0
    table_index: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("memory_size", at_least=1, at_most=MAX_BUCKETS)
        self.require("block_size", at_least=1, at_most=MAX_BUCKETS)
        self.require("table_index", at_least=0, at_most=MAX_SEED)
        self.require("seed", at_least=0, at_most=MAX_SEED)
        self.require_bool("signs")
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not float(FLOAT32.tiny) <= self.scale <= float(FLOAT32.max):
            raise ConfigError(f"scale must be a number above 0 that float32 holds, got {self.scale!r}")

    @property
    def num_chunks(self) -> int:
        """Blocks in a vector (K); the last may be cut short."""
        return -(-self.embedding_dim // self.block_size)

    @property
    def table_seed(self) -> int:
        """The seed of this table's places."""
        return int(mix64(np.array(self.table_index), self.seed)) & MASK64


class ROBE(Scheme):
    """Blocks of one shared array, at hashed places, with hashed signs."""

    name = "robe"
    Config = ROBEConfig
    given_in_code = frozenset({"memory"})
    facts = Facts(
        vector="blocks of one circular memory",
        stored="4 M",
        reads="4 D in blocks",
        ceiling="none",
        unseen="a vector like any",
    )
    config: ROBEConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        memory_size: int | None = None,
        memory: nn.Parameter | None = None,
        scale: float | None = None,
        init_std: float | None = None,
        **options: Any,
    ) -> None:
        """memory: another table's array, to train on together; memory_size is then its size.

        scale: None is 1, or for a shared array what brings its numbers to `init_std`.
        """
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)  # checked before they are used
        if memory is not None:
            memory_size, scale = _shared(memory, memory_size, scale, target_std(embedding_dim, init_std))
        if memory_size is None:
            raise ConfigError("robe needs a size: memory_size, a budget, or the memory of another table to share")
        sizes: dict[str, Any] = {"memory_size": memory_size, "scale": 1.0 if scale is None else scale}
        super().__init__(num_embeddings, embedding_dim, init_std=init_std, memory=memory, **sizes, **options)

    def start(self, std: float, generator: torch.Generator | None, *, memory: nn.Parameter | None = None) -> None:
        size, scale = self.config.memory_size, self.config.scale
        self.memory = normal((size,), std / scale, generator=generator) if memory is None else memory

    @staticmethod
    def compose(config: ROBEConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = scale * g(x) * memory[h(x)]."""
        memory = tensors["memory"]
        index, negative = places(config, ids)
        values = memory.index_select(0, index.reshape(-1)).reshape(index.shape)
        scale = torch.tensor(config.scale, dtype=torch.float32, device=memory.device)
        factor = scale if negative is None else torch.where(negative, -scale, scale)
        return values * factor.to(memory.dtype)

    @staticmethod
    def lookup_cpu(config: ROBEConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = scale * g(x) * memory[h(x)]."""
        offset = seed_offset(config.table_seed)
        scale = np.float32(config.scale)
        block = min(config.block_size, config.embedding_dim)  # nothing past the vector's end is asked for
        cpu_memory.gather_blocks(tensors["memory"], ids_B, block, offset, config.signs, scale, out_BD)

    @classmethod
    def lookup_gpu(cls, config: ROBEConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = scale * g(x) * memory[h(x)]."""
        how = (config.block_size, seed_offset(config.table_seed), config.signs, config.scale)
        cuda_memory.gather_blocks(tensors["memory"], ids_B, *how, out_BD)

    @classmethod
    def layout(cls, config: ROBEConfig) -> dict[str, TensorSpec]:
        """One array."""
        return {"memory": TensorSpec((config.memory_size,))}

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """All bytes are the array's."""
        only_budget(options, "memory_size", "memory")
        memory_size = min(buckets_in(num_bytes, 4, 0, cls.name), MAX_BUCKETS)
        return cls(num_embeddings, embedding_dim, memory_size=memory_size, **options)

    def solve(self, vectors_ND: Tensor, weights_N: Tensor | None, progress: Progress | None) -> None:
        """Each number of the array the weighted mean of all that read it, signs undone: the least squares optimum."""
        from embstore.fitting.slots import weighted_slot_means

        config = self.config

        def read_by(ids_n: Tensor) -> tuple[Tensor, Tensor | None]:
            return places(config, ids_n)

        means_M, _ = weighted_slot_means(
            vectors_ND, read_by, config.memory_size, weights_N=weights_N, progress=progress
        )
        self.load_state_dict({"memory": (means_M / config.scale).float()})


def places(config: ROBEConfig, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where in the array each number of each vector is (int64 `(*ids.shape, D)`), and which of them are negated."""
    num_chunks, dim, device = config.num_chunks, config.embedding_dim, ids.device
    chunk_D = torch.arange(dim, device=device) // config.block_size
    inside_D = torch.arange(dim, device=device) % config.block_size
    keys = ids[..., None] * num_chunks + torch.arange(num_chunks, device=device)
    start = bucket_torch(keys, config.memory_size, config.table_seed)
    index = (start[..., chunk_D] + inside_D) % config.memory_size
    if not config.signs:
        return index, None
    hashed = mix64_torch(keys, config.table_seed)
    num_words = -(-min(config.block_size, dim) // WORD_BITS)
    words = torch.stack([mix64_torch(hashed, word) for word in range(num_words)], dim=-1)
    bits = words[..., chunk_D, inside_D // WORD_BITS] >> inside_D % WORD_BITS
    return index, (bits & 1).bool()


def _shared(memory: Any, memory_size: int | None, scale: float | None, std: float) -> tuple[int, float]:
    """The size of a given array, and the scale that brings its numbers to a standard deviation."""
    if not isinstance(memory, nn.Parameter):
        raise ConfigError(f"memory is the `memory` of another robe module, got {memory!r}")
    if memory.ndim != 1 or memory.dtype != torch.float32:
        raise ConfigError(f"a shared memory is float32 [memory_size], got {memory.dtype} {list(memory.shape)}")
    if memory_size not in (None, len(memory)):
        raise ConfigError(f"memory_size is {memory_size}, the memory to share has {len(memory)}")
    if scale is None:
        size = float(memory.detach().square().mean().sqrt())
        if not 0 < size < math.inf:
            raise ConfigError(f"the memory to share has numbers of size {size}: give a scale")
        scale = std / size
    return len(memory), scale
