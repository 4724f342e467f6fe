"""What both forms of `masked` store and serve: rows of a width for each block of ids, one after the other.

`embstore.schemes.masked` has the formula; `Masked` there has its widths fixed, `masked_learner` learns them.
"""

# Shapes: N ids, K blocks, D embedding_dim.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Rows, Scheme, SchemeConfig, Tensors
from embstore.schemes.parts.widths import block_of, check_blocks

cpu_masked, cuda_masked = Loops("cpu.masked"), Loops("cuda.masked")


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
        self.require_bool("rotation")

    @cached_property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of every block: the first id after it, its width, and where a row of it that belonged to id 0 would be."""
        sizes_K, widths_K = np.array(self.block_sizes), np.array(self.block_widths)
        ends_K, floats_K = sizes_K.cumsum(), (sizes_K * widths_K).cumsum()
        return ends_K, widths_K, floats_K - ends_K * widths_K


class MaskedTable(Scheme):
    """Rows cut to the widths of their blocks, and the rotation where there is one: how vectors are read from them."""

    name = "masked"
    Config = MaskedConfig
    by_rank = True
    uses = frozenset({"frequencies"})
    tolerance = 2e-6  # with rotation; without it the vectors are the stored numbers
    facts = Facts(
        vector="the first k of D numbers, the fewer the rarer",
        stored="4 sum k",
        reads="4 k",
        ceiling="D",
        unseen="its own numbers, as they started",
    )
    config: MaskedConfig
    rotation: nn.Parameter

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
