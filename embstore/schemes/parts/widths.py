"""How many columns an id gets by how often it occurs: blocks of equal popularity, and the widths that a budget buys.

Ids are numbered by falling frequency, so a block is a range of ids and costs no map. Shared by the schemes that
store rows narrower than the vectors.
"""

# Shapes: N ids, K blocks, W widths 1 .. D of a block.

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.schemes.base import SchemeConfig

MAX_BLOCKS = 1024
_EULER = 0.5772156649015329
_BISECTIONS = 60


@dataclass(frozen=True)
class Blocks:
    """Ranges of ids, hot ones first: how many ids each has, and how often one of its ids occurs on average."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...]


def check_blocks(config: SchemeConfig) -> None:
    """ConfigError unless `block_sizes` and `block_widths` split the ids; turns the lists of a manifest into tuples."""
    for name in ("block_sizes", "block_widths"):
        values = getattr(config, name)
        whole = isinstance(values, (list, tuple)) and values
        if not whole or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise ConfigError(f"{name} must be whole numbers of at least 1, one a block, got {values!r}")
        object.__setattr__(config, name, tuple(values))
    sizes, widths = config.block_sizes, config.block_widths  # type: ignore[attr-defined]
    if len(sizes) > MAX_BLOCKS:
        raise ConfigError(f"there may be {MAX_BLOCKS} blocks at most, got {len(sizes)}: lookups walk through them")
    if len(sizes) != len(widths):
        raise ConfigError(f"block_sizes and block_widths are one each a block, got {len(sizes)} and {len(widths)}")
    if sum(sizes) != config.num_embeddings:
        raise ConfigError(f"block_sizes must sum to num_embeddings {config.num_embeddings}, got {sum(sizes)}")
    if max(widths) > config.embedding_dim:
        raise ConfigError(
            f"block_widths must be at most embedding_dim, which is {config.embedding_dim}, got {max(widths)}"
        )


def block_of(ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which block each id is in."""
    ends_K = torch.tensor(list(accumulate(sizes))[:-1], dtype=torch.int64, device=ids.device)
    return torch.bucketize(ids, ends_K, right=True)


def equal_blocks(num_embeddings: int, num_blocks: int, frequencies: Any = None) -> Blocks:
    """At most `num_blocks` ranges of ids of about equal popularity: each takes its share of what those before left.

    frequencies: how often each id occurs. None: the k-th id is taken to occur 1 / k times as often as the first.
    """
    if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or num_blocks < 1:
        raise ConfigError(f"num_blocks must be a whole number of at least 1, got {num_blocks!r}")
    num_blocks = min(num_blocks, num_embeddings)
    mass = _harmonic if frequencies is None else _cumulated(frequencies, num_embeddings)
    total, ends = mass(num_embeddings), [0]
    for left in range(num_blocks, 1, -1):
        target = mass(ends[-1]) + (total - mass(ends[-1])) / left
        most = num_embeddings - left + 1  # an id for each block that follows
        ends.append(bisect_left(range(1, most), target, lo=ends[-1], key=mass) + 1)
    ends.append(num_embeddings)
    spans = list(pairwise(ends))
    return Blocks(tuple(b - a for a, b in spans), tuple((mass(b) - mass(a)) / (b - a) for a, b in spans))


def _harmonic(count: int) -> float:
    """1 + 1/2 + ... + 1/count."""
    if count < 32:
        return math.fsum(1 / k for k in range(1, count + 1))
    return math.log(count) + _EULER + 1 / (2 * count) - 1 / (12 * count**2)


def _cumulated(frequencies: Any, num_embeddings: int) -> Callable[[int], float]:
    counts_N = torch.as_tensor(frequencies).double().cpu()
    if counts_N.shape != (num_embeddings,):
        raise DataError(f"frequencies have shape {list(counts_N.shape)}, there are {num_embeddings:,} ids")
    bad_N = ~(torch.isfinite(counts_N) & (counts_N >= 0))
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        raise DataError(f"frequencies are finite and at least 0, got {float(counts_N[row])} for id {row:,}")
    if not bool(counts_N.any()):
        raise DataError(f"all {num_embeddings:,} frequencies are 0: at least one must be above")
    sums_N = (counts_N / counts_N.max()).cumsum(0)
    return lambda count: float(sums_N[count - 1]) if count else 0.0


