"""A scheme's formula in plain torch behind the contract of lookups: short enough to be obviously right."""

# Shapes: B ids, D embedding_dim.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def write(out_BD: Tensor, ids_B: Tensor, compose: Callable[[Tensor], Tensor]) -> None:
    """out = compose(ids) where ids are not negative; the other rows stay as they are."""
    found_B = ids_B >= 0
    if bool(found_B.all()):
        out_BD.copy_(compose(ids_B))
    else:
        out_BD[found_B] = compose(ids_B[found_B])


def quotient(ids_B: Tensor, divisor: int) -> Tensor:
    """Integer division in int64: a float division is wrong past 2**24."""
    return torch.div(ids_B, divisor, rounding_mode="floor")
