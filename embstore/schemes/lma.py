"""LMA: one memory, addressed by locality-sensitive hashes of histories (Desai et al., 2021, arXiv 2103.06124).

Each id has a signature of 64 bits, 16 keys of 4 bits, such that ids with similar histories have many keys in common.
Dimension i looks at `keys_per_dim` of the keys, so ids that agree on those share the number:

    e[x, i] = memory[bucket(signature[x] & mask[i], M, t[i])]

    mask[i]   the bits of the k keys j (bits 4 j .. 4 j + 3) with the least mix64(16 i + j, seed), as int64
    t[i]      mix64(-1 - i, seed), as unsigned: the seed of dimension i
    bucket    the high 32 bits of mix64(key, t[i]), times M, shifted right by 32

Key j of an id with a history S is the low 4 bits of min over c in S of mix64(c, mix64(j, seed)), a b-bit minhash: two
ids agree on it with probability J + (1 - J) / 16, J being the Jaccard similarity of their histories, so they share a
dimension with probability (J + (1 - J) / 16) ** k + 1 / M or so. The signature of an id without a history, and of all
where no histories are given, is mix64(x, seed): such ids share by chance alone.

k is the smallest with 16 ** k D >= 2 M unless given: with fewer keys there would not be enough combinations to
fill the memory, with more even similar ids would rarely share.

Stored: `memory` float32 [memory_size] and `signatures` int64 [n]: 4 M + 8 n bytes. The ratio stays below D / 2.
Lookup: 8 + 4 D bytes read in D + 1 places, D hashes, no arithmetic.

Ids past num_embeddings have no signature and no vector. `fit` has no histories but vectors: it takes the signs of 64
random projections (SimHash) for the signature, so that ids with similar vectors share. Gradients of the memory are
dense (`sparse` has no effect). A new signature moves an id's numbers, so a version of the table is trained with the
signatures it is served with.
"""

# Shapes: N num_embeddings, D embedding_dim, M memory_size, E pairs of a history, P projections.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.hashing import MASK64, MAX_BUCKETS, bucket_torch, mix64, mix64_torch, seed_offset, to_signed
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal, only_budget

cpu_memory, cuda_memory = Loops("cpu.memory"), Loops("cuda.memory")

NUM_KEYS, KEY_BITS = 16, 4
MAX_SEED = (1 << 63) - 1
ADDS_NOTHING = -1
"""The seed whose offset is 0: for keys that have theirs in them already."""


@dataclass(frozen=True, kw_only=True)
class LMAConfig(SchemeConfig):
    """memory_size: floats in the memory (M); keys_per_dim: of the 16 keys, how many a dimension looks at (k, None: as
    many as fill the memory); seed: of all hashes."""

    memory_size: int
    keys_per_dim: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("memory_size", at_least=1, at_most=MAX_BUCKETS)
        self.require("seed", at_least=0, at_most=MAX_SEED)
        if self.keys_per_dim is None:
            object.__setattr__(self, "keys_per_dim", enough_keys(self.embedding_dim, self.memory_size))
        self.require("keys_per_dim", at_least=1, at_most=NUM_KEYS)


def enough_keys(embedding_dim: int, memory_size: int) -> int:
    """The fewest keys a dimension with at least twice as many combinations as there are numbers to share out."""
    return next(k for k in range(1, NUM_KEYS + 1) if (1 << KEY_BITS * k) * embedding_dim >= 2 * memory_size)


