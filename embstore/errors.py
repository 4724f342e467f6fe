"""Everything embstore raises on purpose, each with one stable `code`.

EmbstoreError
├── ConfigError              config_invalid        a setting or training config is wrong
├── DataError                data_invalid          events or vectors cannot be used as they are
├── StoreError               store_failed          the disk said no (space, permission, missing folder)
├── VerificationFailed       verification_failed   a stored version is not what its manifest says
├── NotFound
│   ├── TableNotFound        table_not_found
│   ├── VersionNotFound      version_not_found
│   ├── LabelNotFound        label_not_found
│   └── ReleaseNotFound      release_not_found
├── Conflict                 conflict
├── BadRequest               malformed_request     the request cannot be understood
│   ├── UnsupportedMediaType unsupported_media_type
│   ├── Unprocessable        unprocessable         understood, but a value is not allowed
│   │   └── WrongDtype       wrong_dtype           strings for integer ids, or the other way round
│   ├── IdOutOfRange         id_out_of_range       an id the table does not have, under on_missing=error
│   ├── TooManyIds           too_many_ids
│   └── BodyTooLarge         body_too_large
├── Unauthorized             unauthorized          no API key, or a wrong one
├── Forbidden                forbidden             a call that this caller may not make
├── Overloaded               overloaded            no room for another request now
├── DeadlineExceeded         deadline_exceeded     the time the caller gave is over
└── NotReady                 not_ready
    ├── Draining             draining
    └── DeviceFailed         device_failed         the GPU has failed: the process has to be restarted

Codes are data: the server maps them to HTTP statuses, the command line to exit codes, clients to classes.
"""

from __future__ import annotations


class EmbstoreError(Exception):
    """Base of every error this library raises on purpose; `str()` is one line a person can act on."""

    code = "internal"

    def __init__(self, message: str, **facts: str | int) -> None:
        super().__init__(message)
        self.facts = facts


class ConfigError(EmbstoreError):
    """A setting, flag or training config is wrong; the message names it and says what would be right."""

    code = "config_invalid"


class DataError(EmbstoreError):
    """Events, ids or vectors cannot be used as they are."""

    code = "data_invalid"


class StoreError(EmbstoreError):
    """The storage below the store failed: no space, no permission, not a folder."""

    code = "store_failed"


class VerificationFailed(EmbstoreError):
    """A stored version is not what its manifest says, or holds values that must never be served."""

    code = "verification_failed"


class NotFound(EmbstoreError):
    """Something was asked for by a name that does not exist."""

    code = "not_found"


class TableNotFound(NotFound):
    """No table of this name."""

    code = "table_not_found"

    def __init__(self, table: str, where: str = "in this store") -> None:
        super().__init__(f"no table named {table!r} {where}", table=table)


class VersionNotFound(NotFound):
    """The table exists, this version of it does not (or is not loaded)."""

    code = "version_not_found"

    def __init__(self, table: str, version: int, detail: str = "") -> None:
        super().__init__(f"table {table!r} has no version {version}{detail}", table=table, version=version)


class LabelNotFound(NotFound):
    """The table exists, this label of it does not."""

    code = "label_not_found"

    def __init__(self, table: str, label: str, detail: str = "") -> None:
        super().__init__(f"table {table!r} has no label {label!r}{detail}", table=table, label=label)


class ReleaseNotFound(NotFound):
    """No release of this id."""

    code = "release_not_found"

    def __init__(self, release: str, detail: str = "") -> None:
        super().__init__(f"no release {release!r}{detail}", release=release)


class Conflict(EmbstoreError):
    """The change asked for contradicts the present state."""

    code = "conflict"


class BadRequest(EmbstoreError):
    """The request cannot be understood; the message names the place."""

    code = "malformed_request"


class UnsupportedMediaType(BadRequest):
    """The content type of the body is none that this call takes."""

    code = "unsupported_media_type"


class Unprocessable(BadRequest):
    """The request is well formed, but a value in it is not allowed."""

    code = "unprocessable"


class WrongDtype(Unprocessable):
    """The ids are of another type than the table's: strings for integers, or the other way round."""

    code = "wrong_dtype"


class IdOutOfRange(BadRequest):
    """An id lies outside the table (or is not in its vocabulary) where that is an error."""

    code = "id_out_of_range"


class TooManyIds(BadRequest):
    """More ids than one request may ask for."""

    code = "too_many_ids"


class BodyTooLarge(BadRequest):
    """The body is larger than one request may be."""

    code = "body_too_large"


class Unauthorized(EmbstoreError):
    """The call needs an API key and has none, or a wrong one."""

    code = "unauthorized"


class Forbidden(EmbstoreError):
    """The call is not open to whoever made it."""

    code = "forbidden"


class Overloaded(EmbstoreError):
    """There is no room for another request at the moment; later there will be."""

    code = "overloaded"


class DeadlineExceeded(EmbstoreError):
    """The time that the caller gave is over; the work was dropped."""

    code = "deadline_exceeded"


class NotReady(EmbstoreError):
    """The server cannot serve this yet."""

    code = "not_ready"


class Draining(NotReady):
    """The server is about to stop and takes no new work."""

    code = "draining"


class DeviceFailed(NotReady):
    """The device that holds the tables has failed; only a new process can use it again."""

    code = "device_failed"
