"""The form of `masked` that learns its widths: full rows, and a network that masks their ends by how often ids occur.

For a block of ids with frequency feature s (log of how often they occur, over all blocks of mean 0 and deviation 1):

    w = sigmoid(s);  o = w hot(s) + (1 - w) cold(s) + prior      logits of the widths 1 .. D
    t = one-hot of the chosen width, with the gradient of softmax(o / T)      (straight-through)
    m = sum of t from the right                                  ones up to the width, zeros after it
    e = m * W[x]

`hot` and `cold` are twins so that the many updates of frequent ids do not decide the widths of rare ones. `prior` peaks
at the widths of a power law that fills the budget, and the networks start at 0: so do the widths.

What is chosen is not the largest logit of each block but the best of all choices that are allowed: widths that fall
with frequency and fit the budget, of those the largest sum of logits that a price per stored number finds. The price is
0 as long as the blocks' own choices fit. So `export()` keeps the budget at any time, and `forward` uses the very widths
that it would publish. What the logits ask for beyond the budget is `penalty()`: add it to the loss, or they drift there
and the price alone decides.
"""

# Shapes: K blocks of ids, D embedding_dim and as many widths.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from embstore.errors import ConfigError, DataError
from embstore.schemes.base import SchemeConfig
from embstore.schemes.parts.masked_table import MaskedConfig, MaskedTable, cut, merged
from embstore.schemes.parts.widths import block_of

PRIOR_SPREAD = 0.25
"""How far the starting widths spread, on the scale of their logarithm: a width may first move by about a quarter."""
_BISECTIONS = 40


class MaskedLearner(MaskedTable):
    """What `Masked.from_budget` gives: `export()` cuts the rows to the widths learned so far, never above the budget.

    config: blocks and the widths to start from; num_floats: how many numbers of rows the budget holds; rates: how often
    an id of each block occurs, on any scale. hidden: units of the networks' hidden layer; temperature: T, the lower the
    closer the gradient is to the chosen width (it does not change what is chosen).
    """

    def __init__(
        self,
        config: MaskedConfig,
        num_floats: int,
        rates: Sequence[float],
        *,
        hidden: int = 16,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **common: Any,
    ) -> None:
        if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
            raise ConfigError(f"hidden must be a whole number of at least 1, got {hidden!r}")
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {temperature!r}")
        super().__init__(**asdict(config), generator=generator, **common)
        dim, self.num_floats, self.temperature = config.embedding_dim, num_floats, temperature
        self.hot, self.cold = (_network(hidden, dim, generator) for _ in range(2))
        log_rate_K = np.log(np.maximum(rates, 1e-12 * max(rates)))
        feature_K = (log_rate_K - log_rate_K.mean()) / (float(log_rate_K.std()) or 1.0)
        self.register_buffer("feature", torch.tensor(feature_K, dtype=torch.float32))
        log_width_D = torch.arange(1, dim + 1).log()
        far_KD = (log_width_D - torch.tensor(config.block_widths).log()[:, None]) / PRIOR_SPREAD
        self.register_buffer("prior", -far_KD.square() / 2)
        self._order_K = np.argsort(-np.array(rates), kind="stable")

    def start(self, std: float, generator: torch.Generator | None) -> None:
        config, dim = self._start, self.embedding_dim
        self.weight = nn.Parameter(torch.empty(config.num_embeddings, dim))
        with torch.no_grad():
            parts = torch.split(self.weight, list(config.block_sizes))
            for rows, width in zip(parts, config.block_widths, strict=True):
                rows.normal_(0.0, std * (dim / width) ** 0.5, generator=generator)
        if config.rotation:
            self.rotation = nn.Parameter(torch.eye(dim))

    @property
    def num_embeddings(self) -> int:
        """Ids are `0 .. num_embeddings - 1`."""
        return self._start.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Floats in one vector."""
        return self._start.embedding_dim

    @property
    def config(self) -> MaskedConfig:
        """What would be published now."""
        if self.weight.is_meta:  # sizes are asked for, nothing was drawn
            return self._start
        start, (widths, _) = self._start, self._decide(self.logits())
        return merged(start.num_embeddings, start.embedding_dim, start.block_sizes, widths, start.rotation)

    @config.setter
    def config(self, config: SchemeConfig) -> None:
        assert isinstance(config, MaskedConfig)
        self._start = config

    def networks(self) -> Iterable[nn.Parameter]:
        """The mask's twin networks, the rotation."""
        return (*self.hot.parameters(), *self.cold.parameters(), *((self.rotation,) if self._start.rotation else ()))

    def logits(self) -> Tensor:
        """How much each block asks for each width: [K, D]."""
        feature_K1 = self.get_buffer("feature")[:, None]
        share_K1 = feature_K1.sigmoid()
        learned_KD: Tensor = share_K1 * self.hot(feature_K1) + (1 - share_K1) * self.cold(feature_K1)
        return learned_KD + self.get_buffer("prior")

    def masks(self) -> Tensor:
        """Ones up to each block's width, zeros after it: [K, D], with the gradient of the softmax."""
        logits_KD = self.logits()
        widths, price = self._decide(logits_KD)
        sizes_K1 = np.array(self._start.block_sizes)[:, None]
        prices_KD = torch.from_numpy(price * sizes_K1 * np.arange(1, self.embedding_dim + 1)).to(logits_KD)
        soft_KD = ((logits_KD - prices_KD) / self.temperature).softmax(dim=1)
        chosen_K = torch.tensor(widths, device=logits_KD.device) - 1
        hard_KD = F.one_hot(chosen_K, self.embedding_dim).to(soft_KD.dtype)
        choice_KD = hard_KD + (soft_KD - soft_KD.detach())  # in this order: exactly 0 or 1
        return choice_KD.flip(1).cumsum(1).flip(1)

    def vectors(self, ids: Tensor) -> Tensor:
        """e = m * W[x] (R)."""
        rows = self.rows(self.weight, ids)
        vectors = rows * F.embedding(block_of(ids, self._start.block_sizes), self.masks()) + 0.0  # not -0.0
        return vectors @ self.rotation if self._start.rotation else vectors

    def penalty(self) -> Tensor:
        """How far what the blocks ask for is above the budget, as a share of it, else 0: for the loss, times a weight.

        Asked for are the falling widths with the largest logits; the gradient is that of their expected size, and
        reaches the mask's networks only. The widths in use fit whether this is added or not.
        """
        logits_KD = self.logits()
        width_D = torch.arange(1, self.embedding_dim + 1, device=logits_KD.device, dtype=logits_KD.dtype)
        sizes_K = torch.tensor(self._start.block_sizes, device=logits_KD.device, dtype=logits_KD.dtype)
        expected = ((logits_KD / self.temperature).softmax(dim=1) @ width_D) @ (sizes_K / self.num_floats)
        widths, _ = self._decide(logits_KD, limited=False)
        asked = sum(size * width for size, width in zip(self._start.block_sizes, widths, strict=True))
        return (asked / self.num_floats + (expected - expected.detach()) - 1.0).clamp_min(0.0)

    def export(self) -> tuple[SchemeConfig, dict[str, Tensor]]:
        """The rows cut to the widths of now."""
        config = self.config
        rotation = {"rotation": self.rotation.detach()} if config.rotation else {}
        return config, {"values": cut(self.weight.detach(), config), **rotation}

    def _decide(self, logits_KD: Tensor, *, limited: bool = True) -> tuple[tuple[int, ...], float]:
        """The widths of all blocks, and the price per stored number that made them fit; not limited: as if all did."""
        scores_KD = logits_KD.detach().double().cpu().numpy()
        if not np.isfinite(scores_KD).all():
            raise DataError("the mask's networks are not finite: training diverged; use a lower learning rate")
        sizes_K = np.array(self._start.block_sizes, np.float64)
        num_floats = self.num_floats if limited else math.inf
        ordered, price = allowed_widths(scores_KD[self._order_K], sizes_K[self._order_K], num_floats)
        widths_K = np.empty(len(sizes_K), np.int64)
        widths_K[self._order_K] = ordered
        return tuple(widths_K.tolist()), price


