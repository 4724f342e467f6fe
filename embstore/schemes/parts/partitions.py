"""Moduli of complementary partitions: how few rows separate n ids, as exact integer maths.

k partitions of m_1 .. m_k buckets separate n ids when the product of the moduli is at least n (and, for Chinese
remainders, when they are coprime in pairs). The first modulus is given. Each further one takes an even share of what
is left: the least whole number whose power reaches it.

A budget asks for the largest first modulus whose total fits. Totals jump about, by rounding up and by the gaps between
coprime numbers, but never go below a convex bound: `largest` and `least` search where that bound allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """Sizes of 1 .. `most`, where `total(size)` is at least `bound(size)`, which is convex and least at `middle`."""

    total: Callable[[int], int]
    bound: Callable[[int], int]
    middle: int
    most: int

    def largest(self, budget: int) -> int | None:
        """The largest size whose total is at most `budget`; None where there is none."""
        low, high = self.middle, self.most
        while low < high:  # the bound's upper end, from which the answer is not far
            half = (low + high + 1) // 2
            low, high = (half, high) if self.bound(half) <= budget else (low, half - 1)
        for size in range(low, 0, -1):
            if self.bound(size) > budget:
                break
            if self.total(size) <= budget:
                return size
        return None

    def least(self) -> int:
        """The size of the least total."""
        best, least = self.middle, self.total(self.middle)
        for sizes in (range(self.middle - 1, 0, -1), range(self.middle + 1, self.most + 1)):
            for size in sizes:
                if self.bound(size) >= least:
                    break
                total = self.total(size)
                best, least = (size, total) if total < least else (best, least)
        return best


def moduli(num_ids: int, first: int, count: int, *, coprime: bool) -> tuple[int, ...]:
    """`count` moduli whose product is at least `num_ids`, `first` among them; `coprime`: no two share a factor."""
    found, product, left = [first], first, -(-num_ids // first)
    for remaining in range(count - 1, 0, -1):
        modulus = _root(left, remaining)
        while coprime and math.gcd(modulus, product) > 1:
            modulus += 1
        found.append(modulus)
        product *= modulus
        left = -(-left // modulus)
    return tuple(found)


def first_moduli(num_ids: int, count: int, *, coprime: bool) -> Search:
    """The search for a first modulus, whose total is the sum of the moduli."""
    others = count - 1

    def bound(first: int) -> int:  # numbers are never less, on average, than the root of their product
        return first + _root(-(-(others**others) * num_ids // first), others)

    share = min(_root(num_ids, count), num_ids)
    middle = min(max(share - 1, 1), share, key=bound)
    return Search(lambda first: sum(moduli(num_ids, first, count, coprime=coprime)), bound, middle, num_ids)


def _root(value: int, degree: int) -> int:
    """The least whole number whose power of `degree` reaches `value`."""
    if degree == 1:
        return value
    root = round(math.pow(value, 1 / degree))
    while root**degree < value:
        root += 1
    while root > 1 and (root - 1) ** degree >= value:
        root -= 1
    return root
