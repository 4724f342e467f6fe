"""The OpenAPI document against the server itself: Schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.hostile import TABLE_VD, Wire, guarded, request, unharmed
from support.serving import ServerProcess

import embstore

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")

EXAMPLES, SEED = 12, 20260731
CONFIG = """
color = false
seed = {seed}
continue-on-failure = true
request-timeout = 10
suppress-health-check = ["all"]

[parameters]  # what random names would never find
"path.table" = "{table}"
"path.model" = "{table}"
"path.version" = 1
"path.label" = "latest"
"path.release" = "1"

[generation]
allow-extra-parameters = false  # a header nobody knows is nobody's mistake

[phases.stateful]
enabled = false

[checks]
positive_data_acceptance.enabled = false  # a document cannot say which strings are ids of a table
ignored_auth.enabled = false  # this server has no keys

[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 503, 504]

[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415, 422, 504]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of tables with integer ids, and one with strings."""
    folder = tmp_path_factory.mktemp("schemathesis")
    names = [f"sku-{row}" for row in range(len(TABLE_VD))]
    with guarded(folder) as running:
        embstore.open_store(folder / "store").publish("named", TABLE_VD, ids=names)
        running.wait_until(lambda: _status(running, "/v1/tables/named") == 200, "the table of strings")
        yield running


def _status(server: ServerProcess, path: str) -> int:
    with Wire(server) as wire:
        return wire.send(request("GET", path)).answer().status


@pytest.mark.parametrize("table", ["item", "named"])
def test_the_server_is_what_its_document_says(server: ServerProcess, tmp_path: Path, table: str) -> None:
    """No failure of ours; every status, content type, header and body is documented; what is forbidden is refused."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(seed=SEED, table=table))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{server.url}/openapi.json", "--max-examples", str(EXAMPLES), "--exclude-path-regex", "load$"]
    with unharmed(server, memory_mib=80):
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_the_document_names_every_call(server: ServerProcess) -> None:
    """Nothing that is answered is left out of the document, and no operation has the name of another."""
    import orjson

    with Wire(server) as wire:
        document = orjson.loads(wire.send(request("GET", "/openapi.json")).answer().body)
    one = "/v1/tables/{table}"
    lookups = {f"{one}/lookup", f"{one}/versions/{{version}}/lookup", f"{one}/labels/{{label}}/lookup"}
    many = {"/v1/lookup", "/v1/releases/{release}/lookup"}
    about = {"/v1/tables", one, f"{one}/versions", "/metrics", "/livez", "/readyz", "/startupz"}
    infer = {"/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"}
    assert lookups | many | about | infer <= set(document["paths"])
    names = [call["operationId"] for calls in document["paths"].values() for call in calls.values()]
    assert len(set(names)) == len(names)
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            assert not {"200", "204"}.isdisjoint(call["responses"]), (method, path)
