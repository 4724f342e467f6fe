"""pq that learns its codes: what is trained is what is evaluated and published."""

# Shapes: N ids, B of them in a batch, D embedding_dim.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fits import weighted_relative_error
from support.pq_cases import D, N, clustered, decoded, fitted
from support.scheme_cases import looked_up, same, same_bits, served

from embstore import open_store
from embstore.errors import DataError
from embstore.schemes import PQ
from embstore.schemes.parts.pq_learner import PQLearner


def learner(num_codes: int = 8, **options: Any) -> PQLearner:
    """A module that learns its codes, of rows as if trained for an epoch."""
    given: dict[str, Any] = {"num_parts": 4, "num_codes": num_codes, "generator": torch.Generator().manual_seed(0)}
    module = PQ.from_budget(N, D, 10**6, **(given | options))
    assert isinstance(module, PQLearner)
    with torch.no_grad():
        module.weight.copy_(clustered())
    return module


KINDS: list[dict[str, Any]] = [{}, {"num_stages": 2}, {"rotation": True}, {"rotation": True, "num_stages": 2}]


def test_the_first_epoch_is_a_full_tables() -> None:
    """Until codewords are fitted the model sees the rows themselves, and only they get a gradient."""
    module, ids = learner(), torch.randint(N, (5, 3))
    vectors = module(ids)
    assert same_bits(vectors, module.weight[ids])
    vectors.sum().backward()
    assert module.weight.grad is not None
    assert module.codebooks.grad is None
    assert float(module.penalty()) == 0


@pytest.mark.parametrize("options", KINDS)
def test_what_is_evaluated_is_what_is_published(options: dict[str, Any]) -> None:
    """Evaluation, both lookups of the export and a module made of it: the same vectors, the fit's at first."""
    module, ids = learner(**options), torch.arange(N)
    module.end_of_epoch(1)
    rtol = PQ.tolerance if options.get("rotation") else 0.0
    with torch.no_grad():
        while_training = module(ids)
    vectors = module.eval()(ids)
    assert same_bits(vectors, while_training)
    assert same(served(module, ids), vectors, rtol)
    assert same(looked_up(module, ids), vectors, rtol)
    assert same(PQ.from_tensors(*module.export())(ids), vectors, rtol)
    alone = torch.stack([module(torch.tensor(i)) for i in range(20)])
    assert same(alone, vectors[:20], rtol)
    assert weighted_relative_error(clustered(), vectors.detach()) < 0.6


@pytest.mark.parametrize("options", KINDS)
def test_rows_and_codewords_get_the_gradient(options: dict[str, Any]) -> None:
    """Straight through to the rows; the sum of their ids' gradients to the codewords; the penalty pulls rows alone."""
    module = learner(commitment=0.5, **options)
    module.end_of_epoch(1)
    ids = torch.tensor([3, 5, 5, 299])
    upstream = torch.randn(4, D)
    vectors = module.train()(ids)
    (vectors * upstream).sum().backward(retain_graph=True)
    expected = torch.zeros(N, D).index_add_(0, ids, upstream)
    assert module.weight.grad is not None
    assert module.codebooks.grad is not None
    torch.testing.assert_close(module.weight.grad, expected)
    fixed = PQ.from_tensors(*module.export())
    (fixed(ids) * upstream).sum().backward()
    torch.testing.assert_close(module.codebooks.grad, fixed.codebooks.grad)

    module.zero_grad()
    penalty = module.penalty()
    away = module.weight[ids] - vectors
    torch.testing.assert_close(penalty, 0.5 * away.square().sum(dim=1).mean())
    penalty.backward()
    pulled = torch.zeros(N, D).index_add_(0, ids, 2 * 0.5 * away.detach() / 4)
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, pulled)
    assert module.codebooks.grad is None


def test_only_rows_have_sparse_gradients() -> None:
    """A step touches the rows of its batch; the codebooks are small."""
    module = learner(sparse=True)
    module.end_of_epoch(1)
    module(torch.tensor([1, 2])).sum().backward()
    assert module.weight.grad is not None
    assert module.codebooks.grad is not None
    assert module.weight.grad.is_sparse
    assert not module.codebooks.grad.is_sparse


