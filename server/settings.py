"""Every setting of the server: its name, default, limits and help. The server's only reader of the environment.

Precedence: command-line flag, then environment (`EMBSTORE_<NAME>`), then the TOML file that `EMBSTORE_CONFIG` names,
then the default here.
"""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from embstore.errors import ConfigError

PREFIX = "EMBSTORE_"
MISSPELT = 0.75
"""Likeness from which a variable is a setting misspelt: PROT is, VERSION (like keep_versions) and API_KEY are not."""
EMBEDDED = "embedded"
"""Value of `redis` for a private Valkey beside the server."""


class Settings(BaseSettings):
    """What a server process needs to know, fixed from its start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    store: Path = Field(default=Path("store"), description="Folder of the store that is served.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback unless you say otherwise.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    uds: Path | None = Field(
        default=None,
        description="File of a Unix-domain socket to listen on; then on TCP only where a port is given as well.",
    )
    uds_mode: str = Field(
        default="600",
        pattern="^0?[0-7]{3}$",
        description="Permissions of that file, octal: who may write, may connect.",
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="Processes that serve; they share the port and the tables' memory."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where tables live; auto is cuda where there is a device and one worker, else cpu."
    )
    redis: str | None = Field(
        default=None, description="URL of a Redis or Valkey, or `embedded` to start a private one beside the server."
    )
    cache: Literal["off", "on", "auto"] = Field(
        default="auto",
        description="Keep rows of hot ids ready, in this process and in Redis where there is one; auto measures "
        "for each table whether that is faster than computing them.",
    )
    cache_bytes: int = Field(
        default=256 << 20,
        ge=1 << 16,
        description="Most bytes of rows kept ready for one table in this process; taken at once where it pays.",
    )
    redis_timeout_ms: int = Field(default=5, ge=1, le=1000, description="Most time one Redis operation may take.")
    cache_ttl_seconds: int = Field(default=3600, ge=1, description="How long a row stays in Redis.")
    poll_seconds: float = Field(default=1.0, gt=0, le=3600, description="How often the store is looked at.")
    keep_versions: int = Field(default=2, ge=1, le=100, description="Newest versions of a table that stay loaded.")
    max_ids: int = Field(default=65_536, ge=1, description="Most ids in one request, over all its tables.")
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Most bytes in one request body.")
    max_reply_bytes: int = Field(
        default=64 << 20, ge=1024, description="Most bytes of float32 vectors in one reply, whatever type is sent."
    )
    inline_ids: int = Field(
        default=8_192, ge=0, description="Most ids looked up on the event loop, where that takes under a millisecond."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of a large lookup; the cores divided by the workers unless given.",
    )
    join: Literal["off", "on", "auto"] = Field(
        default="auto",
        description="Look up requests that come at the same time in one go; auto: on a GPU, where measured to pay.",
    )
    join_wait_us: int = Field(
        default=0, ge=0, le=10_000, description="How long a lookup waits for others to join it; 0 does not wait."
    )
    max_queue: int = Field(default=1_024, ge=1, description="Most requests that wait for their turn; more get 429.")
    max_concurrency: int = Field(
        default=64, ge=1, description="Most lookups going on at a time in threads, on the device and with Redis."
    )
    max_waiting_bytes: int = Field(
        default=256 << 20, ge=1 << 20, description="Most bytes of requests held while they arrive or wait."
    )
    max_connections: int = Field(default=8_192, ge=1, description="Most open connections; more are closed at once.")
    request_seconds: float = Field(
        default=10.0, gt=0, description="A request must arrive, and its reply be taken, within so many seconds."
    )
    api_keys_file: Path | None = Field(
        default=None, description="File of API keys, one a line; lookups then need one of them."
    )
    admin_keys_file: Path | None = Field(
        default=None,
        description="File of keys for calls that change what is served; without it those work on loopback only.",
    )
    keepalive_seconds: int = Field(default=75, ge=1, description="How long an idle connection is kept open.")
    drain_seconds: float = Field(
        default=1.0, ge=0, description="After SIGTERM, how long to go on serving while readiness already says no."
    )
    shutdown_seconds: int = Field(default=20, ge=1, description="How long requests in flight may take to end.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")

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
        return init_settings, env_settings, _TomlFile(settings_cls)


class _TomlFile(PydanticBaseSettingsSource):
    """The file that EMBSTORE_CONFIG names, if it does."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get("EMBSTORE_CONFIG")
        if not path:
            return {}
        try:
            return tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings file {path}: {error}") from error


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
