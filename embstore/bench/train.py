"""Training speed of every scheme beside plain `nn.Embedding`: same data, model, optimiser and batches, one run.

Each contender trains one epoch (or so many steps), cut into rounds that take turns, so that a machine whose speed
drifts slows all of them alike. `nn.Embedding` has sparse gradients, as the schemes have here: dense ones would lose to
all.
"""

# Shapes: B examples in a batch, N items.

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError
from embstore.schemes import SCHEMES
from embstore.schemes.base import Scheme, target_std
from embstore.train.config import ModelConfig, TableConfig, TrainConfig, TrainingConfig
from embstore.train.loss import batch_loss
from embstore.train.model import Factorisation, make_table
from embstore.train.optimizer import TableOptimizer

PLAIN = "nn.Embedding"
Batches = Sequence[tuple[Tensor, Tensor]]
"""Rows of users and of items, int64 [B] each."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One contender's speed: over all its rounds, as a share of nn.Embedding's, and that share's range by round."""

    name: str
    examples_per_s: float
    ratio: float
    least: float
    most: float
    num_bytes: int


class Contender:
    """A model with its optimiser and the seconds of its rounds."""

    def __init__(self, model: Factorisation, training: TrainingConfig, device: torch.device) -> None:
        self.model, self.l2, self.device = model.to(device), training.l2, device
        tables = [table for table in model.tables().values() if isinstance(table, Scheme)]
        self.optimizer = TableOptimizer(model, tables, training.learning_rate, training.network_learning_rate)
        self.seconds: list[float] = []

    def run(self, batches: Batches, log_q_N: Tensor) -> None:
        """One round."""
        started = time.perf_counter()
        for users_B, items_B in batches:
            loss, _ = batch_loss(self.model, users_B, items_B, log_q_N, self.l2)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def measure(
    config: TrainConfig,
    *,
    ratio: float = 16,
    rounds: int = 8,
    steps: int | None = None,
    device: str = "auto",
    names: Iterable[str] = tuple(SCHEMES),
) -> list[Speed]:
    """Train every contender on the config's events for an epoch (or `steps`); nn.Embedding's speed comes first."""
    from embstore.device import pick_device
    from embstore.train.data import read_dataset
    from embstore.train.loop import Examples

    on = torch.device(pick_device(device))
    dataset = read_dataset(config.data, config.seed)
    examples = Examples(dataset, config.training, config.seed, on)
    made = contenders((len(dataset.users), len(dataset.items)), config, ratio, on, names)
    return race(made, examples.epoch()[:steps], examples.log_q_N, rounds)


def contenders(
    sizes: tuple[int, int], config: TrainConfig, ratio: float, device: torch.device, names: Iterable[str]
) -> dict[str, Contender]:
    """nn.Embedding and these schemes for so many users and items, `full` at its own size, the others at `ratio` or,
    where it is past what they can be, at half of it, a quarter, ..."""
    models = {PLAIN: [_plain(size, config.model) for size in sizes]}
    for name in names:
        models[name] = [_table_of(name, size, ratio, config.model) for size in sizes]
    return {name: Contender(Factorisation(*tables), config.training, device) for name, tables in models.items()}


def race(made: Mapping[str, Contender], batches: Batches, log_q_N: Tensor, rounds: int) -> list[Speed]:
    """Train them all on the same batches in rounds that take turns; the first is what the others are compared with."""
    for contender in made.values():
        contender.run(batches[:3], log_q_N)
        contender.seconds.clear()
    rounds = max(1, min(rounds, len(batches)))
    for round_ in range(rounds):
        turn = list(made.values())
        for contender in turn if round_ % 2 == 0 else reversed(turn):
            contender.run(batches[round_::rounds], log_q_N)
    num_examples = sum(len(users_B) for users_B, _ in batches)
    plain = next(iter(made.values())).seconds
    speeds = []
    for name, contender in made.items():
        by_round = [p / s for p, s in zip(plain, contender.seconds, strict=True)]
        seconds, tensors = sum(contender.seconds), contender.model.state_dict().values()
        speeds.append(
            Speed(
                name=name,
                examples_per_s=num_examples / seconds,
                ratio=sum(plain) / seconds,
                least=min(by_round),
                most=max(by_round),
                num_bytes=sum(tensor.nbytes for tensor in tensors),
            )
        )
    return speeds


def _table_of(scheme: str, num_embeddings: int, ratio: float, model: ModelConfig) -> Scheme:
    table = TableConfig(scheme=scheme, ratio=None if scheme == "full" else ratio)
    try:
        return make_table(scheme, table, num_embeddings, model, seed=0)
    except ConfigError:
        if ratio <= 0.5:
            raise
        return _table_of(scheme, num_embeddings, max(ratio / 2, 0.5), model)


def _plain(num_embeddings: int, model: ModelConfig) -> Scheme:
    plain = nn.Embedding(num_embeddings, model.embedding_dim, sparse=True)
    nn.init.normal_(plain.weight, std=target_std(model.embedding_dim, model.init_std))
    return cast(Scheme, plain)  # called like one; nothing else of a scheme is used here
