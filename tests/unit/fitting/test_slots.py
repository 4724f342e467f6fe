"""Weighted means of what reads each number of a memory."""

# Shapes: N vectors, D dimensions, M numbers of a memory.

from __future__ import annotations

import pytest
import torch
from support.fits import weighted_relative_error

from embstore.fitting.slots import weighted_slot_means


def test_slot_means_say_what_they_explain() -> None:
    """The energy of the vectors less what is explained is the error; a slot that nobody reads is 0."""
    vectors_ND, weights_N = torch.randn(50, 3), torch.tensor([1.0, 0.0]).repeat(25)
    index_ND, negative_ND = torch.randint(20, (50, 3)), torch.rand(50, 3) < 0.5
    means_M, explained = weighted_slot_means(
        vectors_ND, lambda ids: (index_ND[ids], negative_ND[ids]), 22, weights_N=weights_N
    )
    approx_ND = torch.where(negative_ND, -means_M[index_ND], means_M[index_ND])
    energy = float((2 * weights_N @ vectors_ND.double().square().sum(dim=1).float()).double())
    error = weighted_relative_error(vectors_ND, approx_ND, weights_N)
    assert error**2 == pytest.approx(1 - explained / energy, rel=1e-5)
    assert means_M[20:].tolist() == [0.0, 0.0]
