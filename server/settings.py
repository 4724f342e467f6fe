"""Every setting of the server: its name, default, limits and help. The server's only reader of the environment.

Precedence: command-line flag, then environment (`EMBSTORE_<NAME>`), then the TOML file that `EMBSTORE_CONFIG` names,
then the default here.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from embstore.errors import ConfigError

PREFIX = "EMBSTORE_"
CONFIG = f"{PREFIX}CONFIG"
MISSPELT = 0.75
"""Likeness from which a variable is a setting misspelt: PROT is, VERSION (like keep_versions) and API_KEY are not."""
EMBEDDED = "embedded"
"""Value of `redis` for a private Valkey beside the server."""


class Settings(BaseSettings):
    """What a server process needs to know, fixed from its start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    store: Path = Field(default=Path("store"), description="Folder of the store.")
    host: str = Field(default="127.0.0.1", description="Bind address; loopback unless set.")
    port: int = Field(default=8000, ge=0, le=65535, description="Bind port; 0 lets the system choose.")
    uds: Path | None = Field(
        default=None,
        description="Unix-domain socket to listen on; with it, TCP only where a port is given as well.",
    )
    uds_mode: str = Field(
        default="600",
        pattern="^0?[0-7]{3}$",
        description="Permissions of the socket file, octal: whoever may write to it may connect.",
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="Worker processes; they share the port and the memory of the tables."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the tables; auto is cuda where there is one and one worker, else cpu."
    )
    redis: str | None = Field(
        default=None, description="URL of a Redis or Valkey server, or `embedded` to start a private one."
    )
    cache: Literal["off", "on", "auto"] = Field(
        default="auto",
        description="Row cache, in this process and in Redis where there is one; auto uses it for a table where that "
        "is measured to be faster than computing the rows.",
    )
    cache_bytes: int = Field(
        default=256 << 20, ge=1 << 16, description="Maximum memory of the row cache, bytes per table and process."
    )
    redis_timeout_ms: int = Field(default=5, ge=1, le=1000, description="Redis operation timeout, milliseconds.")
    cache_ttl_seconds: int = Field(default=3600, ge=1, description="Time to live of a row in Redis, seconds.")
    poll_seconds: float = Field(default=1.0, gt=0, le=3600, description="Store polling interval, seconds.")
    keep_versions: int = Field(default=2, ge=1, le=100, description="Number of recent versions kept loaded per table.")
    max_ids: int = Field(default=65_536, ge=1, description="Maximum ids per request, summed over tables.")
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Maximum size of a request body, bytes.")
    max_reply_bytes: int = Field(
        default=64 << 20, ge=1024, description="Maximum size of the vectors of a reply, bytes, counted as float32."
    )
    max_shared_memory_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Maximum size of the shared memory that clients on this host register, bytes; 0 disables it.",
    )
    inline_ids: int = Field(
        default=8_192,
        ge=0,
        description="Maximum ids looked up on the event loop, where that takes under a millisecond; more go to a "
        "thread.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of a large lookup; unless set, the cores divided by the workers.",
    )
    batching: Literal["off", "on", "auto"] = Field(
        default="auto",
        description="Dynamic batching of concurrent lookups; auto: on a GPU, where measured to be faster.",
    )
    batching_max_delay_us: int = Field(
        default=0, ge=0, le=10_000, description="Maximum queue delay for batching, microseconds."
    )
    max_queued_requests: int = Field(
        default=1_024, ge=1, description="Maximum queued requests; beyond it requests get 429."
    )
    max_concurrency: int = Field(
        default=64, ge=1, description="Maximum concurrent lookups in threads, on the device and with Redis."
    )
    max_waiting_bytes: int = Field(
        default=256 << 20, ge=1 << 20, description="Maximum size of requests that are arriving or queued, bytes."
    )
    max_connections: int = Field(
        default=8_192, ge=1, description="Maximum open connections; beyond it connections are closed at once."
    )
    request_seconds: float = Field(default=10.0, gt=0, description="Read and write timeout per request, seconds.")
    api_keys_file: Path | None = Field(
        default=None, description="File of API keys, one per line; lookups then require one."
    )
    admin_keys_file: Path | None = Field(
        default=None,
        description="File of API keys for calls that change what is served; unless set, those work on loopback only.",
    )
    keepalive_seconds: int = Field(default=75, ge=1, description="Keep-alive timeout of an idle connection, seconds.")
    drain_seconds: float = Field(
        default=1.0, ge=0, description="Time between failing readiness and closing the listener on SIGTERM, seconds."
    )
    shutdown_seconds: int = Field(
        default=20, ge=1, description="Maximum time for requests in flight at shutdown, seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Minimum log level.")

    @property
    def uses_tcp(self) -> bool:
        """Whether to listen on host and port: a socket file alone is enough, unless a port was asked for."""
        return self.uds is None or "port" in self.model_fields_set

    @field_validator("redis")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        """`embedded`, or a URL that redis-py takes."""
        if value not in (None, EMBEDDED) and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"must be {EMBEDDED!r} or a URL that begins with redis://, rediss:// or unix://")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file."""
        path = os.environ.get(CONFIG)
        if not path:
            return init_settings, env_settings
        try:
            with open(path, "rb"):  # the source takes a file that is not there for an empty one
                return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings file {path}: {getattr(error, 'strerror', None) or error}") from error


def read_settings(**flags: Any) -> Settings:
    """Settings of flags (None: not given), environment and file; ConfigError names each wrong one."""
    _check_environment()
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(f"settings: {'; '.join(_wrong(**fault) for fault in error.errors())}") from error


def _check_environment() -> None:
    """ConfigError for a variable that is almost a setting; one that is like none of them is somebody else's."""
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(PREFIX).lower()
        if not variable.upper().startswith(PREFIX) or name in Settings.model_fields:
            continue
        if near := get_close_matches(name, Settings.model_fields, 1, MISSPELT):
            raise ConfigError(f"settings: there is no setting {variable}; did you mean {PREFIX}{near[0].upper()}?")


def _wrong(*, type: str, loc: tuple[str | int, ...], msg: str, input: Any = None, **_: Any) -> str:
    """What is wrong with one setting."""
    name = ".".join(map(str, loc))
    if type != "extra_forbidden":
        return f"{name}: {msg.lower()} (got {input!r})"
    near = get_close_matches(name, Settings.model_fields, 1)
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def redacted(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, with passwords in URLs hidden."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    if settings.redis and settings.redis != EMBEDDED:
        url = urlsplit(settings.redis)
        values["redis"] = f"{url.scheme}://{url.hostname or ''}{f':{url.port}' if url.port else ''}"
    return values
