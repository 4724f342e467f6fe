"""Every setting of the service. Precedence: command-line flag, then environment (`RANKER_<NAME>`), then default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class SettingsError(Exception):
    """A setting is wrong; the message names it."""


class Settings(BaseSettings):
    """What the service needs to know, fixed from its start."""

    model_config = SettingsConfigDict(env_prefix="RANKER_", frozen=True)

    artifact: Path = Field(default=Path("demo/ranker"), description="Folder that `ranker train` wrote.")
    embeddings: str = Field(
        default="http://127.0.0.1:8000", description="URL of the embedding service; of several servers, with commas."
    )
    api_key: SecretStr | None = Field(default=None, description="Key of the embedding service, if it asks for one.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback unless you say otherwise.")
    port: int = Field(default=8100, ge=0, le=65535, description="Port to listen on; 0 lets the system choose.")
    deadline_ms: float = Field(
        default=50.0, gt=0, le=60_000, description="How long a ranking waits for its vectors; then it goes without."
    )
    probe_seconds: float = Field(
        default=1.0, gt=0, le=3600, description="How often the release is looked at, for readiness."
    )
    max_candidates: int = Field(default=500, ge=1, le=50_000, description="Most candidates in one request.")
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="Most bytes in one request body.")


def read_settings(**flags: Any) -> Settings:
    """Settings of flags (None: not given) and environment; SettingsError names each wrong one."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors())
        raise SettingsError(f"settings: {'; '.join(wrong)}") from error
