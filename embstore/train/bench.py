"""Training speed of every scheme beside plain `nn.Embedding`: same data, model, optimiser and batches, one run.

    python -m embstore.train.bench --config configs/globo.toml [--ratio 16] [--rounds 8] [--steps N] [--json]

Each contender trains one epoch (or N steps), cut into rounds that take turns, so that a machine whose speed drifts
slows all of them alike. `nn.Embedding` has sparse gradients, as the schemes have here: dense ones would lose to all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from embstore.device import pick_device
from embstore.errors import ConfigError, EmbstoreError
from embstore.schemes import SCHEMES
from embstore.schemes.base import Scheme, target_std
from embstore.train.config import ModelConfig, TableConfig, TrainConfig, load_config
from embstore.train.data import Dataset, read_dataset
from embstore.train.loop import Examples
from embstore.train.loss import batch_loss
from embstore.train.model import Factorisation, make_table
from embstore.train.optimizer import TableOptimizer

PLAIN = "nn.Embedding"


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

    def __init__(self, model: Factorisation, config: TrainConfig, device: torch.device) -> None:
        self.model, self.l2, self.device = model.to(device), config.training.l2, device
        tables = [table for table in model.tables().values() if isinstance(table, Scheme)]
        rates = config.training.learning_rate, config.training.network_learning_rate
        self.optimizer = TableOptimizer(model, tables, *rates)
        self.seconds: list[float] = []

    def run(self, batches: Sequence[tuple[Tensor, Tensor]], log_q_N: Tensor) -> None:
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

    def num_bytes(self) -> int:
        """Bytes of both tables."""
        return sum(t.numel() * t.element_size() for t in self.model.state_dict().values())


def contenders(config: TrainConfig, dataset: Dataset, ratio: float, device: torch.device) -> dict[str, Contender]:
    """nn.Embedding and every scheme, `full` at its own size, the others at `ratio` or, where it is past what they can
    be, at half of it, a quarter, ..."""
    sizes, models = (len(dataset.users), len(dataset.items)), {}
    models[PLAIN] = [_plain(size, config.model) for size in sizes]
    for scheme in SCHEMES:
        models[scheme] = [_table_of(scheme, size, ratio, config.model) for size in sizes]
    return {name: Contender(Factorisation(user, item), config, device) for name, (user, item) in models.items()}


def _table_of(scheme: str, num_embeddings: int, ratio: float, model: ModelConfig) -> Scheme:
    table = TableConfig(scheme=scheme, ratio=None if scheme == "full" else ratio)
    try:
        return make_table(scheme, table, num_embeddings, model, seed=0)
    except ConfigError:
        if ratio <= 0.5:
            raise
        return _table_of(scheme, num_embeddings, max(ratio / 2, 0.5), model)


def measure(
    config: TrainConfig, *, ratio: float = 16, rounds: int = 8, steps: int | None = None, device: str = "auto"
) -> list[Speed]:
    """Train every contender for an epoch (or `steps`) in interleaved rounds; nn.Embedding's speed comes first."""
    on = torch.device(pick_device(device))
    dataset = read_dataset(config.data, config.seed)
    examples = Examples(dataset, config.training, config.seed, on)
    batches = examples.epoch()[:steps]
    models = contenders(config, dataset, ratio, on)
    for contender in models.values():
        contender.run(batches[:3], examples.log_q_N)
        contender.seconds.clear()
    rounds = max(1, min(rounds, len(batches)))
    for round_ in range(rounds):
        part = batches[round_::rounds]
        turn = list(models.values())
        for contender in turn if round_ % 2 == 0 else reversed(turn):
            contender.run(part, examples.log_q_N)
    plain = models[PLAIN].seconds
    num_examples = len(batches) * examples.batch_size
    return [
        Speed(
            name=name,
            examples_per_s=num_examples / sum(model.seconds),
            ratio=sum(plain) / sum(model.seconds),
            least=min(p / s for p, s in zip(plain, model.seconds, strict=True)),
            most=max(p / s for p, s in zip(plain, model.seconds, strict=True)),
            num_bytes=model.num_bytes(),
        )
        for name, model in models.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="embstore.train.bench", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--config", required=True, help="training config: its data, model and training sections")
    parser.add_argument("--set", action="append", default=[], help="override, as training.batch_size=4096")
    parser.add_argument("--ratio", type=float, default=16, help="compression of the schemes that compress")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="steps per contender; an epoch unless given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="figures for programs")
    args = parser.parse_args(arguments)
    try:
        config = load_config(args.config, args.set)
        speeds = measure(config, ratio=args.ratio, rounds=args.rounds, steps=args.steps, device=args.device)
    except EmbstoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if args.json:
        sys.stdout.write(json.dumps({"threads": torch.get_num_threads(), "speeds": [asdict(s) for s in speeds]}) + "\n")
    else:
        Console().print(_table(speeds))
    return 0


def _plain(num_embeddings: int, model: ModelConfig) -> Scheme:
    plain = nn.Embedding(num_embeddings, model.embedding_dim, sparse=True)
    nn.init.normal_(plain.weight, std=target_std(model.embedding_dim, model.init_std))
    return cast(Scheme, plain)  # called like one; nothing else of a scheme is used here


def _table(speeds: Sequence[Speed]) -> Table:
    table = Table("both tables", "bytes", "examples/s", f"of {PLAIN}", "by round")
    for s in speeds:
        figures = (f"{s.num_bytes:,}", f"{s.examples_per_s:,.0f}", f"{s.ratio:.2f}", f"{s.least:.2f}-{s.most:.2f}")
        table.add_row(s.name, *figures)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
