"""Rounded forward, as if nothing had been rounded backward: the straight-through estimator.

Bengio, Leonard and Courville, arXiv 1308.3432. Written as a function and not as `x + (rounded - x).detach()`, which
gives `rounded` only up to rounding: what is trained on would not be what is served, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient passed on to `exact` as it is (and to `rounded` too, where that has one)."""
    vectors: Tensor = _StraightThrough.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return vectors
