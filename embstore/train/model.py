"""A factorisation: the score of an item for a user is the dot product of their vectors, each from a scheme."""

# Shapes: B examples in the batch, M distinct items among them, N items, D embedding_dim.

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme
from embstore.train.config import ModelConfig, TableConfig, TrainConfig
from embstore.train.toml_fields import unknown_key

_NOT_OPTIONS = {"self", "num_embeddings", "embedding_dim", "sparse", "init_std", "generator"}


class Factorisation(nn.Module):
    """Two tables of one width."""

    def __init__(self, user: Scheme, item: Scheme) -> None:
        super().__init__()
        self.user, self.item = user, item

    def forward(self, users_B: Tensor, items_M: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of users and of items."""
        return self.user(users_B), self.item(items_M)

    def tables(self) -> dict[str, Scheme]:
        """The tables under the names they are published by."""
        return {"user": self.user, "item": self.item}


@torch.no_grad()
def all_vectors(table: Scheme, device: torch.device) -> Tensor:
    """Every vector of a table, [N, D]."""
    starts = range(0, table.num_embeddings, 1 << 16)
    ends = [min(start + (1 << 16), table.num_embeddings) for start in starts]
    return torch.cat([table(torch.arange(*span, device=device)) for span in zip(starts, ends, strict=True)])


def make_model(config: TrainConfig, num_users: int, num_items: int) -> Factorisation:
    """The model of a config, at its start."""
    return Factorisation(
        make_table("user", config.tables.user, num_users, config.model, 2 * config.seed),
        make_table("item", config.tables.item, num_items, config.model, 2 * config.seed + 1),
    )


def make_table(name: str, config: TableConfig, num_embeddings: int, model: ModelConfig, seed: int) -> Scheme:
    """The module of table `name`, of the size that its config asks for; the same seed gives the same start.

    Gradients are sparse: a step touches the rows of its batch and no others.
    """
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {"sparse": True, "init_std": model.init_std, "generator": generator}
    try:
        scheme = scheme_class(config.scheme)
        sizes = _check_options(scheme, config)
        num_bytes = config.num_bytes(num_embeddings, model.embedding_dim)
        if num_bytes is not None:
            return scheme.from_budget(num_embeddings, model.embedding_dim, num_bytes, **config.options, **common)
        if sizes:
            raise ConfigError(f"{config.scheme} needs a size: ratio, budget or {sizes[0]}")
        build: Any = scheme  # the base class does not say which options its subclasses take
        table: Scheme = build(num_embeddings, model.embedding_dim, **config.options, **common)
        return table
    except ConfigError as error:
        raise ConfigError(f"tables.{name}: {error}") from error


def _check_options(scheme: type[Scheme], config: TableConfig) -> list[str]:
    """The required options that are missing; ConfigError for one that the scheme does not have."""
    options = {n: p for n, p in signature(scheme.__init__).parameters.items() if n not in _NOT_OPTIONS}
    for option in config.options:
        if option not in options:
            raise ConfigError(unknown_key("", option, ["scheme", "ratio", "budget", *options]))
    return [n for n, p in options.items() if p.default is Parameter.empty and n not in config.options]
