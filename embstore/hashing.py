"""Seeded 64-bit hashing as pure integer maths: numpy, torch and the kernels agree bit for bit.

`mix64` is the splitmix64 finaliser (Steele, Lea & Flood, OOPSLA 2014) over `key + (seed + 1) * GAMMA`; it is a
bijection on 64-bit words for every seed, so two different keys never share a hash, only a bucket.
`bucket` takes the hash's high 32 bits and multiplies them into range (Lemire, 2019): no division, no
sign trouble, and even buckets for any `num_buckets` below 2**31.

Hashes are part of the file format: golden vectors in the tests pin them.
"""

# Shapes: any. Dtype int64 everywhere; the bits are read as unsigned.

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15
MUL1 = 0xBF58476D1CE4E5B9
MUL2 = 0x94D049BB133111EB
MASK64 = (1 << 64) - 1
MAX_BUCKETS = (1 << 31) - 1


def to_signed(value: int) -> int:
    """The int64 that has the same 64 bits as `value`."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


def seed_offset(seed: int) -> int:
    """What `mix64` adds to every key for this seed, as an int64."""
    return to_signed((seed + 1) * GAMMA)


def mix64(keys: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """Hash int64 keys of any shape; returns int64 of that shape."""
    z = keys.astype(np.int64).reshape(-1).view(np.uint64) + np.uint64(((seed + 1) * GAMMA) & MASK64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MUL2)
    return (z ^ (z >> np.uint64(31))).view(np.int64).reshape(keys.shape)


def bucket(keys: NDArray[np.int64], num_buckets: int, seed: int = 0) -> NDArray[np.int64]:
    """Hash int64 keys into `[0, num_buckets)`; same shape, int64."""
    high = mix64(keys, seed).view(np.uint64) >> np.uint64(32)
    return ((high * np.uint64(num_buckets)) >> np.uint64(32)).view(np.int64)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's `>>` on int64 keeps the sign, these are unsigned bits."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix64_torch(keys: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """`mix64` for an int64 tensor on any device."""
    z = keys + seed_offset(seed)
    z = (z ^ _shift_right(z, 30)) * to_signed(MUL1)
    z = (z ^ _shift_right(z, 27)) * to_signed(MUL2)
    return z ^ _shift_right(z, 31)


def bucket_torch(keys: torch.Tensor, num_buckets: int, seed: int = 0) -> torch.Tensor:
    """`bucket` for an int64 tensor on any device."""
    return (_shift_right(mix64_torch(keys, seed), 32) * num_buckets) >> 32
