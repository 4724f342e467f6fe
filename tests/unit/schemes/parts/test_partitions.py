"""Moduli of complementary partitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embstore.schemes.parts.partitions import moduli


@pytest.mark.parametrize(
    ("n", "first", "count", "coprime", "expected"),
    [
        (100, 10, 2, False, (10, 10)),
        (101, 10, 2, False, (10, 11)),
        (101, 130, 2, False, (130, 1)),
        (1000, 10, 3, False, (10, 10, 10)),
        (1001, 10, 3, False, (10, 11, 10)),
        (2**62, 2**20, 4, False, (2**20, 2**14, 2**14, 2**14)),
        (100, 10, 2, True, (10, 11)),
        (90, 10, 2, True, (10, 9)),
        (1000, 10, 3, True, (10, 11, 13)),
        (7, 7, 3, True, (7, 1, 1)),
        (1, 1, 2, True, (1, 1)),
    ],
)
def test_moduli_share_out_what_is_left(
    n: int, first: int, count: int, coprime: bool, expected: tuple[int, ...]
) -> None:
    """The first is given, each other one is the least that takes its even share; stored tables rely on it."""
    assert moduli(n, first, count, coprime=coprime) == expected


@given(
    n=st.integers(1, 2**63 - 1) | st.integers(1, 10**4),
    first=st.integers(1, 2**40) | st.integers(1, 100),
    count=st.integers(2, 16),
)
def test_moduli_tell_all_ids_apart(n: int, first: int, count: int) -> None:
    """Their product reaches n, none that takes its share could be less, and Chinese remainders get coprime ones."""
    digits, coprimes = moduli(n, first, count, coprime=False), moduli(n, first, count, coprime=True)
    for found in (digits, coprimes):
        assert found[0] == first
        assert len(found) == count
        assert math.prod(found) >= n
    assert all(math.gcd(a, b) == 1 for i, a in enumerate(coprimes) for b in coprimes[:i])
    if digits[-1] > 1:
        assert math.prod(digits[:-1]) * (digits[-1] - 1) < n
