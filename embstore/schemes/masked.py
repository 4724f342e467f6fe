"""Masked widths (AMTL: Yan et al., CIKM 2021, arXiv 2108.11513): `e = the first k_x numbers of a vector, then zeros`.

How many, k_x, depends on how often x occurs, and is learned: in training every id has a full row and a network masks
its end (`mask_learner`). What is published is what the masks leave: rows of different widths, one after the other.
Ids are numbered by falling frequency and k_x is the same for a block of them, so a row's place is computed.

Stored: `values` float32 [sum of n_b k_b], 4 k_x bytes per id; sizes and widths of the blocks stand in the config.
`rotation`: one matrix R float32 [D, D] more, e = (row, zeros) R. Each id keeps a number at least: the ratio cannot pass
D. `values` is one flat array, not rows of one width: it is stored as float32 only.
Lookup: 4 k_x bytes read, no arithmetic; with rotation 2 k_x D operations.

Starts with vectors of equal expected length in all blocks: narrow rows have larger numbers. Ids that were never seen in
training are the last ones, with the narrowest rows. What follows sees zeros in the last columns of rare ids' vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Progress, Rows, Scheme, SchemeConfig, Tensors, target_std
from embstore.schemes.parts.widths import (
    best_widths,
    block_of,
    check_blocks,
    equal_blocks,
    power_law,
    second_moments,
)

cpu_masked = Loops("cpu.masked")


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(SchemeConfig):
    """block_sizes: how many ids each block has, which come one after the other; block_widths: numbers in their rows;
    rotation: whether the padded rows are multiplied by a matrix."""

    block_sizes: tuple[int, ...]
    block_widths: tuple[int, ...]
    rotation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self)
        if not isinstance(self.rotation, bool):
            raise ConfigError(f"rotation must be true or false, got {self.rotation!r}")

    @cached_property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of every block: the first id after it, its width, and where a row of it that belonged to id 0 would be."""
        sizes_K, widths_K = np.array(self.block_sizes), np.array(self.block_widths)
        ends_K, floats_K = sizes_K.cumsum(), (sizes_K * widths_K).cumsum()
        return ends_K, widths_K, floats_K - ends_K * widths_K