def test_an_evaluation_or_an_export_fits_what_was_not_fitted() -> None:
    """Without an end_of_epoch no random codewords are served: the first lookup without gradients fits them."""
    for first in (lambda m: m.export(), lambda m: m.eval()(torch.arange(3)), lambda m: m.end_of_epoch(1)):
        module = learner()
        assert not bool(module.get_buffer("fitted"))
        first(module)
        assert bool(module.get_buffer("fitted"))
        assert weighted_relative_error(clustered(), decoded(module)) < 0.6


def test_a_state_is_a_learners_all() -> None:
    """Rows, codebooks, whether they were fitted: another learner with the state goes on where this one was."""
    module, twin = learner(rotation=True), learner(rotation=True, generator=torch.Generator().manual_seed(5))
    module.end_of_epoch(1)
    twin.load_state_dict(module.state_dict())
    assert same_bits(decoded(twin), decoded(module))


def test_codewords_that_no_id_chose_move() -> None:
    """After an epoch, an unused codeword stands where rows were worst off; used ones stay."""
    module = learner()
    module.end_of_epoch(1)
    with torch.no_grad():
        module.codebooks[3] = 1e6  # the first part's fourth codeword: no row is near
    before = module.codebooks.detach().clone()
    error = weighted_relative_error(clustered(), decoded(module))
    module.train()(torch.arange(N))
    module.end_of_epoch(2)
    changed = (module.codebooks != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3]
    assert weighted_relative_error(clustered(), decoded(module)) < error


def test_an_epoch_without_a_batch_moves_nothing() -> None:
    """end_of_epoch called again, with nothing trained in between, leaves every codeword where it is."""
    module = learner()
    for epoch in (1, 2):
        module.end_of_epoch(epoch)
        module.train()(torch.arange(N))
    module.end_of_epoch(3)
    before = module.codebooks.detach().clone()
    module.end_of_epoch(3)
    assert same_bits(module.codebooks, before)


def test_frequencies_weigh_the_fit() -> None:
    """The codewords are fitted to popular ids first; a frequency is needed for every id."""
    frequencies = torch.zeros(N)
    frequencies[:20] = 1000
    module = learner(frequencies=frequencies)
    module.end_of_epoch(1)
    alike = learner()
    alike.end_of_epoch(1)
    rows = clustered()[:20]
    errors = [weighted_relative_error(rows, decoded(one)[:20]) for one in (module, alike)]
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(DataError, match="frequencies have shape"):
        learner(frequencies=torch.ones(3))


def test_training_end_to_end_finds_good_codes() -> None:
    """Rows, codes and codewords trained on a loss alone come close to a fit that is shown the vectors."""
    target = clustered()
    module = learner(num_codes=16)
    with torch.no_grad():
        module.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    for epoch in range(1, 21):
        for ids in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(50):
            loss = (module(ids) - target[ids]).square().sum(dim=1).mean() + module.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        module.end_of_epoch(epoch)
    best = weighted_relative_error(target, decoded(fitted(target, 4, 16)))
    assert weighted_relative_error(target, decoded(module)) < 1.3 * best


def test_rows_that_diverged_are_not_published() -> None:
    """NaN has no nearest codeword."""
    module = learner()
    module.end_of_epoch(1)
    with torch.no_grad():
        module.weight[7, 1] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity"):
        module.export()


def test_a_learner_without_numbers_has_its_sizes() -> None:
    """On the meta device `export` says shapes and dtypes, of any number of ids."""
    with torch.device("meta"):
        module = PQ.from_budget(10**10, 64, 10**12, rotation=True)
    config, tensors = module.export()
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: s.shape for n, s in PQ.layout(config).items()}


def test_a_learner_is_copied_and_published(tmp_path: Path) -> None:
    """A learner can be copied and published between two steps of training too."""
    import copy

    module = learner()
    module.end_of_epoch(1)
    module(torch.arange(9)).sum().backward()
    assert same_bits(decoded(copy.deepcopy(module)), decoded(module))
    store = open_store(tmp_path)
    store.publish("items", module)
    assert same_bits(torch.from_numpy(store.load("items").lookup(np.arange(N))), decoded(module))
