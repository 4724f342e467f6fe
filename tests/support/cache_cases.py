"""Tables that the tests of the cache look up, and the counters they read."""

# Shapes: N rows, D embedding_dim.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embstore import schemes
from embstore.ids import Dense, IdSpace
from embstore.schemes.base import Scheme
from embstore.store.manifest import Golden, Manifest
from embstore.table import DEFAULT_VECTOR, Table, digest, make_table
from server.lookup.service import LookupService
from server.metrics.recorder import Metrics
from support.scheme_cases import stored_arrays

N, D = 3000, 17  # an odd number of floats: nothing is aligned by chance


def table_of(
    module: Scheme, *, name: str = "item", version: int = 1, ids: IdSpace | None = None, hot_ids: Any = ()
) -> Table:
    """A module as the loader would make a table of it."""
    ids = Dense(module.num_embeddings) if ids is None else ids
    manifest = Manifest(
        table=name,
        version=version,
        scheme=module.name,
        parameters=module.config.parameters(),
        num_embeddings=module.num_embeddings,
        embedding_dim=module.embedding_dim,
        dtype="float32",
        id_space=ids.kind,
        num_ids=ids.num_ids,
        files=[],
        golden=Golden(ids=[], sha256=digest(np.empty((0, module.embedding_dim), np.float32))),
        created="2026-01-01T00:00:00+00:00",
        hot_ids=list(hot_ids),
    )
    default_D = np.arange(module.embedding_dim, dtype=np.float32)
    return make_table(manifest, {**stored_arrays(module), **ids.arrays(), DEFAULT_VECTOR: default_D})


def computing(inline_misses: int = 8192) -> dict[str, Any]:
    """How a cached table computes: at once, and in two threads what is large."""
    service = LookupService(inline_ids=8192, num_threads=2)
    return {
        "compute": service.compute,
        "in_thread": service.do,
        "inline_ids": service.inline_ids,
        "inline_misses": inline_misses,
    }


def full_table(version: int = 1, **options: Any) -> Table:
    """A plain matrix; every version has other vectors."""
    module = schemes.Full(N, options.pop("embedding_dim", D))
    generator = torch.Generator().manual_seed(version)
    weight = torch.randn(module.num_embeddings, module.embedding_dim, generator=generator)
    module.load_state_dict({"weight": weight})
    return table_of(module, version=version, **options)


def dhe_table(version: int = 1, **options: Any) -> Table:
    """A small network: vectors that cost something to compute."""
    torch.manual_seed(version)
    return table_of(schemes.DHE(N, 16, num_hashes=64, hidden=(64,)).eval(), version=version, **options)


def truth(table: Table, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The vectors of rows, computed."""
    vectors = np.empty((len(rows), table.embedding_dim), np.float32)
    table.compose(rows, vectors)
    return vectors


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


class Counts:
    """Real metrics and what they say."""

    def __init__(self, *tables: str) -> None:
        self.metrics = Metrics()
        self.lookups = self.metrics.lookups
        for table in tables or ("item",):
            self.lookups.add_table(table)

    def ids(self, result: str, tier: str = "redis", table: str = "item") -> int:
        """Ids a tier was asked for."""
        return self._value("embstore_cache_ids_total", table=table, tier=tier, result=result)

    def errors(self, op: str) -> int:
        """Redis operations that failed."""
        return self._value("embstore_cache_errors_total", op=op)

    def breaker(self) -> str:
        """The state shown."""
        states = ("closed", "half_open", "open")
        return next(state for state in states if self._value("embstore_cache_breaker_state", state=state))

    def choice(self, batch: str, table: str = "item") -> str:
        """What batches of this size do."""
        ways = ("compute", "local", "redis")
        return next(way for way in ways if self._value("embstore_cache_choice", table=table, batch=batch, choice=way))

    def _value(self, name: str, **labels: str) -> int:
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None, (name, labels)
        return int(value)
