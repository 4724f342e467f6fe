"""Row-wise Adagrad for tables, Adam for the networks of schemes that have some.

Adagrad by row: one accumulated second moment per row, and only the rows of the batch are touched. A table under dense
Adam pays for all its rows in every step and stores two more floats per weight; here a step costs what the batch costs,
and the state is one float per row. (The optimiser of most embedding-table trainers.) A row of a 1-d parameter, an array
that ids share, is one number: it has a moment of its own.

Layers and projections, which every example moves, are what Adam is for: `Scheme.networks()` says which they are.
"""

# Shapes: R rows of a parameter, T rows touched, D columns.

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from embstore.schemes.base import Scheme


class TableOptimizer:
    """One step for all parameters of a model: Adam for its tables' networks, row-wise Adagrad for everything else."""

    def __init__(
        self, model: nn.Module, tables: Iterable[Scheme], learning_rate: float, network_learning_rate: float
    ) -> None:
        networks = list({id(p): p for table in tables for p in table.networks()}.values())
        in_networks = {id(p) for p in networks}
        others = [p for p in model.parameters() if id(p) not in in_networks]
        self.parts: list[torch.optim.Optimizer] = []
        if others:
            self.parts.append(RowwiseAdagrad(others, learning_rate))
        if networks:
            self.parts.append(torch.optim.Adam(networks, network_learning_rate))

    def step(self) -> None:
        """One update from the gradients that `backward` left."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()


class RowwiseAdagrad(torch.optim.Optimizer):
    """p[r] -= lr * g[r] / sqrt(sum of mean(g[r] ** 2) over steps), for sparse and for dense gradients alike."""

    def __init__(self, params: Iterable[nn.Parameter], learning_rate: float, eps: float = 1e-12) -> None:
        super().__init__(params, {"lr": learning_rate, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  (the base class has it)
        """One update from the gradients that `backward` left."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["eps"])

    def _update(self, parameter: Tensor, lr: float, eps: float) -> None:
        state = self.state[parameter]
        if not state:
            state["moment_R"] = torch.zeros(len(parameter), device=parameter.device)
        moment_R, gradient = state["moment_R"], parameter.grad
        assert gradient is not None
        if not gradient.is_sparse:
            moment_R += gradient.flatten(1).square().mean(dim=1) if gradient.ndim > 1 else gradient.square()
            scale_R = (moment_R + eps).rsqrt().view(-1, *[1] * (gradient.ndim - 1))
            parameter.sub_(gradient * scale_R, alpha=lr)
            return
        gradient = gradient.coalesce()
        rows_T, gradient_TD = gradient.indices()[0], gradient.values()
        moment_T = moment_R[rows_T] + gradient_TD.square().mean(dim=1)
        moment_R[rows_T] = moment_T
        parameter.index_add_(0, rows_T, gradient_TD * (moment_T + eps).rsqrt()[:, None], alpha=-lr)
