"""Fits a scorer: to tell a held-out target from random candidates of the same list, by softmax."""

# Shapes: N ids, D embedding_dim, E examples, B examples in the batch, C candidates.

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embstore.train.evaluate import Metrics
from ranker.artifact import ArtifactError
from ranker.lists import CandidateList, evaluate
from ranker.model import Scorer, rank

NUM_NEGATIVES = 100
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a scorer is trained; patience: epochs without a better nDCG@cutoff after which it ends."""

    cutoff: int = 20
    hidden: int = 16
    max_epochs: int = 20
    patience: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2


def fit(
    users_ND: Tensor,
    items_ND: Tensor,
    lists: Sequence[CandidateList[int]],
    options: FitOptions,
    note: Callable[[str], None],
) -> Scorer:
    """The scorer that orders every fifth list best, trained on the others; at worst it is the dot product."""
    judged = lists[::5]
    users_E, targets_E, negatives = _examples([one for i, one in enumerate(lists) if i % 5])
    scorer = Scorer(items_ND.shape[1], options.hidden)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    name = f"ndcg@{options.cutoff}"

    def validate() -> float:
        return offline(scorer, users_ND, items_ND, judged, options.cutoff)[name]

    best, best_metric, best_epoch = copy.deepcopy(scorer), validate(), 0
    note(f"{len(users_E):,} targets to learn from; {name} {best_metric:.4f} before training")
    for epoch in range(1, options.max_epochs + 1):
        if epoch - best_epoch > options.patience:
            break
        for batch_B in torch.split(torch.randperm(len(users_E)), BATCH_SIZE):
            items_BC = torch.cat([targets_E[batch_B].unsqueeze(1), _drawn(negatives, batch_B)], dim=1)
            scores_BC = scorer(users_ND[users_E[batch_B]], items_ND[items_BC])
            loss = nn.functional.cross_entropy(scores_BC, torch.zeros(len(batch_B), dtype=torch.int64))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metric = validate()
        note(f"epoch {epoch}: {name} {metric:.4f}")
        if metric > best_metric:
            best, best_metric, best_epoch = copy.deepcopy(scorer), metric, epoch
    return best.eval()


def offline(
    scorer: Scorer, users_ND: Tensor, items_ND: Tensor, lists: Sequence[CandidateList[int]], cutoff: int
) -> Metrics:
    """The metrics of a scorer on lists of rows, by the vectors as they are stored."""

    def best(one: CandidateList[int]) -> list[int]:
        order, _ = rank(scorer, users_ND[one.user], items_ND[one.candidates], cutoff)
        return [one.candidates[place] for place in order]

    return evaluate(lists, best, cutoff)


def _examples(lists: Sequence[CandidateList[int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A user, a target and the other candidates, for every target among its user's candidates."""
    found: list[tuple[int, int, Tensor]] = []
    for one in lists:
        hoped = set(one.targets) & set(one.candidates)
        others = torch.tensor([item for item in one.candidates if item not in hoped])
        if len(others):
            found.extend((one.user, item, others) for item in sorted(hoped))
    if not found:
        raise ArtifactError("no validation event is among its user's candidates: there is nothing to learn from")
    users_E, targets_E, negatives = zip(*found, strict=True)
    return torch.tensor(users_E), torch.tensor(targets_E), list(negatives)


def _drawn(negatives: Sequence[Tensor], batch_B: Tensor) -> Tensor:
    """[B, NUM_NEGATIVES] random ones of each example's own, with replacement: lists may be short."""
    rows = [negatives[example] for example in batch_B.tolist()]
    return torch.stack([row[torch.randint(len(row), (NUM_NEGATIVES,))] for row in rows])
