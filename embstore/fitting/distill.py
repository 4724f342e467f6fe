"""Distillation: gradient descent on a module until its vectors are close to given ones."""

# Shapes: N vectors, B ids in a batch, D dimensions.

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from embstore.errors import ConfigError, DataError
from embstore.fitting.checks import Progress, checked, chunks, relative, working

NUM_CHECKS = 4
LEAST_SIZE = 0.1
LAYER = 256  # numbers per id to reckon with inside a network


def distill(
    module: nn.Module,
    vectors_ND: Tensor,
    *,
    weights_N: Tensor | None = None,
    steps: int = 2000,
    batch_size: int = 4096,
    learning_rate: float = 0.05,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> float:
    """Train `module(ids)` towards the vectors of ids 0 .. N - 1; returns the weighted relative error it ends with.

    Adam on all parameters that want gradients, on the weighted squared error. Half of a batch is drawn by weight, half
    evenly among ids whose weight is not 0, each counted by its weight over its chance. learning_rate: as a share of
    each parameter's root mean square (of LEAST_SIZE where that is less), so that it means the same for tables and
    networks of any scale; it falls to 0 along a cosine. The error over all vectors is taken at the start and
    NUM_CHECKS times on the way, the last at the end: the module keeps the best of these states, so it never ends
    worse than it began.
    """
    mass_N = checked(vectors_ND, weights_N)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0, got {value}")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the module has no parameters to train")
    device = parameters[0].device
    sampler = Sampler(mass_N, generator)
    unit = _size(vectors_ND) or 1.0
    groups = [{"params": [p], "lr": learning_rate * max(_size(p.detach()), LEAST_SIZE)} for p in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    checks = {round(steps * (i + 1) / NUM_CHECKS) for i in range(NUM_CHECKS)}
    with _as_for_training(module):
        best, kept = _error(module, vectors_ND, mass_N, device), _state(module)
        for step in range(1, steps + 1):
            ids_B, importance_B = sampler(batch_size)
            target_BD = working(vectors_ND[ids_B.to(vectors_ND.device)]).to(device)
            squares_B = ((module(ids_B.to(device)) - target_BD) / unit).square().mean(dim=1)
            loss = (squares_B * importance_B.to(squares_B)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress("distilling", step, steps)
            if step in checks:
                error = _error(module, vectors_ND, mass_N, device)
                if error < best:
                    best, kept = error, _state(module)
        for now, then in zip(_tensors(module), kept, strict=True):
            now.copy_(then)
    return best


class Sampler:
    """Draws ids for the weighted error: half by weight, half evenly among those that weigh anything.

    Drawn by weight alone, rare ids are hardly ever seen; drawn evenly, the few that matter most are. Each id comes with
    its importance, weight over chance: at most 2, and 1 on average, so the loss is the weighted error's estimate.
    """

    def __init__(self, mass_N: Tensor, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.device = torch.device("cpu") if generator is None else generator.device
        mass_N = mass_N.to(self.device)
        self.ids_n = mass_N.nonzero().squeeze(1)
        self.mass_n = mass_N[self.ids_n] / mass_N.sum()
        self.cumulated_n = self.mass_n.cumsum(dim=0)

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Ids [B] and their importance [B]."""
        by_weight = torch.rand(batch_size // 2, dtype=torch.float64, generator=self.generator, device=self.device)
        drawn = torch.searchsorted(self.cumulated_n, by_weight * self.cumulated_n[-1], right=True)
        evenly = torch.randint(
            len(self.ids_n), (batch_size - batch_size // 2,), generator=self.generator, device=self.device
        )
        at_B = torch.cat([drawn.clamp_max(len(self.ids_n) - 1), evenly])
        chance_B = (self.mass_n[at_B] + 1 / len(self.ids_n)) / 2
        return self.ids_n[at_B], self.mass_n[at_B] / chance_B


@contextmanager
def _as_for_training(module: nn.Module) -> Iterator[None]:
    """The module in training mode with dense gradients (Adam takes no others), and then as it was."""
    sparse = [part for part in module.modules() if getattr(part, "sparse", None) is True]
    training = module.training
    for part in sparse:
        part.sparse = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in sparse:
            part.sparse = True  # type: ignore[assignment]
        module.train(training)
        module.zero_grad(set_to_none=True)


@torch.no_grad()
def _error(module: nn.Module, vectors_ND: Tensor, mass_N: Tensor, device: torch.device) -> float:
    """The weighted relative error of the vectors as they would be served now; infinite when they hold NaN."""
    module.eval()
    error = energy = 0.0
    for at in chunks(len(vectors_ND), max(vectors_ND.shape[1], LAYER)):
        x_nD = vectors_ND[at].double()
        ids_n = torch.arange(at.start, at.stop, device=device)
        found_nD = module(ids_n).to(x_nD)
        if found_nD.shape != x_nD.shape:
            raise DataError(f"the module gives vectors {list(found_nD.shape)}, these are {list(x_nD.shape)}")
        squares_n = (x_nD - found_nD).square().sum(dim=1)
        error += float(mass_N[at] @ squares_n)
        energy += float(mass_N[at] @ x_nD.square().sum(dim=1))
    module.train()
    return relative(error, energy) if math.isfinite(error) else math.inf


def _tensors(module: nn.Module) -> list[Tensor]:
    """Everything that training may change."""
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


def _state(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(module)]


def _size(vectors: Tensor) -> float:
    """The root mean square of the elements."""
    flat = vectors.reshape(-1)
    total = sum(float(flat[at].double().square().sum()) for at in chunks(len(flat), 1))
    return math.sqrt(total / max(1, len(flat)))
