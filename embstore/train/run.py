"""A training run: events in, one release of two tables out."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from embstore.common.progress import Reporter
from embstore.device import pick_device
from embstore.ids import Vocabulary
from embstore.publish.store import Store
from embstore.train.config import TrainConfig
from embstore.train.data import read_dataset
from embstore.train.evaluate import Judge
from embstore.train.loop import Examples, fit
from embstore.train.model import make_model
from embstore.train.prepare import knowledge
from embstore.train.publication import (
    TrainResult,
    describe_data,
    describe_metrics,
    describe_model,
    published_table,
    to_publish,
)


def train(config: TrainConfig, store: Store, *, report: Reporter, device: str = "auto") -> TrainResult:
    """Train both tables as the config says and publish them as one release; after an error nothing is published."""
    started = time.perf_counter()
    on = torch.device(pick_device(device))
    dataset = read_dataset(config.data, config.seed)
    store.check_writable()
    if not config.publish.new_id_type:  # before the work, not after it
        for name, ids in (("user", dataset.users), ("item", dataset.items)):
            store.check_id_type(name, config.publish.label, Vocabulary.from_ids(ids.ids[:1]).kind)
    report.note(f"read {describe_data(dataset)}")
    known = knowledge(config, dataset, on, report)
    model = make_model(config, len(dataset.users), len(dataset.items), known).to(on)
    report.note(f"training on {on.type}: {describe_model(model)}")

    validation = Judge(config, dataset, dataset.validation, dataset.history, on)
    examples = Examples(dataset, config.training, config.seed, on)
    fitted = fit(model, examples, config.training, lambda: validation.ndcg(model), report)

    test = Judge(config, dataset, dataset.test, dataset.known, on)
    metrics, popularity = test.metrics(model), test.popularity()
    report.note(f"test: {describe_metrics(metrics)}; popularity: {describe_metrics(popularity)}")

    figures = metrics | {f"popularity_{name}": value for name, value in popularity.items()} | asdict(fitted)
    publications = to_publish(model, dataset, figures | {"seed": config.seed}, config)
    release = store.publish_release(publications, label=config.publish.label)
    tables = {
        name: published_table(table, release.tables[name], publications[name].dtype)
        for name, table in model.tables().items()
    }
    report.note(f"published release {release.id}: {', '.join(f'{n} version {t.version}' for n, t in tables.items())}")
    return TrainResult(
        release=release.id,
        tables=tables,
        metrics=metrics,
        popularity=popularity,
        fit=fitted,
        num_train_events=len(dataset.train),
        num_test_events=len(dataset.test),
        seconds=time.perf_counter() - started,
        device=on.type,
        seed=config.seed,
    )
