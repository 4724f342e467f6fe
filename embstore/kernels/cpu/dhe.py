"""CPU loops around the matrix products of deep hash embeddings: the encoding of ids, and activations with their bias.

Written so that the compiler finds vector instructions: no branches, one type, no calls (the exponential is spelt out).
"""

# Shapes: B ids, K hashes, H width of a layer.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import as_float
from embstore.kernels.cpu.rows import FLOATS, IDS, OUT, mix, void

OFFSETS = types.Array(types.int64, 1, "C", readonly=True)
STEP = np.float32(2.0**-24)
TURN = np.float32(2 * np.pi)

_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves a float no bits for fractions
_HIGH, _LOW = np.float32(20), np.float32(-87)  # mish(x) is x from 20 on, and below -87 what a float32 calls 0


@njit(inline="always")
def _uniform(hashed):
    """The hash's high 24 bits u as (2 u + 1 - 2^24) / 2^24: exact, and symmetric about 0."""
    return np.float32(np.int32(hashed >> np.uint64(40)) * np.int32(2) - np.int32((1 << 24) - 1)) * STEP


@compiled(void(IDS, OFFSETS, OUT))
def encode_uniform(ids, offsets, out):
    """out[i, j] = uniform in (-1, 1) from hash j of id i."""
    for i in range(ids.shape[0]):
        for j in range(offsets.shape[0]):
            out[i, j] = _uniform(mix(ids[i], offsets[j]))


@compiled(void(IDS, OFFSETS, OUT))
def encode_gaussian(ids, offsets, out):
    """Pairs of hashes as pairs of standard normal numbers (Box & Muller); schemes/dhe.py has the formula."""
    for i in range(ids.shape[0]):
        for j in range(0, offsets.shape[0], 2):
            radius = np.sqrt(
                np.float32(-2) * np.log((_uniform(mix(ids[i], offsets[j])) + np.float32(1)) * np.float32(0.5))
            )
            angle = TURN * (_uniform(mix(ids[i], offsets[j + 1])) + np.float32(1)) * np.float32(0.5)
            out[i, j] = radius * np.cos(angle)
            out[i, j + 1] = radius * np.sin(angle)


@njit(inline="always")
def _exp(x):
    """e ** x for x in [-87, 88], to about an ulp (Cephes' expf)."""
    whole = (x * _LOG2_E + _ROUND) - _ROUND
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * r * r + r) + np.float32(1)
    return p * as_float(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@compiled(void(OUT, FLOATS))
def add_mish(values, bias):
    """values = mish(values + bias), where mish(x) = x tanh(ln(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2)."""
    for i in range(values.shape[0]):
        for h in range(values.shape[1]):
            x = values[i, h] + bias[0, h]
            x = _LOW if x < _LOW else x
            e = _exp(_HIGH if x > _HIGH else x)
            n = e * (e + np.float32(2))
            values[i, h] = x * (n / (n + np.float32(2)))


@compiled(void(OUT, FLOATS))
def add_relu(values, bias):
    """values = max(values + bias, 0)."""
    for i in range(values.shape[0]):
        for h in range(values.shape[1]):
            x = values[i, h] + bias[0, h]
            values[i, h] = x if x > np.float32(0) else np.float32(0)


@compiled(void(OUT, FLOATS))
def add_bias(values, bias):
    """values += bias."""
    for i in range(values.shape[0]):
        for h in range(values.shape[1]):
            values[i, h] += bias[0, h]
