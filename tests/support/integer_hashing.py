"""The hashes of the file format in integers without limits: short enough to be obviously right."""

from __future__ import annotations

from embstore.hashing import GAMMA

WORD = 1 << 64


def mix(key: int, seed: int) -> int:
    """The 64-bit mixer."""
    z = (key + (seed + 1) * GAMMA) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def paper_bucket(key: int, num_buckets: int, seed: int) -> int:
    """The hash's high half into range."""
    return (mix(key, seed) >> 32) * num_buckets >> 32
