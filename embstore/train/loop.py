"""Fitting: epochs of shuffled batches, a validation after each, and the best epoch's weights in the end."""

# Shapes: E training events, B examples in the batch, N items.

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embstore.common.progress import Reporter
from embstore.errors import DataError
from embstore.train.config import TrainingConfig
from embstore.train.data import Dataset
from embstore.train.loss import batch_loss, log_inclusion
from embstore.train.model import Factorisation
from embstore.train.optimizer import TableOptimizer

REPORT_EVERY = 32


@dataclass(frozen=True)
class FitResult:
    """How the fit went: epochs run, the best of them and its validation metric, speed (validation not counted)."""

    num_epochs: int
    best_epoch: int
    best_metric: float
    examples_per_s: float


class Examples:
    """The training pairs on the device, shuffled anew by the seed in every epoch."""

    def __init__(self, dataset: Dataset, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.users_E = torch.from_numpy(dataset.train.users_E).to(device)
        self.items_E = torch.from_numpy(dataset.train.items_E).to(device)
        self.batch_size = min(config.batch_size, len(self.users_E))
        self.log_q_N = log_inclusion(torch.from_numpy(dataset.items.num_events_N), self.batch_size).to(device)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def num_steps(self) -> int:
        """Batches in an epoch; the last few events, too few for a batch, wait for another shuffle."""
        return len(self.users_E) // self.batch_size

    def epoch(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of one epoch: views, nothing is copied."""
        order = torch.randperm(len(self.users_E), generator=self.generator).to(self.users_E.device)
        users_E, items_E = self.users_E[order], self.items_E[order]
        spans = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(self.num_steps)]
        return [(users_E[span], items_E[span]) for span in spans]


def fit(
    model: Factorisation,
    examples: Examples,
    config: TrainingConfig,
    validate: Callable[[], float],
    report: Reporter,
) -> FitResult:
    """Train until `validate` has not grown for `patience` evaluations; the model ends with its best weights.

    It is in training mode in epochs, and in evaluation mode, in which it gives the vectors that would be served, when
    `validate` is called and in the end. DataError when the loss or the metric stops being a finite number.
    """
    optimizer = TableOptimizer(model, model.tables().values(), config.learning_rate, config.network_learning_rate)
    best_metric, best_epoch, best_state, seconds, epoch = -1.0, 0, {}, 0.0, 0
    stopping = 0
    while epoch < config.max_epochs and stopping < config.patience:
        epoch += 1
        model.train()
        started = time.perf_counter()
        loss = run_epoch(model, optimizer, examples, config.l2, epoch, report)
        for table in model.tables().values():
            table.end_of_epoch(epoch)
        seconds += time.perf_counter() - started
        if epoch % config.evaluate_every and epoch < config.max_epochs:
            continue
        model.eval()
        metric = validate()
        if not metric >= 0:
            raise DataError(f"validation gave {metric} in epoch {epoch}: nothing is published")
        improved = metric > best_metric
        stopping = 0 if improved else stopping + 1
        if improved:
            best_metric, best_epoch = metric, epoch
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        best = "  best so far" if improved else ""
        report.note(f"epoch {epoch:3d}  loss {loss:.4f}  validation nDCG {metric:.4f}{best}")
    model.eval().load_state_dict(best_state)
    examples_per_s = epoch * examples.num_steps * examples.batch_size / max(seconds, 1e-9)
    return FitResult(epoch, best_epoch, best_metric, examples_per_s)


def run_epoch(
    model: Factorisation,
    optimizer: TableOptimizer,
    examples: Examples,
    l2: float,
    epoch: int,
    report: Reporter,
) -> float:
    """One pass over the shuffled examples; the mean softmax loss. DataError when it is not finite.

    What is minimised has L2 in it, and the tables' penalties.
    """
    tables = list(model.tables().values())
    total, since = 0.0, torch.zeros((), device=examples.users_E.device)
    what, started = f"epoch {epoch}", time.perf_counter()
    report.advanced(what, 0, examples.num_steps)
    for step, (users_B, items_B) in enumerate(examples.epoch(), start=1):
        loss, softmax = batch_loss(model, users_B, items_B, examples.log_q_N, l2)
        for table in tables:
            penalty = table.penalty()
            if penalty is not None:
                loss = loss + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        since += softmax.detach()
        if step % REPORT_EVERY == 0 or step == examples.num_steps:
            total += float(since)
            since.zero_()
            if not abs(total) < float("inf"):
                raise DataError(
                    f"the loss is not a finite number after step {step} of epoch {epoch}: nothing is published; "
                    "a smaller training.learning_rate may help"
                )
            examples_per_s = step * examples.batch_size / max(time.perf_counter() - started, 1e-9)
            detail = f"loss {total / step:.4f}  {examples_per_s:,.0f} examples/s"
            report.advanced(what, step, examples.num_steps, detail)
    return total / examples.num_steps
