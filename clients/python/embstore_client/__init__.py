"""Vectors from an embstore server, as numpy arrays.

>>> from embstore_client import EmbeddingClient
>>> with EmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
...     rows = client.lookup("item", [3, 14, 15])
...     rows.vectors.shape, rows.found.all(), rows.version
((3, 64), True, 7)
"""

from ._async import AsyncEmbeddingClient
from ._bags import Bags
from ._errors import (
    BodyTooLarge,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    EmbstoreError,
    Forbidden,
    IdOutOfRange,
    InternalError,
    LabelNotFound,
    MalformedRequest,
    NotFound,
    NotReady,
    Overloaded,
    ProtocolError,
    ReleaseNotFound,
    ServiceError,
    TableNotFound,
    Timeout,
    TooLarge,
    TooManyIds,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    VersionNotFound,
    WrongDtype,
)
from ._near_cache import NearCache
from ._observe import Observer
from ._rows import ManyRows, Rows
from ._settings import Hedge, Retries
from ._sync import EmbeddingClient
from ._version import __version__

__all__ = [
    "AsyncEmbeddingClient",
    "Bags",
    "BodyTooLarge",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Draining",
    "EmbeddingClient",
    "EmbstoreError",
    "Forbidden",
    "Hedge",
    "IdOutOfRange",
    "InternalError",
    "LabelNotFound",
    "MalformedRequest",
    "ManyRows",
    "NearCache",
    "NotFound",
    "NotReady",
    "Observer",
    "Overloaded",
    "ProtocolError",
    "ReleaseNotFound",
    "Retries",
    "Rows",
    "ServiceError",
    "TableNotFound",
    "Timeout",
    "TooLarge",
    "TooManyIds",
    "Unauthorized",
    "Unavailable",
    "Unprocessable",
    "UnsupportedMediaType",
    "VersionNotFound",
    "WrongDtype",
    "__version__",
]