def _network(hidden: int, dim: int, generator: torch.Generator | None) -> nn.Sequential:
    """One of the twins: the hidden layer random, the last one 0, so that the widths start at the prior's."""
    inner, last = nn.Linear(1, hidden), nn.Linear(hidden, dim)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.uniform_(-1.0, 1.0, generator=generator)
        for parameter in last.parameters():
            parameter.zero_()
    return nn.Sequential(inner, nn.Tanh(), last)


def allowed_widths(
    scores_KD: NDArray[np.float64], sizes_K: NDArray[np.float64], num_floats: float
) -> tuple[list[int], float]:
    """Widths that never rise from one block to the next, of the largest sum of scores less price times numbers stored.

    The price is 0 where that fits in `num_floats`, else the least, found by bisection, at which it does.
    """
    stored_KD = sizes_K[:, None] * np.arange(1, scores_KD.shape[1] + 1)

    def at_price(price: float) -> tuple[list[int], bool]:
        widths = _falling(scores_KD - price * stored_KD)
        return widths, sum(int(n) * w for n, w in zip(sizes_K, widths, strict=True)) <= num_floats

    widths, fits = at_price(0.0)
    if fits:
        return widths, 0.0
    # At this price one number more costs more than all scores could make up for: every width is 1, which fits.
    low, high = 0.0, float((scores_KD.max(1) - scores_KD.min(1)).sum() + 1.0) / float(sizes_K.min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if at_price(middle)[1] else (middle, high)
    return at_price(high)[0], high


def _falling(scores_KD: NDArray[np.float64]) -> list[int]:
    """The widths, none above the one before, with the largest sum of scores."""
    columns = np.arange(scores_KD.shape[1])
    total_D, best_KD = scores_KD[-1], []
    for scores_D in scores_KD[-2::-1]:
        most_D = np.maximum.accumulate(total_D)
        best_KD.append(np.maximum.accumulate(np.where(total_D == most_D, columns, 0)))
        total_D = scores_D + most_D
    chosen = [int(total_D.argmax())]
    for best_D in reversed(best_KD):
        chosen.append(int(best_D[chosen[-1]]))
    return [column + 1 for column in chosen]
