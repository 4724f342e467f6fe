"""Files of API keys, one on each line; blank lines and lines that begin with # are left out."""

from __future__ import annotations

from pathlib import Path

from embstore.errors import ConfigError


def read_api_keys(path: Path) -> list[str]:
    """The keys of a file, at least one; ConfigError when there is none, or one that no header can carry."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: no API key found; put one on each line")
    for key in keys:
        check_api_key(key, str(path))
    return keys


def check_api_key(key: str, source: str) -> None:
    """ConfigError unless a header can carry the key."""
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{source}: an API key must be printable ASCII characters")