class LMA(Scheme):
    """Ids with similar histories share numbers of one memory."""

    name = "lma"
    Config = LMAConfig
    uses = frozenset({"histories"})
    given_in_code = frozenset({"signatures"})
    facts = Facts(
        vector="D numbers of one memory, shared with ids of like history",
        stored="4 M + 8 n",
        reads="4 D scattered + 8",
        ceiling="D / 2",
        unseen="by its hash, as if unrelated to all",
    )
    config: LMAConfig
    signatures: Tensor

    def start(
        self, std: float, generator: torch.Generator | None, *, histories: Any = None, signatures: Tensor | None = None
    ) -> None:
        """histories: int64 [E, 2], pairs of an id and what it occurred with. signatures: int64 [N], made elsewhere."""
        num_embeddings, seed = self.num_embeddings, self.config.seed
        self.memory = normal((self.config.memory_size,), std, generator=generator)
        if signatures is None:
            found = (
                hashed_signatures(num_embeddings, seed)
                if histories is None
                else signatures_from_histories(num_embeddings, histories, seed)
            )
        elif histories is None:
            found = _checked(signatures, num_embeddings)
        else:
            raise ConfigError("give histories or signatures, not both")
        self.register_buffer("signatures", found)

    @staticmethod
    def compose(config: LMAConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e[i] = memory[h(signature & mask[i])]."""
        memory = tensors["memory"]
        index = places(config, tensors["signatures"][ids])
        return memory.index_select(0, index.reshape(-1)).reshape(index.shape)

    @staticmethod
    def lookup_cpu(config: LMAConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e[i] = memory[h(signature & mask[i])]."""
        masks, offsets = addressing(config)
        cpu_memory.gather_by_signature(tensors["memory"], tensors["signatures"], masks, offsets, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: LMAConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e[i] = memory[h(signature & mask[i])]."""
        masks, offsets = _addressing_on(config, out_BD.device)
        cuda_memory.gather_by_signature(tensors["memory"], tensors["signatures"], masks, offsets, ids_B, out_BD)

    @classmethod
    def layout(cls, config: LMAConfig) -> dict[str, TensorSpec]:
        """The memory and the ids' signatures."""
        return {
            "memory": TensorSpec((config.memory_size,)),
            "signatures": TensorSpec((config.num_embeddings,), "int64"),
        }

    @classmethod
    def from_budget(
        cls, num_embeddings: int, embedding_dim: int, num_bytes: int, *, frequencies: Any = None, **options: Any
    ) -> Self:
        """The signatures first; the rest is the memory's."""
        only_budget(options, "memory_size")
        own_bytes = 8 * num_embeddings
        if num_embeddings > 0 and num_bytes < own_bytes + 4:
            raise ConfigError(
                f"lma cannot be stored in {num_bytes:,} bytes here: the least is {own_bytes + 4:,}, because each id "
                f"keeps a signature of 8 bytes; its ratio stays below {embedding_dim / 2:g}"
            )
        memory_size = min(max((num_bytes - own_bytes) // 4, 1), MAX_BUCKETS)
        return cls(num_embeddings, embedding_dim, memory_size=memory_size, **options)

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Self:
        """Each number of the memory the weighted mean of all that read it: the optimum for given signatures.

        The signatures are those of the vectors (SimHash about their weighted mean), or of `histories` where given.
        Fewer and more keys a dimension are tried as well, and the best is kept, unless `keys_per_dim` is given.
        """
        from embstore.fitting.slots import weighted_slot_means

        if "histories" not in options and "signatures" not in options:
            options["signatures"] = signatures_from_vectors(vectors_ND, weights_N=weights_N, generator=generator)
        num_embeddings, dim = vectors_ND.shape
        module = cls.from_budget(num_embeddings, dim, num_bytes, generator=generator, **options)
        first, signatures = module.config, module.signatures.to(vectors_ND.device)
        assert first.keys_per_dim is not None
        tried = [first.keys_per_dim]
        if options.get("keys_per_dim") is None:
            tried = [k for k in (tried[0], tried[0] - 1, tried[0] + 1) if 1 <= k <= NUM_KEYS]
        most = -1.0
        for keys_per_dim in tried:
            config = replace(first, keys_per_dim=keys_per_dim)

            def read_by(ids_n: Tensor, config: LMAConfig = config) -> tuple[Tensor, None]:
                return places(config, signatures[ids_n]), None

            means_M, explained = weighted_slot_means(
                vectors_ND, read_by, config.memory_size, weights_N=weights_N, progress=progress
            )
            if explained > most:
                most, module.config = explained, config
                module.memory.data = means_M.float().cpu()
        return module


@lru_cache(maxsize=64)
def addressing(config: LMAConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks and hash offsets of the D dimensions."""
    dims_D = np.arange(config.embedding_dim, dtype=np.int64)
    keys = mix64(NUM_KEYS * dims_D[:, None] + np.arange(NUM_KEYS), config.seed)
    chosen = np.argsort(keys, axis=1)[:, : config.keys_per_dim]
    key_bits = np.uint64((1 << KEY_BITS) - 1) << (KEY_BITS * np.arange(NUM_KEYS, dtype=np.uint64))
    masks_D = np.bitwise_or.reduce(key_bits[chosen], axis=1).view(np.int64)
    seeds_D = mix64(-1 - dims_D, config.seed)
    offsets_D = np.array([seed_offset(int(seed) & MASK64) for seed in seeds_D], np.int64)
    return masks_D, offsets_D


@lru_cache(maxsize=64)
def _addressing_on(config: LMAConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks and hash offsets on a device, copied there once."""
    masks_D, offsets_D = (torch.from_numpy(part).to(device) for part in addressing(config))
    return masks_D, offsets_D


def places(config: LMAConfig, signatures: Tensor) -> Tensor:
    """Where in the memory each number is, for signatures of any shape: int64 `(*shape, D)`."""
    masks_D, offsets_D = (torch.from_numpy(part).to(signatures.device) for part in addressing(config))
    return bucket_torch((signatures[..., None] & masks_D) + offsets_D, config.memory_size, ADDS_NOTHING)


def hashed_signatures(num_embeddings: int, seed: int) -> Tensor:
    """Signatures that say nothing about similarity: the ids' own hashes."""
    return mix64_torch(torch.arange(num_embeddings), seed)


def signatures_from_histories(num_embeddings: int, histories: Any, seed: int = 0) -> Tensor:
    """The signatures int64 [N] of 16 minhashes, 4 bits of each; hashed where an id has no history.

    histories: int64 [E, 2], pairs of an id and what it occurred with, in any order; repetitions change nothing.
    """
    pairs_E2 = torch.as_tensor(histories)
    if pairs_E2.ndim != 2 or pairs_E2.shape[1] != 2 or pairs_E2.is_floating_point() or pairs_E2.dtype == torch.bool:
        raise DataError(
            f"histories are whole numbers [pairs, 2], an id and what it occurred with, got {pairs_E2.dtype} "
            f"{list(pairs_E2.shape)}"
        )
    ids_E, contexts_E = pairs_E2.long().unbind(1)
    outside_E = (ids_E < 0) | (ids_E >= num_embeddings)
    if outside_E.any():
        row = int(outside_E.nonzero()[0])
        raise DataError(f"histories name id {int(ids_E[row])} in row {row:,}, ids are in [0, {num_embeddings:,})")
    signatures_N = torch.zeros(num_embeddings, dtype=torch.int64)
    none = torch.iinfo(torch.int64).max
    for key in range(NUM_KEYS):
        hashed_E = mix64_torch(contexts_E, int(mix64(np.array(key), seed)) & MASK64)
        least_N = torch.full((num_embeddings,), none).scatter_reduce_(0, ids_E, hashed_E, "amin")
        signatures_N |= (least_N & ((1 << KEY_BITS) - 1)) << KEY_BITS * key
    seen_N = torch.zeros(num_embeddings, dtype=torch.bool)
    seen_N[ids_E] = True
    return torch.where(seen_N, signatures_N, hashed_signatures(num_embeddings, seed))


def signatures_from_vectors(
    vectors_ND: Tensor, *, weights_N: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The signatures int64 [N] of which side of 64 random hyperplanes through their mean the vectors are on."""
    from embstore.fitting.checks import checked, chunks, weighted_mean

    mean_D = weighted_mean(vectors_ND, checked(vectors_ND, weights_N)).cpu()
    planes_DP = torch.randn(vectors_ND.shape[1], NUM_KEYS * KEY_BITS, generator=generator, dtype=torch.float64)
    bits_P = torch.tensor([to_signed(1 << bit) for bit in range(NUM_KEYS * KEY_BITS)])
    signatures_N = torch.empty(len(vectors_ND), dtype=torch.int64)
    for at in chunks(*vectors_ND.shape):
        side_nP = (vectors_ND[at].double().cpu() - mean_D) @ planes_DP > 0
        signatures_N[at] = (side_nP * bits_P).sum(dim=1)
    return signatures_N


def _checked(signatures: Tensor, num_embeddings: int) -> Tensor:
    if signatures.dtype != torch.int64 or signatures.shape != (num_embeddings,):
        raise DataError(
            f"signatures are int64 [{num_embeddings:,}], one an id, got {signatures.dtype} {list(signatures.shape)}"
        )
    return signatures
