"""A factorisation: the score of an item for a user is the dot product of their vectors, each from a scheme."""

# Shapes: B examples in the batch, M distinct items among them, N items, D embedding_dim.

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from embstore.common.config import unknown_key
from embstore.errors import ConfigError
from embstore.schemes import scheme_class
from embstore.schemes.base import Scheme
from embstore.schemes.options import options_of
from embstore.train.config import ModelConfig, TableConfig, TrainConfig


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


def make_model(
    config: TrainConfig, num_users: int, num_items: int, knowledge: Mapping[str, Mapping[str, Any]] | None = None
) -> Factorisation:
    """The model of a config, at its start. knowledge: for each table what is known of its ids (`prepare.knowledge`)."""
    user, item, known = config.tables.user, config.tables.item, knowledge or {}
    return Factorisation(
        make_table("user", user, num_users, config.model, 2 * config.seed, known.get("user")),
        make_table("item", item, num_items, config.model, 2 * config.seed + 1, known.get("item")),
    )


def make_table(
    name: str,
    config: TableConfig,
    num_embeddings: int,
    model: ModelConfig,
    seed: int,
    knowledge: Mapping[str, Any] | None = None,
) -> Scheme:
    """The module of table `name`, of the size that its config asks for; the same seed gives the same start.

    knowledge: what is known of the ids beforehand; the scheme is given what its `uses` names, and without it starts
    as its docstring says. Gradients are sparse: a step touches the rows of its batch and no others.
    """
    generator = torch.Generator().manual_seed(seed)
    table: Scheme
    common: dict[str, Any] = {"sparse": True, "init_std": model.init_std, "generator": generator}
    try:
        scheme = scheme_class(config.scheme)
        num_bytes = config.num_bytes(num_embeddings, model.embedding_dim)
        missing = _check_options(scheme, config, sized=num_bytes is None)
        known = {key: value for key, value in (knowledge or {}).items() if key in scheme.uses}
        given = {**config.options, **common}
        if num_bytes is not None:
            table = scheme.from_budget(num_embeddings, model.embedding_dim, num_bytes, **given, **known)
            table.num_bytes(config.dtype)  # refuses a dtype that this table cannot be stored as
            return table
        if missing:
            raise ConfigError(f"{config.scheme} needs a size: ratio, budget or {missing[0]}")
        taken = {key: value for key, value in known.items() if key in signature(scheme).parameters}
        table = scheme(num_embeddings, model.embedding_dim, **given, **taken)
        table.num_bytes(config.dtype)
        return table
    except ConfigError as error:
        raise ConfigError(f"tables.{name}: {error}") from error


def _check_options(scheme: type[Scheme], config: TableConfig, *, sized: bool) -> list[str]:
    """The constructor's required options that are missing; ConfigError for an option that the scheme does not have.

    sized: the options themselves say the size, so those that divide up a budget are none.
    """
    own, of_budget = options_of(scheme, scheme), options_of(scheme, scheme.from_budget)
    for option in config.options:
        if option not in own and option not in of_budget:
            raise ConfigError(unknown_key(option, ["scheme", "ratio", "budget", *(own | of_budget)]))
        if sized and option not in own:
            raise ConfigError(f"{option} divides up a budget: give ratio or budget with it")
    return [n for n, p in own.items() if p.default is Parameter.empty and n not in config.options]
