"""Makes a ranker for one release, from events that the release was not trained on.

the release's vectors -> candidates of users with a validation event -> Scorer, by those events -> test figure
"""

# Shapes: N ids, D embedding_dim.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from embstore.publish.store import Store
from embstore.store.local import Release
from embstore.train.config import TrainConfig
from embstore.train.data import Pairs, TableIds, read_dataset
from embstore.train.evaluate import Metrics
from ranker.artifact import Artifact, ArtifactError, Side, save
from ranker.fit import FitOptions, fit, offline
from ranker.lists import CandidateList, evaluate, key_of, retrieve, with_keys, write_lists

EVALUATION = "evaluation.jsonl"
NUM_GOLDEN = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """label: what the release's versions get; num_learned and num_tested: most users learned from and tested by."""

    num_candidates: int = 500
    num_learned: int = 2000
    num_tested: int = 2000
    label: str | None = "ranker"
    fit: FitOptions = field(default_factory=FitOptions)


@dataclass(frozen=True)
class TableVectors:
    """All vectors of one table in the order of the data set's ids, as the release serves them."""

    name: str
    version: int
    ids: TableIds
    vectors_ND: Tensor


def train(
    config: TrainConfig, store: Store, folder: Path, release: str | None, options: Options, note: Callable[[str], None]
) -> Artifact:
    """Train a ranker for a release of the config's events (the newest, where None is given) and write its artifact.

    The release's versions get the label `options.label`: servers then go on serving them when newer ones come.
    """
    torch.manual_seed(config.seed)
    pinned = store.release(release) if release is not None else _newest(store)
    dataset = read_dataset(config.data, config.seed)
    users, items = _vectors(store, "user", pinned, dataset.users), _vectors(store, "item", pinned, dataset.items)
    note(f"release {pinned.id}: {len(users.ids):,} users, {len(items.ids):,} items, {users.vectors_ND.shape[1]} floats")

    def lists(wanted: Pairs, known: Pairs, at_most: int) -> list[CandidateList[int]]:
        size, exclude_seen = options.num_candidates, config.data.exclude_seen
        both = users.vectors_ND, items.vectors_ND
        return retrieve(*both, wanted, known, exclude_seen=exclude_seen, size=size, at_most=at_most)

    validation = lists(dataset.validation, dataset.history, options.num_learned)
    test = lists(dataset.test, dataset.known, options.num_tested)
    scorer = fit(users.vectors_ND, items.vectors_ND, validation, options.fit, note)
    cutoff = options.fit.cutoff
    metrics = offline(scorer, users.vectors_ND, items.vectors_ND, test, cutoff)
    retrieval = evaluate(test, lambda one: one.candidates, cutoff)
    note(f"test, {len(test):,} users: {_in_words(metrics)}; order of retrieval: {_in_words(retrieval)}")
    artifact = Artifact(
        release=pinned.id,
        user=_side(users),
        item=_side(items),
        scorer=scorer,
        metrics=metrics | {f"retrieval_{name}": value for name, value in retrieval.items()},
        evaluation={"users": len(test), "candidates": options.num_candidates, "cutoff": cutoff},
    )
    save(artifact, folder)
    write_lists(folder / EVALUATION, (with_keys(one, users.ids, items.ids) for one in test))
    if options.label is not None:
        with store.turn():
            for table, version in pinned.tables.items():
                store.set_label(table, options.label, version, release=pinned.id)
    return artifact


def _newest(store: Store) -> Release:
    releases = [release for release in store.releases() if {"user", "item"} <= release.tables.keys()]
    if not releases:
        raise ArtifactError(f"{store.root} has no release of the tables user and item; `embstore train` publishes one")
    return releases[-1]


def _vectors(store: Store, name: str, release: Release, ids: TableIds) -> TableVectors:
    """Every id's vector through the store's own lookup, which is what a server answers."""
    table = store.load(name, release.tables[name])
    vectors_ND, found_N = table.lookup(ids.ids, return_found=True)
    if not found_N.all():
        raise ArtifactError(
            f"table {name!r} version {table.version} lacks {int((~found_N).sum()):,} of {len(ids):,} ids of the "
            "events: give the config that this release was trained by"
        )
    return TableVectors(name, table.version, ids, torch.from_numpy(vectors_ND))


def _side(table: TableVectors) -> Side:
    """What serving has to know of a table; its most frequent ids come first, and are the golden ones."""
    num_golden = min(NUM_GOLDEN, len(table.ids))
    golden = [key_of(table.ids, row) for row in range(num_golden)]
    keys: Literal["int64", "string"] = "string" if isinstance(golden[0], str) else "int64"
    golden_GD, mean_D = table.vectors_ND[:num_golden].clone(), table.vectors_ND.mean(dim=0)
    return Side(table.name, table.version, keys, golden, golden_GD, mean_D)


def _in_words(metrics: Metrics) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
