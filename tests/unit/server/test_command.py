"""`embstore serve` and `embstore config`: settings from flags, environment and file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import VECTORS, Here
from support.serving import serving

from embstore.publish.store import open_store

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("made", "reason"), [(False, "there is no such folder"), (True, "the store has no tables yet")]
)
def test_serving_nothing_is_said_once(tmp_path: Path, made: bool, reason: str) -> None:
    """The log names the path that is waited for; what is published there later is served."""
    root = tmp_path / "store"
    if made:
        root.mkdir()
    with serving(root, tmp_path / "log", ready=False) as server:
        (said,) = (event for event in server.events() if event["event"].startswith("nothing to serve yet"))
        assert (said["level"], said["store"], said["reason"]) == ("warning", str(root), reason)
        open_store(root).publish("item", VECTORS)
        server.wait_ready()
        assert server.stop() == 0
        events = [event["event"] for event in server.events()]
    assert events.count("nothing to serve yet: waiting for tables") == 1
    with serving(root, tmp_path / "again") as server:
        assert not any(event["event"].startswith("nothing to serve") for event in server.events())


def test_config_shows_settings_by_precedence(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config` shows settings of the environment before the file before the default, and no password."""
    (tmp_path / "server.toml").write_text('port = 1111\nmax_ids = 77\nredis = "redis://me:secret@cache:6379/0"\n')
    monkeypatch.setenv("EMBSTORE_CONFIG", str(tmp_path / "server.toml"))
    monkeypatch.setenv("EMBSTORE_PORT", "2222")
    settings = here.json("config")
    assert (settings["port"], settings["max_ids"], settings["host"]) == (2222, 77, "127.0.0.1")
    code, out, err = here("config")
    assert (code, err) == (0, "")
    assert "2222" in out
    for shown in (out, json.dumps(settings)):
        assert "secret" not in shown
        assert "cache:6379" in shown


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EMBSTORE_PORTT", "PORT"),
        ("EMBSTORE_PROT", "PORT"),
        ("embstore_max_id", "MAX_IDS"),
        ("EMBSTORE_STOER", "STORE"),
        ("EMBSTORE_API_KEY_FILE", "API_KEYS_FILE"),
    ],
)
def test_a_misspelt_variable_is_a_usage_error(
    here: Here, monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    """A setting that would have been ignored is named, with the one that was meant, before anything is served."""
    monkeypatch.setenv(variable, "1")
    says = f"settings: there is no setting {variable}; did you mean EMBSTORE_{meant}?"
    assert here.fails(2, "config") == says
    assert here.fails(2, "serve", "--port", "0") == says


def test_other_variables_are_left_alone(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs read, and what an orchestrator sets for a service of our name, is no setting misspelt."""
    names = ("DATA", "API_KEY", "TEST_EXEC", "TEST_PORT", "VERSION", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP")
    for name in names:
        monkeypatch.setenv(f"EMBSTORE_{name}", "1")
    monkeypatch.setenv("embstore_port", "2222")
    monkeypatch.setenv("PROT", "1")
    assert here.json("config")["port"] == 2222


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "prot = 1", "\udcff"])
def test_a_bad_settings_file_is_a_usage_error(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A file that is no TOML, or names what is no setting, is told in one line."""
    (tmp_path / "server.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("EMBSTORE_CONFIG", str(tmp_path / "server.toml"))
    assert here.fails(2, "config").startswith("settings")