def power_law(
    blocks: Blocks, dim: int, num_floats: int, *, projected: bool, multiple: int = 1
) -> tuple[int, ...] | None:
    """Widths d_i = lambda p_i ** alpha of at least 1 and at most `dim` that fit in `num_floats`; None where none do.

    p_i is how often an id of block i occurs. The hottest block has the full width and alpha, from 0 to 1, is the
    least that fits, found by bisection; where 1 does not fit either, lambda falls. What then remains goes to the
    block that is furthest below its share, a step at a time, while the widths stay in the order of the p_i.

    projected: a block narrower than `dim` also stores a projection [width, dim]. Where that is no smaller than full
    rows, the block is full. multiple: widths above 1 are a multiple of it, or `dim`.
    """
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise ConfigError(f"width_multiple must be a whole number of at least 1, got {multiple!r}")
    order_K = np.argsort(-np.array(blocks.rates), kind="stable")
    sizes_K = [blocks.sizes[k] for k in order_K]
    top = max(blocks.rates)
    share_K = np.array([max(blocks.rates[k] / top, 1e-300) for k in order_K])

    def allowed(size: int, width: float) -> int:
        """The width that a block gets where its share is `width`."""
        rounded = dim if width >= dim else max(1, min(dim, int(width / multiple + 0.5) * multiple))
        return dim if projected and rounded * (size + dim) >= size * dim else rounded

    def widths(height: float, alpha: float) -> list[int]:
        return [allowed(n, height * s) for n, s in zip(sizes_K, share_K**alpha, strict=True)]

    def fits(found: list[int]) -> bool:
        return sum(map(cost, sizes_K, found)) <= num_floats

    def cost(size: int, width: int) -> int:
        return size * width + (width * dim if projected and width < dim else 0)

    if fits(widths(dim, 0.0)):
        return (dim,) * len(sizes_K)
    if not fits(widths(0.0, 1.0)):
        return None
    if fits(widths(dim, 1.0)):
        height, alpha = float(dim), _least(lambda a: fits(widths(dim, a)), 0.0, 1.0)
    else:
        height, alpha = dim - _least(lambda lost: fits(widths(dim - lost, 1.0)), 0.0, float(dim)), 1.0
    found, wanted_K = widths(height, alpha), dim * share_K**alpha
    left = num_floats - sum(map(cost, sizes_K, found))
    while True:
        steps = []
        for k, (size, width) in enumerate(zip(sizes_K, found, strict=True)):
            wider = allowed(size, (width // multiple + 1) * multiple)
            price = cost(size, wider) - cost(size, width)
            if width < wider <= (found[k - 1] if k else dim) and price <= left:
                steps.append((width / wanted_K[k], k, wider, price))
        if not steps:
            break
        _, k, found[k], price = min(steps)
        left -= price
    placed = dict(zip(order_K.tolist(), found, strict=True))
    return tuple(placed[k] for k in range(len(found)))


def _least(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The least number that fits, from above, where `low` does not and `high` does."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def orthogonal_rows(rank: int, dim: int, generator: torch.Generator | None) -> Tensor:
    """A random projection [rank, dim] that keeps a row's elements, on average, as large as they are."""
    columns_DR = torch.empty(dim, rank).normal_(generator=generator)
    rows_RD: Tensor = torch.linalg.qr(columns_DR).Q.T.contiguous() * math.sqrt(dim / rank)
    return rows_RD


def best_widths(gain_KW: NDArray[np.float64], cost_KW: NDArray[np.int64], num_floats: int) -> tuple[int, ...]:
    """The widths that gain most for `num_floats`: again and again the step that gains most for each number it stores.

    gain_KW, cost_KW: what the first 1, 2, .. D columns of a block gain and take. Steps may be of several columns.
    """
    chosen_K = np.zeros(len(gain_KW), np.int64)
    rows_K = np.arange(len(gain_KW))
    left = num_floats - int(cost_KW[:, 0].sum())
    while True:
        more_KW = gain_KW - gain_KW[rows_K, chosen_K][:, None]
        price_KW = cost_KW - cost_KW[rows_K, chosen_K][:, None]
        possible_KW = (more_KW > 0) & (price_KW <= left)
        if not possible_KW.any():
            return tuple(int(w) + 1 for w in chosen_K)
        ratio_KW = np.where(possible_KW, more_KW / np.maximum(price_KW, 1e-9), -1.0)
        k, width = np.unravel_index(int(ratio_KW.argmax()), ratio_KW.shape)
        left -= int(price_KW[k, width])
        chosen_K[k] = width


def second_moments(vectors_ND: Tensor, mass_N: Tensor, sizes: Sequence[int]) -> Tensor:
    """sum of w x x^T over every block's vectors: [K, D, D] in float64."""
    from embstore.fitting.checks import chunks

    dim = vectors_ND.shape[1]
    moments_KDD = torch.zeros((len(sizes), dim, dim), dtype=torch.float64, device=vectors_ND.device)
    for moment_DD, start, size in zip(moments_KDD, accumulate((0, *sizes[:-1])), sizes, strict=True):
        for at in chunks(size, dim):
            part = slice(start + at.start, start + at.stop)
            part_nD = vectors_ND[part].double()
            moment_DD += (part_nD * mass_N[part, None]).T @ part_nD
    return moments_KDD
