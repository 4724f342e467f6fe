"""The operations schemes are built from, and which code runs them.

Every operation takes arrays of one kind and writes into `out`:

* numpy arrays -> `numba_cpu`, fused loops that release the GIL;
* torch tensors -> `reference`, plain torch on the tensors' device, the definition of correct.

The choice follows the type of `out` and nothing else: no environment variable, no fallback at run time.
Contract of all: `ids` are int64, checked by the caller to lie in `[0, num_embeddings)` or to be negative;
a negative id leaves its row of `out` untouched, so a missing id can never receive another id's vector.
"""

# Shapes: B ids, D embedding_dim, R rows of a table, Q/R rows of a quotient/remainder table, M shared rows.

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

OPS = (
    "gather",
    "gather_mod",
    "gather_hash",
    "gather_pair_mul",
    "gather_pair_add",
    "gather_pair_concat",
    "gather_scaled",
    "gather_scaled_biased",
)

Array = Any
"""numpy.ndarray or torch.Tensor, the same kind for every argument of one call."""


@cache
def _numba() -> ModuleType:
    return import_module("embstore.kernels.numba_cpu")


@cache
def _reference() -> ModuleType:
    return import_module("embstore.kernels.reference")


def backend(out: Array) -> ModuleType:
    """The module that runs operations writing into `out`."""
    return _reference() if isinstance(out, torch.Tensor) else _numba()


def gather(weight_RD: Array, ids_B: Array, out_BD: Array) -> None:
    """out = weight[ids]."""
    backend(out_BD).gather(weight_RD, ids_B, out_BD)


def gather_mod(weight_MD: Array, ids_B: Array, out_BD: Array) -> None:
    """out = weight[ids mod M]."""
    backend(out_BD).gather_mod(weight_MD, ids_B, out_BD)


def gather_hash(weight_MD: Array, ids_B: Array, seed: int, out_BD: Array) -> None:
    """out = weight[bucket(ids, M, seed)]."""
    backend(out_BD).gather_hash(weight_MD, ids_B, seed, out_BD)


def gather_pair_mul(quotient_QD: Array, remainder_RD: Array, ids_B: Array, out_BD: Array) -> None:
    """out = quotient[ids // R] * remainder[ids mod R]."""
    backend(out_BD).gather_pair_mul(quotient_QD, remainder_RD, ids_B, out_BD)


def gather_pair_add(quotient_QD: Array, remainder_RD: Array, ids_B: Array, out_BD: Array) -> None:
    """out = quotient[ids // R] + remainder[ids mod R]."""
    backend(out_BD).gather_pair_add(quotient_QD, remainder_RD, ids_B, out_BD)


def gather_pair_concat(quotient_QE: Array, remainder_RF: Array, ids_B: Array, out_BD: Array) -> None:
    """out = [quotient[ids // R], remainder[ids mod R]], D = E + F."""
    backend(out_BD).gather_pair_concat(quotient_QE, remainder_RF, ids_B, out_BD)


def gather_scaled(shared_MD: Array, scale_N1: Array, ids_B: Array, out_BD: Array) -> None:
    """out = shared[ids mod M] * scale[ids, 0]."""
    backend(out_BD).gather_scaled(shared_MD, scale_N1, ids_B, out_BD)


def gather_scaled_biased(shared_MD: Array, scale_bias_N2: Array, ids_B: Array, out_BD: Array) -> None:
    """out = shared[ids mod M] * scale_bias[ids, 0] + scale_bias[ids, 1]."""
    backend(out_BD).gather_scaled_biased(shared_MD, scale_bias_N2, ids_B, out_BD)
