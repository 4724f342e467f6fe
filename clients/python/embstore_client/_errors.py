"""Everything the client raises on purpose.

    EmbstoreError
    ├── ServiceError              the server answered, and the answer was no
    │   ├── MalformedRequest      400, 405, 431
    │   ├── Unauthorized          401
    │   ├── Forbidden             403
    │   ├── NotFound              404   TableNotFound · VersionNotFound · LabelNotFound · ReleaseNotFound
    │   ├── Conflict              409
    │   ├── TooLarge              413   TooManyIds · BodyTooLarge
    │   ├── UnsupportedMediaType  415
    │   ├── Unprocessable         422   IdOutOfRange · WrongDtype
    │   ├── Overloaded            429
    │   ├── InternalError         500
    │   ├── Unavailable           503   NotReady, and Draining under it
    │   └── DeadlineExceeded      504, 408
    ├── ConnectionFailed          no answer: refused, reset, unknown host, bad certificate
    ├── Timeout                   no answer in time
    └── ProtocolError             an answer that breaks the contract

The `code` of a problem document chooses the class; an unknown code leaves it to the status.
"""

from __future__ import annotations


class EmbstoreError(Exception):
    """Base of everything this package raises on purpose: catch it to catch them all."""


class ServiceError(EmbstoreError):
    """The server answered with an error: read `code` and `detail`; quote `request_id` when asking about it.

    Attributes:
        status: the HTTP status.
        code: the stable name of the error, `""` where the answer carried none (a proxy's page).
        title, detail: what the server says about it.
        table, version, limit: the facts, where they apply.
        request_id: the server's name for this call.
        retry_after_s: how long the server asks to be left alone, in seconds.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int = 0,
        code: str = "",
        title: str = "",
        detail: str = "",
        table: str | None = None,
        version: int | None = None,
        limit: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.title = title
        self.detail = detail
        self.table = table
        self.version = version
        self.limit = limit
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class MalformedRequest(ServiceError):
    """The server could not read the request: fix the call; sending it again will not help."""


class Unauthorized(ServiceError):
    """No API key, or one the server does not know: pass `api_key=` to the client."""


class Forbidden(ServiceError):
    """The API key is known but may not do this: ask for a key with the right to it."""


class NotFound(ServiceError):
    """Nothing is served under that path: check `base_url` and the names in the call."""


class TableNotFound(NotFound):
    """No table of that name is served: check the spelling against `client.tables()`, or publish it first."""


class VersionNotFound(NotFound):
    """The table has no such version here: never published, or collected; choose one that is served."""


class LabelNotFound(NotFound):
    """The table has no such label: check the spelling, or set it with `embstore promote`."""


class ReleaseNotFound(NotFound):
    """No such release is served: check the id; an old release may have been collected."""


class Conflict(ServiceError):
    """The state of the store forbids it (a version not ready, a label moved): look again, then decide."""


class TooLarge(ServiceError):
    """A request is larger than the server allows, `limit`, and splitting did not help: ask for less in one call.

    Attributes:
        asked: how many ids (or bags, where they are more) the refused request had, where that is known.
    """

    asked: int | None = None


class TooManyIds(TooLarge):
    """A bag has more ids than one request may ask for, `limit`, or a reply has no room: ask for smaller bags, or less.

    The ids of a call are split by the client; the ids of one bag are not.
    """


class BodyTooLarge(TooLarge):
    """More bytes in one request than the server allows, `limit`: ask for shorter ids, or fewer ids in one call."""


class UnsupportedMediaType(ServiceError):
    """The server does not take a body of this type or coding: client and server disagree, check their versions."""


class Unprocessable(ServiceError):
    """The request reads well but asks for something impossible: `detail` says what to change."""


class IdOutOfRange(Unprocessable):
    """An id is not in the table and `on_missing="error"`: drop the id, or choose another `on_missing`."""


class WrongDtype(Unprocessable):
    """The ids are of another type than those of `table`: pass string keys to a table of string keys, else integers.

    Most often the ids of two tables were swapped; `detail` names the first wrong id.
    """


class Overloaded(ServiceError):
    """The server refuses work to protect itself: wait `retry_after_s`, then retry, fewer at a time."""


class InternalError(ServiceError):
    """The server failed and it is its fault: retrying may help; report it with `request_id`."""


class Unavailable(ServiceError):
    """Nobody there can answer now: retry shortly, or go to another replica."""


class NotReady(Unavailable):
    """The server is up but has not loaded this yet: retry shortly, or go to another replica."""


class Draining(NotReady):
    """The server is shutting down: go to another replica."""


class DeadlineExceeded(ServiceError):
    """The server gave up because the call's time was over: allow more `timeout_s`, or fewer ids a call."""


class ConnectionFailed(EmbstoreError):
    """No whole answer (refused, reset, unknown host, bad certificate): check `base_url`; retrying is safe."""


class Timeout(EmbstoreError):
    """No whole answer within `timeout_s`: retrying is safe; if it recurs, allow more time, or fewer ids."""

    def __init__(self, message: str = "", *, timeout_s: float | None = None) -> None:
        super().__init__(message)
        self.timeout_s = timeout_s


class ProtocolError(EmbstoreError):
    """The answer breaks the contract and cannot be trusted: check `base_url`, and both sides' versions.

    A call for many tables that was answered from two releases is one of these: ask again.
    """


BY_CODE: dict[str, type[ServiceError]] = {
    "malformed_request": MalformedRequest,
    "method_not_allowed": MalformedRequest,
    "head_too_large": MalformedRequest,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "table_not_found": TableNotFound,
    "version_not_found": VersionNotFound,
    "label_not_found": LabelNotFound,
    "release_not_found": ReleaseNotFound,
    "conflict": Conflict,
    "too_many_ids": TooManyIds,
    "body_too_large": BodyTooLarge,
    "unsupported_media_type": UnsupportedMediaType,
    "unprocessable": Unprocessable,
    "id_out_of_range": IdOutOfRange,
    "wrong_dtype": WrongDtype,
    "overloaded": Overloaded,
    "internal": InternalError,
    "not_ready": NotReady,
    "draining": Draining,
    "store_failed": Unavailable,
    "device_failed": Unavailable,
    "deadline_exceeded": DeadlineExceeded,
    "request_timeout": DeadlineExceeded,
}

BY_STATUS: dict[int, type[ServiceError]] = {
    400: MalformedRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: MalformedRequest,
    408: DeadlineExceeded,
    409: Conflict,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: Unprocessable,
    429: Overloaded,
    431: MalformedRequest,
    500: InternalError,
    502: Unavailable,  # a proxy that finds nobody behind it; to the caller the same as 503
    503: Unavailable,
    504: DeadlineExceeded,
}
