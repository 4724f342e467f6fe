"""Masked widths (AMTL: Yan et al., CIKM 2021, arXiv 2108.11513): `e = the first k_x numbers of a vector, then zeros`.

How many, k_x, depends on how often x occurs, and is learned: in training every id has a full row and a network masks
its end (`masked_learner`). What is published is what the masks leave: rows of different widths, one after the other.
Ids are numbered by falling frequency and k_x is the same for a block of them, so a row's place is computed.

Stored: `values` float32 [sum of n_b k_b], 4 k_x bytes per id; sizes and widths of the blocks stand in the config.
`rotation`: one matrix R float32 [D, D] more, e = (row, zeros) R. Each id keeps a number at least: the ratio cannot pass
D. `values` is one flat array, not rows of one width: it is stored as float32 only.
Lookup: 4 k_x bytes read, no arithmetic; with rotation 2 k_x D operations.

Starts with vectors of equal expected length in all blocks: narrow rows have larger numbers. Ids that were never seen in
training are the last ones, with the narrowest rows. What follows sees zeros in the last columns of rare ids' vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes.base import Progress, SchemeConfig
from embstore.schemes.parts.masked_learner import MaskedLearner
from embstore.schemes.parts.masked_table import MaskedConfig, MaskedTable, cut, merged
from embstore.schemes.parts.widths import best_widths, equal_blocks, power_law, second_moments


class Masked(MaskedTable):
    """The form that is served: widths are fixed, rows can be trained. `from_budget` gives one that learns widths."""

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, dim = self.config, self.embedding_dim
        parts = [
            torch.empty(size * width).normal_(0.0, std * (dim / width) ** 0.5, generator=generator)
            for size, width in zip(config.block_sizes, config.block_widths, strict=True)
        ]
        self.values = nn.Parameter(torch.cat(parts))
        if config.rotation:
            self.rotation = nn.Parameter(torch.eye(dim))

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
        num_blocks: int = 16,
        rotation: bool = False,
        **options: Any,
    ) -> MaskedTable:
        """A module that learns its widths within the budget; at its start they follow a power law that fills it.

        frequencies: float [N], how often each id occurs. None: the k-th id is taken to occur 1 / k times as often as
        the first (Zipf's law). num_blocks: blocks of equal popularity, each of one width. The rest as `MaskedLearner`.
        """
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
        return MaskedLearner(config, num_floats, blocks.rates, **options)

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


def _floats(num_embeddings: int, dim: int, num_bytes: int, rotation: bool) -> int:
    """How many numbers of rows a budget holds; ConfigError when there is not one for each id."""
    fixed = dim * dim if rotation else 0
    if num_bytes < 4 * (num_embeddings + fixed):
        raise ConfigError(
            f"masked cannot be stored in {num_bytes:,} bytes here: the least is {4 * (num_embeddings + fixed):,}, "
            f"because each id keeps a number of its own; its ratio stays below {dim}"
        )
    return num_bytes // 4 - fixed
