"""Mixed dimensions: `e = E_b[x - t_b] P_b` for the block b of x (Ginart et al., ISIT 2021, arXiv 1909.11810).

Ids, numbered by falling frequency, are cut into k blocks of equal popularity. The few ids of the first block have wide
rows, the many of the last narrow ones; a projection per block brings them to one width. Where a row is as wide as the
vector there is no projection, and the row is the vector.

Widths follow the paper's power law d_b = lambda p_b ** alpha, where p_b is how often one id of the block occurs (all
blocks together occur equally often, so that would tell nothing). alpha is solved for the bytes, projections included.

Stored: `rows_b` float32 [n_b, d_b] and, where d_b < D, `projection_b` float32 [d_b, D]: 4 (sum n_b d_b + sum d_b D)
bytes; sizes and widths stand in the config. Each id keeps a number at least: the ratio cannot pass D.
Lookup: 4 d_b bytes read and 2 d_b D operations; the projections come from the cache.

Starts with the same spread in every block: rows ~ N(0, s), orthogonal rows of P_b of length sqrt(D / d_b). Ids that
were never seen in training are the last ones: they keep a random vector of the last block. If popularity moves, ids
change blocks between versions: number them anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.kernels import Loops
from embstore.quantize import TensorSpec
from embstore.schemes.base import Facts, Progress, Rows, Scheme, SchemeConfig, Tensors, normal
from embstore.schemes.parts.widths import (
    Blocks,
    best_widths,
    block_of,
    check_blocks,
    equal_blocks,
    orthogonal_rows,
    power_law,
    second_moments,
)

cpu_project, cuda_project = Loops("cpu.project"), Loops("cuda.project")


@dataclass(frozen=True, kw_only=True)
class MixedDimConfig(SchemeConfig):
    """block_sizes: how many ids each block has, which come one after the other; block_widths: columns of its rows."""

    block_sizes: tuple[int, ...]
    block_widths: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self)

    @cached_property
    def ends_K(self) -> NDArray[np.int64]:
        """The first id after each block."""
        return np.cumsum(self.block_sizes, dtype=np.int64)

    def blocks(self) -> Iterable[tuple[int, int, int]]:
        """(first id, size, width) of every block."""
        return zip(accumulate((0, *self.block_sizes[:-1])), self.block_sizes, self.block_widths, strict=True)


class MixedDim(Scheme):
    """Wide rows for hot ids, narrow and projected ones for the rest."""

    name = "mixed_dim"
    Config = MixedDimConfig
    by_rank = True
    uses = frozenset({"frequencies"})
    tolerance = 2e-6
    facts = Facts(
        vector="a short row, projected; the shorter the rarer",
        stored="4 sum n_i d_i + projections",
        reads="4 d_i",
        ceiling="D",
        unseen="its own numbers, as they started",
    )
    config: MixedDimConfig

    def start(self, std: float, generator: torch.Generator | None) -> None:
        dim = self.embedding_dim
        for b, (_, size, width) in enumerate(self.config.blocks()):
            self.register_parameter(f"rows_{b}", normal((size, width), std, generator=generator))
            if width < dim:
                self.register_parameter(f"projection_{b}", nn.Parameter(orthogonal_rows(width, dim, generator)))

    def networks(self) -> Iterable[nn.Parameter]:
        """The projections."""
        return [parameter for name, parameter in self.named_parameters() if name.startswith("projection_")]

    @staticmethod
    def compose(config: MixedDimConfig, tensors: Mapping[str, Tensor], ids: Tensor, rows: Rows) -> Tensor:
        """e = E_b[x - t_b] P_b."""
        ids_B = ids.reshape(-1)
        block_B = block_of(ids_B, config.block_sizes)
        order_B = block_B.argsort(stable=True)
        counts = torch.bincount(block_B, minlength=len(config.block_sizes)).tolist()
        parts = []
        ids_by_block = torch.split(ids_B[order_B], counts)
        for b, (ids_b, (first, _, width)) in enumerate(zip(ids_by_block, config.blocks(), strict=True)):
            rows_b = rows(tensors[f"rows_{b}"], ids_b - first)
            parts.append(rows_b @ tensors[f"projection_{b}"] if width < config.embedding_dim else rows_b)
        sorted_BD = torch.cat(parts)
        vectors_BD = torch.zeros_like(sorted_BD).index_copy(0, order_B, sorted_BD)
        return vectors_BD.reshape(*ids.shape, config.embedding_dim)

    @staticmethod
    def lookup_cpu(config: MixedDimConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = E_b[x - t_b] P_b: ids are sorted by block once, then each block is one loop."""
        begins = np.empty(len(config.block_sizes) + 1, np.int64)
        places_B = np.empty(len(ids_B), np.int64)
        cpu_project.sort_by_block(config.ends_K, ids_B, begins, places_B)
        bounds = begins.tolist()
        for b, (first, _, width) in enumerate(config.blocks()):
            if bounds[b] == bounds[b + 1]:  # nothing to do but to have the loop ready: another lookup may need it
                loop = cpu_project.project_block if width < config.embedding_dim else cpu_project.gather_block
                loop.prepare(tensors[f"rows_{b}"])
                continue
            where = (first, ids_B, places_B, bounds[b], bounds[b + 1], out_BD)
            if width < config.embedding_dim:
                cpu_project.project_block(tensors[f"rows_{b}"], tensors[f"projection_{b}"], *where)
            else:
                cpu_project.gather_block(tensors[f"rows_{b}"], *where)

    @classmethod
    def lookup_gpu(cls, config: MixedDimConfig, tensors: Tensors, ids_B: Any, out_BD: Any) -> None:
        """e = E_b[x - t_b] P_b: one launch for all blocks."""
        blocks = range(len(config.block_sizes))
        rows = [tensors[f"rows_{b}"] for b in blocks]
        projections = [tensors.get(f"projection_{b}") for b in blocks]
        cuda_project.project_blocks(rows, projections, config.block_sizes, ids_B, out_BD)

    @classmethod
    def layout(cls, config: MixedDimConfig) -> dict[str, TensorSpec]:
        """The blocks' rows and projections."""
        slots = {}
        for b, (_, size, width) in enumerate(config.blocks()):
            slots[f"rows_{b}"] = TensorSpec((size, width), rows=True)
            if width < config.embedding_dim:
                slots[f"projection_{b}"] = TensorSpec((width, config.embedding_dim))
        return slots

    @classmethod
    def from_budget(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_bytes: int,
        *,
        frequencies: Any = None,
        num_blocks: int = 8,
        width_multiple: int = 1,
        **options: Any,
    ) -> Self:
        """Blocks of equal popularity, widths by the power law that fills the budget, projections counted.

        frequencies: float [N], how often each id occurs. None: the k-th id is taken to occur 1 / k times as often as
        the first (Zipf's law). width_multiple: widths above 1 are a multiple of it (2 for int4, which needs even ones).
        """
        SchemeConfig(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if "block_sizes" in options or "block_widths" in options:
            raise ConfigError("give either a budget or block_sizes and block_widths, not both")
        blocks = equal_blocks(num_embeddings, num_blocks, frequencies)
        widths = power_law(blocks, embedding_dim, num_bytes // 4, projected=True, multiple=width_multiple)
        if widths is None:
            raise _too_small(blocks, embedding_dim, num_bytes)
        return cls(num_embeddings, embedding_dim, block_sizes=blocks.sizes, block_widths=widths, **options)

    @classmethod
    def fit(
        cls,
        vectors_ND: Tensor,
        num_bytes: int,
        *,
        weights_N: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        num_blocks: int = 8,
        **options: Any,
    ) -> Self:
        """A truncated SVD of every block, of the ranks that leave the least weighted error in the budget.

        The ranks come from the blocks' singular values, not from the power law: the same bytes, spent where they are
        known to help. Without weights the blocks have equal sizes. An id of weight 0 counts as a billionth of an
        average one.
        """
        from embstore.fitting import weighted_svd
        from embstore.fitting.checks import checked

        num_vectors, dim = vectors_ND.shape
        mass_N = checked(vectors_ND, weights_N) + 1e-9
        blocks = equal_blocks(num_vectors, num_blocks, mass_N)
        moments_KDD = second_moments(vectors_ND, mass_N, blocks.sizes)
        gain_KD = torch.linalg.eigvalsh(moments_KDD).flip(1).clamp_min(0).cumsum(1).cpu().numpy()
        sizes_K1, widths_1D = np.array(blocks.sizes)[:, None], np.arange(1, dim + 1)
        cost_KD = np.minimum(widths_1D * (sizes_K1 + dim), sizes_K1 * dim)
        if 4 * int(cost_KD[:, 0].sum()) > num_bytes:
            raise _too_small(blocks, dim, num_bytes)
        widths = best_widths(gain_KD, cost_KD, num_bytes // 4)
        widths = tuple(
            dim if width * (size + dim) >= size * dim else width
            for size, width in zip(blocks.sizes, widths, strict=True)
        )
        module = cls(num_vectors, dim, block_sizes=blocks.sizes, block_widths=widths, generator=generator, **options)
        state = {}
        for b, (first, size, width) in enumerate(module.config.blocks()):
            if progress is not None:
                progress("blocks", b, len(widths))
            part = slice(first, first + size)
            if width == dim:
                state[f"rows_{b}"] = vectors_ND[part].float()
                continue
            rows, projection, _ = weighted_svd(vectors_ND[part], width, weights_N=mass_N[part], offset=False)
            state[f"rows_{b}"], state[f"projection_{b}"] = rows.float(), projection.float()
        module.load_state_dict(state)
        return module


def _too_small(blocks: Blocks, dim: int, num_bytes: int) -> ConfigError:
    least = 4 * sum(min(size + dim, size * dim) for size in blocks.sizes)
    return ConfigError(
        f"mixed_dim cannot be stored in {num_bytes:,} bytes here: the least is {least:,}, because each id keeps a "
        f"number of its own and each of {len(blocks.sizes)} blocks a projection; its ratio stays below {dim}"
    )
