"""How often each id occurs, as schemes that share out by it are given it."""

# Shapes: N ids.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embstore.errors import DataError


def checked_frequencies(frequencies: Any, num_embeddings: int) -> Tensor:
    """The frequencies as float64 [N]; DataError unless there is one for every id, finite and not below 0."""
    found_N = torch.as_tensor(frequencies).detach().to("cpu", torch.float64)
    if found_N.shape != (num_embeddings,):
        raise DataError(f"frequencies have shape {list(found_N.shape)}, there are {num_embeddings:,} ids")
    bad_N = ~(torch.isfinite(found_N) & (found_N >= 0))
    if bad_N.any():
        at = int(bad_N.nonzero()[0])
        raise DataError(f"frequencies are finite and at least 0, got {float(found_N[at])} for id {at:,}")
    if not found_N.any():
        raise DataError(f"all {num_embeddings:,} frequencies are 0: at least one must be above")
    return found_N
