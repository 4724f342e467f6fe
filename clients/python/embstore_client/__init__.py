"""Vectors from an embstore server, as numpy arrays.

>>> from embstore_client import EmbeddingClient
>>> with EmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
...     rows = client.lookup("item", [3, 14, 15])
...     rows.vectors.shape, rows.found.all(), rows.version
((3, 64), True, 7)
"""

from ._clients import AsyncEmbeddingClient, EmbeddingClient
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
from ._rows import ManyRows, Rows
from ._version import __version__

__all__ = [
    "AsyncEmbeddingClient",
    "BodyTooLarge",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Draining",
    "EmbeddingClient",
    "EmbstoreError",
    "Forbidden",
    "IdOutOfRange",
    "InternalError",
    "LabelNotFound",
    "MalformedRequest",
    "ManyRows",
    "NotFound",
    "NotReady",
    "Overloaded",
    "ProtocolError",
    "ReleaseNotFound",
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
