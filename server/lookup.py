"""The request street: ids to vectors, counted, on the event loop when small and in a thread when large."""

# Shapes: B ids in a request, G bags of them, D embedding_dim.

from __future__ import annotations

import asyncio

from embstore.errors import DataError, Unprocessable
from embstore.ids import Keys
from embstore.pooling import Bags
from embstore.table import Fetched, Table
from server.cache import RowCache


class LookupService:
    """Looks up keys in a captured table; the table cannot change under it."""

    def __init__(self, *, inline_ids: int, cache: RowCache | None = None) -> None:
        self.inline_ids, self.cache = inline_ids, cache

    async def lookup(self, table: Table, keys: Keys, on_missing: str) -> Fetched:
        """Vectors of B keys: float32 [B, D], and which were found."""
        if len(keys) <= self.inline_ids:
            if self.cache is not None:
                return await self.cache.lookup(table, keys, on_missing)
            return table.fetch(keys, on_missing)
        return await asyncio.to_thread(table.fetch, keys, on_missing)

    async def lookup_bags(self, table: Table, keys: Keys, on_missing: str, bags: Bags) -> Fetched:
        """One vector a bag of keys: float32 [G, D]; composed and pooled here, the cache of rows is not asked."""
        try:
            if max(bags.num_ids, bags.num_bags) <= self.inline_ids:
                return table.fetch_bags(keys, bags, on_missing)
            return await asyncio.to_thread(table.fetch_bags, keys, bags, on_missing)
        except DataError as error:
            raise Unprocessable(str(error), table=table.name) from error
