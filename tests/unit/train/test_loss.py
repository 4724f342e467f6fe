"""The loss and the optimiser: the correction is unbiased, the steps are what the formula says."""

from __future__ import annotations

import math

import pytest
import torch

from embstore.train.loss import log_inclusion, sampled_softmax
from embstore.train.optimizer import RowwiseAdagrad


def test_log_q_is_the_share_of_batches() -> None:
    """exp(log-Q) is how often a batch of a shuffled epoch holds the item at all."""
    counts_N = torch.tensor([400, 100, 20, 5, 1])
    items_E = torch.repeat_interleave(torch.arange(5), counts_N)
    held = torch.zeros(5)
    for _ in range(4000):
        held[items_E[torch.randperm(len(items_E))[:32]].unique()] += 1
    assert torch.allclose(held / 4000, log_inclusion(counts_N, 32).exp(), atol=0.03)


def test_the_corrected_sum_over_a_batch_is_unbiased() -> None:
    """Over batches, what the softmax divides by has the mean of the sum over all items; uncorrected it has not."""
    counts_N = torch.randint(1, 60, (300,))
    items_E = torch.repeat_interleave(torch.arange(300), counts_N)
    logits_N, log_q_N = torch.randn(300), log_inclusion(counts_N, 256)
    one, target = torch.ones(1, 1), torch.tensor([0])
    sums, plain = [], []
    for _ in range(3000):
        items_M = items_E[torch.randperm(len(items_E))[:256]].unique()
        loss = sampled_softmax(one, logits_N[items_M][:, None], target, log_q_N[items_M])
        sums.append((loss + logits_N[items_M[0]] - log_q_N[items_M[0]]).exp())
        plain.append(logits_N[items_M].exp().sum())
    true = logits_N.exp().sum()
    sample = torch.stack(sums)
    assert abs(sample.mean() - true) < 4 * sample.std() / len(sample) ** 0.5
    assert torch.stack(plain).mean() < 0.8 * true


def test_whole_catalogue_is_the_full_softmax() -> None:
    """When the batch holds every event there is nothing to correct: the loss is cross-entropy over all items."""
    counts_N = torch.tensor([3, 1, 2])
    log_q_N = log_inclusion(counts_N, 6)
    assert log_q_N.tolist() == [0, 0, 0]
    users, items, targets = torch.randn(4, 2), torch.randn(3, 2), torch.tensor([0, 1, 2, 0])
    full = torch.nn.functional.cross_entropy(users @ items.T, targets)
    assert torch.allclose(sampled_softmax(users, items, targets, log_q_N), full)


@pytest.mark.parametrize("sparse", [True, False])
def test_rowwise_adagrad_by_hand(sparse: bool) -> None:
    """Two steps, duplicates in the batch included, move the rows as the formula says and leave the others alone."""
    table = torch.nn.Embedding(3, 2, sparse=sparse)
    before = table.weight.detach().clone()
    optimizer = RowwiseAdagrad(table.parameters(), learning_rate=0.5)
    for _ in range(2):
        (table(torch.tensor([1, 1])) * torch.tensor([1.0, 3.0])).sum().backward()  # gradient of row 1: (2, 6)
        optimizer.step()
        optimizer.zero_grad()
    moment = (4 + 36) / 2
    moved = 0.5 * (1 / math.sqrt(moment) + 1 / math.sqrt(2 * moment))
    expected = before.clone()
    expected[1] -= moved * torch.tensor([2.0, 6.0])
    assert torch.allclose(table.weight, expected)
    assert torch.equal(table.weight[[0, 2]], before[[0, 2]])