class Masked(Scheme):
    """The form that is served: widths are fixed, rows can be trained. `from_budget` gives one that learns widths."""

    name = "masked"
    Config = MaskedConfig
    by_rank = True
    uses = frozenset({"frequencies"})
    tolerance = 2e-6  # with rotation; without it the vectors are the stored numbers
    config: MaskedConfig

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        block_sizes: tuple[int, ...],
        block_widths: tuple[int, ...],
        rotation: bool = False,
        sparse: bool = False,
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        config = MaskedConfig(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            block_sizes=block_sizes,
            block_widths=block_widths,
            rotation=rotation,
        )
        super().__init__(config, sparse=sparse)
        std = target_std(embedding_dim, init_std)
        parts = [
            torch.empty(size * width).normal_(0.0, std * (embedding_dim / width) ** 0.5, generator=generator)
            for size, width in zip(config.block_sizes, config.block_widths, strict=True)
        ]
        self.values = nn.Parameter(torch.cat(parts))
        if rotation:
            self.rotation = nn.Parameter(torch.eye(embedding_dim))

    @classmethod
    def from_config(cls, config: SchemeConfig) -> Self:
        """The form that is served, whichever class is asked."""
        return cast(Self, Masked(**asdict(config)))

    def networks(self) -> Iterable[nn.Parameter]:
        """The rotation."""
        return (self.rotation,) if self.config.rotation else ()

    @staticmethod
    def compose(config: MaskedConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = (the first k_x numbers, then zeros) (R)."""
        values = tensors["values"]
        block = block_of(ids, config.block_sizes)
        widths, shifts = (torch.from_numpy(part).to(ids.device)[block] for part in config.places[1:])
        column_D = torch.arange(config.embedding_dim, device=ids.device)
        stored = column_D < widths[..., None]
        index = torch.where(stored, (shifts + ids * widths)[..., None] + column_D, 0)
        vectors = torch.where(stored, values.index_select(0, index.reshape(-1)).reshape(index.shape), 0.0)
        return vectors @ tensors["rotation"] if config.rotation else vectors

    @staticmethod
    def lookup_cpu(config: MaskedConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (the first k_x numbers, then zeros) (R)."""
        values = tensors["values"][None]
        if config.rotation:
            cpu_masked.prefix_rotated(values, tensors["rotation"], *config.places, ids_B, out_BD)
        else:
            cpu_masked.prefix(values, *config.places, ids_B, out_BD)

    @classmethod
    def lookup_gpu(cls, config: MaskedConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = (the first k_x numbers, then zeros) (R)."""
        from embstore.kernels.cuda import masked as cuda_masked

        ends, widths, shifts = (part.tolist() for part in config.places)
        if config.rotation:
            cuda_masked.prefix_rotated(tensors["values"], tensors["rotation"], ends, widths, shifts, ids_B, out_BD)
        else:
            cuda_masked.prefix(tensors["values"], ends, widths, shifts, ids_B, out_BD)

    @classmethod
    def layout(cls, config: MaskedConfig) -> dict[str, TensorSpec]:
        """All rows in one array, the rotation."""
        num_floats = sum(size * width for size, width in zip(config.block_sizes, config.block_widths, strict=True))
        dim = config.embedding_dim
        return {
            "values": TensorSpec((num_floats,)),
            **({"rotation": TensorSpec((dim, dim))} if config.rotation else {}),
        }

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        num_blocks: int = 16,
        rotation: bool = False,
        **options: Any,
    ) -> Self:
        """A module that learns its widths within the budget; at its start they follow a power law that fills it.

        frequencies: float [N], how often each id occurs. None: the k-th id is taken to occur 1 / k times as often as
        the first (Zipf's law). num_blocks: blocks of equal popularity, each of one width. The rest as `MaskLearner`.
        """
        from embstore.schemes.parts.masked_learner import MaskLearner

        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if "block_sizes" in options or "block_widths" in options:
            raise ConfigError("give either a budget or block_sizes and block_widths, not both")
        blocks = equal_blocks(num_embeddings, num_blocks, frequencies)
        num_floats = _floats(num_embeddings, embedding_dim, num_bytes, rotation)
        widths = power_law(blocks, embedding_dim, num_floats, projected=False)
        assert widths is not None  # one number an id fits
        config = MaskedConfig(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            block_sizes=blocks.sizes,
            block_widths=widths,
            rotation=rotation,
        )
        return cast(Self, MaskLearner(config, num_floats, blocks.rates, **options))

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        num_blocks: int = 16,
        rotation: bool = False,
        **options: Any,
    ) -> Self:
        """The widths that keep the most weighted energy in the budget, and the given vectors cut to them.

        The columns of a table that was not trained for it are alike, and cutting some off loses what they hold. With
        `rotation` they are rotated first so that they hold less and less (the principal axes): much closer, for 4 D^2
        bytes and a product per lookup.
        """
        from embstore.fitting.checks import checked

        num_vectors, dim = vectors_ND.shape
        mass_N = checked(vectors_ND, weights_N)
        blocks = equal_blocks(num_vectors, num_blocks, mass_N)
        moments_KDD = second_moments(vectors_ND, mass_N, blocks.sizes)
        axes_DD = torch.eye(dim, dtype=torch.float64, device=vectors_ND.device)
        if rotation:
            axes_DD = torch.linalg.eigh(moments_KDD.sum(0)).eigenvectors.flip(1)
        energy_KD = (axes_DD * (moments_KDD @ axes_DD)).sum(1)
        cost_KD = np.array(blocks.sizes)[:, None] * np.arange(1, dim + 1)
        num_floats = _floats(num_vectors, dim, num_bytes, rotation)
        widths = best_widths(energy_KD.cumsum(1).cpu().numpy(), cost_KD, num_floats)
        config = merged(num_vectors, dim, blocks.sizes, widths, rotation)
        module = cls(num_vectors, dim, **config.parameters(), generator=generator, **options)
        state = {"values": cut(vectors_ND, config, axes_DD if rotation else None)}
        module.load_state_dict(state | ({"rotation": axes_DD.T.float()} if rotation else {}))
        return module


def merged(
    num_embeddings: int, embedding_dim: int, sizes: Sequence[int], widths: Sequence[int], rotation: bool
) -> MaskedConfig:
    """The config of these blocks; neighbours of one width become one block."""
    runs = [(width, list(run)) for width, run in groupby(zip(sizes, widths, strict=True), key=lambda pair: pair[1])]
    return MaskedConfig(
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        block_sizes=tuple(sum(size for size, _ in run) for _, run in runs),
        block_widths=tuple(width for width, _ in runs),
        rotation=rotation,
    )


def cut(rows_ND: Tensor, config: MaskedConfig, axes_DD: Tensor | None = None) -> Tensor:
    """`values` of full rows: each cut to the width of its block, after a rotation to `axes` where those are given."""
    parts, first = [], 0
    for size, width in zip(config.block_sizes, config.block_widths, strict=True):
        part_nD = rows_ND[first : first + size]
        part_nd = part_nD[:, :width] if axes_DD is None else part_nD @ axes_DD[:, :width].to(part_nD.dtype)
        parts.append(part_nd.float().reshape(-1))
        first += size
    return torch.cat(parts)


def _floats(num_embeddings: int, dim: int, num_bytes: int, rotation: bool) -> int:
    """How many numbers of rows a budget holds; ConfigError when there is not one for each id."""
    fixed = dim * dim if rotation else 0
    if num_bytes < 4 * (num_embeddings + fixed):
        raise ConfigError(
            f"masked cannot be stored in {num_bytes:,} bytes here: the least is {4 * (num_embeddings + fixed):,}, "
            f"because each id keeps a number of its own; its ratio stays below {dim}"
        )
    return num_bytes // 4 - fixed
