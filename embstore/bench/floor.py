"""The least a lookup can take here: the cache lines it must read, read by a loop that does nothing else.

Which lines those are comes from the scheme's own formula: it is run in torch while a recorder notes every row it reads
of every stored tensor. The floor then gathers the same lines, with the same prefetching, from memory laid out the
same way, and writes rows of the same size. (It also reads 8 bytes a run of lines: where it is, how long it is.)
"""

# Shapes: B ids, D embedding_dim, L most cache lines that one id reads.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from embstore.quantize import take
from embstore.store.tensor_file import LINE

_PRODUCTS = {torch.baddbmm: 1, torch.addmm: 1, torch.nn.functional.linear: 0, torch.matmul: 0, Tensor.matmul: 0}
"""Functions that multiply matrices, and which argument is the left one."""
_READS = {Tensor.__getitem__, torch.nn.functional.embedding, torch.index_select, Tensor.index_select, torch.take}


class Reads(TorchFunctionMode):
    """Notes (tensor name, index) of every read of a stored tensor while it is active, and matrix products' shapes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
        self.found: list[tuple[str, Tensor]] = []
        self.products: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; note it when it reads rows by number."""
        if func in _READS:
            tensors = [a for a in args if isinstance(a, Tensor)]
            integer = [t for t in tensors if t.dtype == torch.int64]
            named = [t for t in tensors if t.data_ptr() in self._names]
            if named and integer and integer[-1] is not named[0]:
                self.found.append((self._names[named[0].data_ptr()], integer[-1]))
        if func in _PRODUCTS:
            left, right = args[_PRODUCTS[func]], args[_PRODUCTS[func] + 1]
            right = right.mT if func is torch.nn.functional.linear else right
            self.products.append((tuple(left.shape), tuple(right.shape)))
        return func(*args, **(kwargs or {}))


def products_made(
    scheme: Any, config: Any, tensors: Mapping[str, Tensor], ids_B: Tensor
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the matrices that a network's formula multiplies for these ids."""
    with Reads(tensors) as reads, torch.no_grad():
        scheme.compose(config, tensors, ids_B, take)
    made: list[tuple[tuple[int, ...], tuple[int, ...]]] = reads.products
    return made


def lines_read(scheme: Any, config: Any, tensors: Mapping[str, Tensor], ids_B: Tensor) -> tuple[NDArray[np.int32], int]:
    """Line numbers [B, L] that each id reads (-1: fewer than L), and how many lines all tensors take."""
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += -(-tensor.numel() * tensor.element_size() // LINE) + 1
    with Reads(tensors) as reads, torch.no_grad():
        scheme.compose(config, tensors, ids_B, take)
    parts, done, order_B = [], 0, _order(config, ids_B.cpu().numpy())
    for name, index in reads.found:
        tensor = tensors[name]
        row_bytes = tensor.element_size() * (tensor[0].numel() if tensor.ndim > 1 else 1)
        at: Any = slice(None)
        if order_B is not None:  # a part of the ids, in the order of their blocks
            at, done = order_B[done : done + len(index)], done + len(index)
        begin_BK = _by_id(index.cpu().numpy(), len(ids_B) if order_B is None else len(index)) * row_bytes
        first_BK, last_BK = begin_BK // LINE, (begin_BK + row_bytes - 1) // LINE
        for step in range(int((last_BK - first_BK).max(initial=0)) + 1):
            line_BK = np.full((len(ids_B), begin_BK.shape[1]), -1, np.int32)
            line_BK[at] = np.where(first_BK + step <= last_BK, starts[name] + first_BK + step, -1)
            if name in ("hot", "cold"):  # the formula reads both and keeps one
                line_BK[(ids_B.cpu().numpy() < config.num_hot) != (name == "hot")] = -1
            parts.append(line_BK)
    lines_BL = np.sort(np.concatenate(parts, axis=1), axis=1)[:, ::-1]
    again = np.zeros(lines_BL.shape, np.bool_)
    again[:, 1:] = lines_BL[:, 1:] == lines_BL[:, :-1]
    lines_BL = np.sort(np.where(again, np.int32(-1), lines_BL), axis=1)[:, ::-1]
    most = int((lines_BL >= 0).sum(axis=1).max())
    return np.ascontiguousarray(lines_BL[:, :most]), total


def _by_id(index: NDArray[np.int64], num_ids: int) -> NDArray[np.int64]:
    """Row numbers [ids, K] of an index that has ids first, or last, or is such an array made flat."""
    if index.shape[0] != num_ids and index.shape[-1] == num_ids:
        index = np.moveaxis(index, -1, 0)
    return index.reshape(num_ids, -1) if index.size else index.reshape(num_ids, 1)


def _order(config: Any, ids_B: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """For a scheme that reads block after block of ids: their order; None where all ids are read together."""
    if not hasattr(config, "blocks"):
        return None
    block_B = np.searchsorted(np.cumsum(config.block_sizes), ids_B, "right")
    return np.argsort(block_B, kind="stable")


def bytes_read(lines_BL: NDArray[np.int32]) -> float:
    """Bytes of cache lines that one id reads, on average."""
    return LINE * float((lines_BL >= 0).sum(axis=1).mean())


def runs_of(lines_BL: NDArray[np.int32]) -> NDArray[np.int32]:
    """Lines [B, L] as runs [B, R, 2] of neighbours: the first line and how many there are (0: no run)."""
    rising_BL = np.sort(lines_BL, axis=1)
    there_BL = rising_BL >= 0
    begins_BL = there_BL.copy()
    begins_BL[:, 1:] &= (rising_BL[:, 1:] != rising_BL[:, :-1] + 1) | ~there_BL[:, :-1]
    run_BL = begins_BL.cumsum(axis=1) - 1
    runs = np.zeros((len(lines_BL), int(run_BL.max()) + 1, 2), np.int32)
    ids, at = np.nonzero(begins_BL)
    runs[ids, run_BL[ids, at], 0] = rising_BL[ids, at]
    for run in range(runs.shape[1]):
        runs[:, run, 1] = (there_BL & (run_BL == run)).sum(axis=1)
    return runs


def make_memory(num_lines: int) -> NDArray[np.float32]:
    """Lines of numbers one after the other, each page touched, the first on a line boundary."""
    memory: NDArray[np.float32] = torch.ones(num_lines * LINE // 4).numpy()  # torch aligns to 64 bytes
    return memory
