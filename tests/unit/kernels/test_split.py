"""The loop over tables of a float32 part and a packed one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embstore.kernels.cpu import split as cpu_split
from embstore.quantize import dequantize, for_kernels, pack

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_hot", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_a_split_table_reads_both_parts(dtype: str, num_hot: int) -> None:
    """Hot ids from the float32 table, the others from the packed one, by position or by mod; negative ids from none."""
    generator = np.random.default_rng(0)
    hot = generator.random((num_hot, 6), np.float32)
    packed = pack(generator.random((10, 6), np.float32), dtype)
    cold = dequantize(torch.from_numpy(packed.copy())).numpy()
    ids = np.concatenate([np.arange(num_hot + 10), [-1, -(2**63)], np.arange(num_hot + 10)[::-1]])
    for num_cold, shared in ((0, ids - num_hot), (4, (ids - num_hot) % 4)):
        out = np.full((len(ids), 6), 0.125, np.float32)
        cpu_split.gather_split(for_kernels(packed), hot, num_cold, ids, out)
        for i, id_ in enumerate(ids):
            expected = np.full(6, 0.125) if id_ < 0 else hot[id_] if id_ < num_hot else cold[shared[i]]
            np.testing.assert_array_equal(out[i], expected.astype(np.float32))
