"""Distillation."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import Shared, made, weighted_relative_error
from torch import nn

from embstore.errors import ConfigError, DataError
from embstore.fitting import (
    distill,
    weighted_bucket_means,
)


@pytest.mark.parametrize("sparse", [False, True])
def test_distilling_comes_close_to_the_best_there_is(sparse: bool) -> None:
    """Shared rows end at the weighted means of their ids, the module as it was otherwise."""
    vectors_ND = torch.randn(60, 4, generator=made(0)) * 3
    w_N = torch.rand(60, generator=made(1)) ** 3
    bucket_N = torch.arange(60) % 20
    best = weighted_relative_error(vectors_ND, weighted_bucket_means(vectors_ND, bucket_N, 20, w_N)[bucket_N], w_N)
    module = Shared(20, 4, sparse=sparse).eval()
    told = list[tuple[str, int, int]]()
    error = distill(
        module,
        vectors_ND,
        weights_N=w_N,
        steps=600,
        batch_size=256,
        generator=made(2),
        progress=lambda *fact: told.append(fact),
    )
    assert error == pytest.approx(weighted_relative_error(vectors_ND, module(torch.arange(60)).detach(), w_N))
    assert best <= error < best * 1.02
    assert (module.sparse, module.training) == (sparse, False)
    assert all(p.grad is None for p in module.parameters())
    assert told[-1] == ("distilling", 600, 600)


@settings(max_examples=8)
@given(learning_rate=st.sampled_from([1e-4, 0.03, 5.0, 1e6]))
def test_distilling_never_ends_worse(learning_rate: float) -> None:
    """Even with a learning rate that throws everything away, the state kept is the best that was seen."""
    vectors_ND = torch.randn(50, 4)
    module = Shared(10, 4)
    before = weighted_relative_error(vectors_ND, module(torch.arange(50)).detach())
    error = distill(module, vectors_ND, steps=8, batch_size=32, learning_rate=learning_rate)
    assert error <= before
    assert error == pytest.approx(weighted_relative_error(vectors_ND, module(torch.arange(50)).detach()))


def test_distilling_repeats_itself() -> None:
    """The same generator state and module give the same parameters."""
    vectors_ND, runs = torch.randn(40, 3), []
    for _ in range(2):
        torch.manual_seed(0)
        module = Shared(7, 3)
        distill(module, vectors_ND, steps=20, batch_size=16, generator=made(3))
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_size", -1), ("learning_rate", float("nan"))])
def test_distilling_refuses_impossible_settings(name: str, value: Any) -> None:
    """The message names the setting and the value."""
    with pytest.raises(ConfigError, match=f"{name} must be above 0, got {value}"):
        distill(Shared(3, 2), torch.randn(9, 2), **{name: value})


def test_distilling_refuses_what_cannot_learn() -> None:
    """A module without parameters, or one that gives vectors of another width."""
    with pytest.raises(ConfigError, match="no parameters to train"):
        distill(nn.Identity(), torch.randn(9, 2))
    with pytest.raises(DataError, match=r"module gives vectors \[\d+, 3\], these are \[\d+, 2\]"):
        distill(Shared(3, 3), torch.randn(9, 2), steps=1)
