"""Vectors from an embstore server, as numpy arrays.

>>> from embstore_client import EmbeddingClient
>>> with EmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
...     rows = client.lookup("item", [3, 14, 15])
...     rows.vectors.shape, rows.found.all(), rows.version
((3, 64), True, 7)
"""

from ._async.client import AsyncEmbeddingClient
from ._core.near_cache import NearCache
from ._core.observer import Observer
from ._core.policies import Hedge, Retries
from ._core.query import Bags
from ._core.rows import ManyRows, Rows
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
from ._sync.client import EmbeddingClient
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
