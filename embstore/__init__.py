"""embstore: embedding tables in a fraction of the space, trained, published and served.

    store = embstore.open_store("./store")
    version = store.publish("item", model.item)
    vectors = store.load("item", version="latest").lookup(ids)

Importing this package costs nothing; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embstore.publish.publication import Publication as Publication
    from embstore.publish.store import Store as Store
    from embstore.publish.store import open_store as open_store
    from embstore.table import Table as Table

__version__ = "0.1.0"

_HOME = {
    "Publication": "embstore.publish.publication",
    "Store": "embstore.publish.store",
    "open_store": "embstore.publish.store",
    "Table": "embstore.table",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its file on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'embstore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
