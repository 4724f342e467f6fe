"""What schemes ask to know before they are built: counts, histories and cheap vectors, of training events alone.

A validation or test event that leaked into a map, a width or a signature would be judged by itself.
"""

# Shapes: E training events, N ids, L dimensions of the cheap vectors.

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from embstore.common.progress import Reporter, Silent
from embstore.schemes import scheme_class
from embstore.train.config import ModelConfig, TablesConfig, TrainConfig
from embstore.train.data import Dataset
from embstore.train.loop import Examples, fit
from embstore.train.model import all_vectors, make_model

CHEAP_DIM = 8
LEAST_STEPS = 256
"""Cheap vectors train for one epoch, or for as many as this many batches take where events are few."""

Knowledge = dict[str, dict[str, Any]]
"""Table -> what its scheme's `uses` asks for."""


def knowledge(config: TrainConfig, dataset: Dataset, device: torch.device, report: Reporter) -> Knowledge:
    """For each table what its scheme asks for (`Scheme.uses`), nothing else is made.

    frequencies: float64 [N], the ids' training events. histories: int64 [E, 2], an id and the other side's id of every
    event. vectors: float32 [N, L], from plain tables of CHEAP_DIM columns that were trained for about an epoch.
    """
    schemes = {name: scheme_class(getattr(config.tables, name).scheme) for name in ("user", "item")}
    users_E, items_E = torch.from_numpy(dataset.train.users_E), torch.from_numpy(dataset.train.items_E)
    found: Knowledge = {name: {} for name in schemes}
    for name, ids, pair in (("user", dataset.users, (users_E, items_E)), ("item", dataset.items, (items_E, users_E))):
        if "frequencies" in schemes[name].uses:
            found[name]["frequencies"] = torch.from_numpy(ids.num_events_N).double()
        if "histories" in schemes[name].uses:
            found[name]["histories"] = torch.stack(pair, dim=1)
    asking = [name for name, scheme in schemes.items() if "vectors" in scheme.uses]
    if asking:
        report.note(f"training vectors of {CHEAP_DIM} columns, which the {' and '.join(asking)} table is planned by")
        vectors = cheap_vectors(config, dataset, device, report)
        for name in asking:
            found[name]["vectors"] = vectors[name]
    return found


def cheap_vectors(config: TrainConfig, dataset: Dataset, device: torch.device, report: Reporter) -> dict[str, Tensor]:
    """Vectors [N, CHEAP_DIM] of users and items from plain tables, by the training that the config describes."""
    cheap = replace(config, model=ModelConfig(embedding_dim=CHEAP_DIM), tables=TablesConfig())
    model = make_model(cheap, len(dataset.users), len(dataset.items)).to(device)
    examples = Examples(dataset, config.training, config.seed, device)
    num_epochs = max(1, -(-LEAST_STEPS // examples.num_steps))
    training = replace(config.training, max_epochs=num_epochs, patience=1, evaluate_every=num_epochs)
    fit(model, examples, training, lambda: 0.0, OnlyBars(report))
    return {name: all_vectors(table, device).cpu() for name, table in model.tables().items()}


class OnlyBars(Silent):
    """Passes progress on, but no lines: nothing was validated, so there is nothing to tell of an epoch."""

    def __init__(self, report: Reporter) -> None:
        self.report = report

    def advanced(self, what: str, done: int, total: int, detail: str = "") -> None:
        """On to the reporter."""
        self.report.advanced(what, done, total, detail)
