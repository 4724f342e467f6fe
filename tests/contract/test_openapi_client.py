"""The OpenAPI document is enough for a standard generator: its client has good names and types, and gets exact rows."""

# Shapes: B ids, D embedding_dim.

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.hostile import DIM, NUM, TABLE_VD, WIDE, guarded
from support.serving import ServerProcess

pytestmark = pytest.mark.skipif(
    find_spec("openapi_python_client") is None, reason="openapi-python-client is not installed"
)

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"
PACKAGE = "embstore_api_client"
CALLS = {
    "admin": {"move_label"},
    "lookup": {"lookup", "lookup_version", "lookup_label", "lookup_many", "lookup_release"},
    "open_inference": {
        *("infer", "infer_version", "list_repository", "load_model", "unload_model"),
        *("server_live", "server_ready", "show_server"),
        *("list_regions", "show_region", "register_region", "unregister_region", "unregister_all_regions"),
        *(f"show_{what}{of}" for what in ("model", "ready", "config") for of in ("", "_version")),
    },
    "operations": {"livez", "readyz", "startupz", "show_metrics"},
    "tables": {"list_tables", "show_table", "list_versions"},
}
PROGRAM = f"""
from {PACKAGE} import Client
from {PACKAGE}.api.lookup import lookup, lookup_many, lookup_version
from {PACKAGE}.api.tables import list_tables
from {PACKAGE}.models import Dtype, Lookup, LookupReply, ManyLookup, ManyLookupTables, OnMissing, Problem, ProblemCode


def vectors(client: Client, ids: list[int | str]) -> list[list[float]]:
    reply = lookup.sync("item", client=client, body=Lookup(ids=ids, on_missing=OnMissing.ERROR, dtype=Dtype.FLOAT16))
    if isinstance(reply, Problem):
        raise KeyError(reply.detail if reply.code == ProblemCode.ID_OUT_OF_RANGE else reply.title)
    if reply is None:
        raise RuntimeError("a status that the document does not have")
    return reply.vectors


def release(client: Client, ids: list[int | str]) -> str | None:
    tables = ManyLookupTables.from_dict({{"item": Lookup(ids=ids).to_dict()}})
    reply = lookup_many.sync(client=client, body=ManyLookup(tables=tables))
    assert reply is not None and not isinstance(reply, Problem)
    item: LookupReply = reply.tables["item"]
    assert isinstance(lookup_version.sync("item", item.version, client=client, body=Lookup(ids)), LookupReply)
    return reply.release


def names(client: Client) -> list[str]:
    reply = list_tables.sync(client=client)
    return [] if reply is None or isinstance(reply, Problem) else [table.table for table in reply.tables]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of two tables, published together."""
    with guarded(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.fixture(scope="module")
def generated(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project of a client generated from the server's own document, which can be imported."""
    folder = tmp_path_factory.mktemp("generated") / "project"
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--url", f"{server.url}/openapi.json"]
    command += ["--fail-on-warning", "--output-path", str(folder)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it formats its code with ruff
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PATH": path}, timeout=60, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert "warning" not in said.lower(), said
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def client(server: ServerProcess, generated: Path) -> Iterator[Any]:
    """The generated client, connected."""
    with import_module(PACKAGE).Client(base_url=server.url) as connected:
        yield connected


def call(path: str) -> Any:
    """A generated module with one call."""
    return import_module(f"{PACKAGE}.api.{path}")


def models() -> Any:
    """The generated classes."""
    return import_module(f"{PACKAGE}.models")


def test_every_call_has_the_name_of_what_it_does(generated: Path) -> None:
    """Modules are called as the calls are, with nothing of paths and methods in them."""
    found = {
        folder.name: {file.stem for file in folder.glob("*.py")} - {"__init__"}
        for folder in (generated / PACKAGE / "api").iterdir()
        if folder.is_dir()
    }
    found.pop("__pycache__", None)
    assert found == CALLS


def test_every_model_has_a_name_of_its_own(generated: Path) -> None:
    """No class is named after its place in the document, and none exists once for every call."""
    names = set(models().__all__)
    assert {"Lookup", "LookupReply", "ManyLookupReply", "Problem", "TableInFull", "InferRequest"} <= names
    assert {name for name in names if name.endswith(("OnMissing", "Dtype", "ProblemCode"))} == {
        *("OnMissing", "Dtype", "ProblemCode", "LookupReplyDtype"),
    }
    assert not [name for name in names if any(part in name for part in ("Item", "Type0", "Response", "Body", "V1"))]


def test_a_json_lookup_gets_rows(client: Any) -> None:
    """Rows, version and which were found, in typed fields; integers and decimal strings are ids."""
    reply = call("lookup.lookup").sync("item", client=client, body=models().Lookup(ids=[3, "7", NUM]))
    assert reply == models().LookupReply(
        table="item",
        version=1,
        embedding_dim=DIM,
        dtype=models().LookupReplyDtype.FLOAT32,
        vectors=[*TABLE_VD[[3, 7]].tolist(), [0.0] * DIM],
        found=[True, True, False],
    )


@pytest.mark.parametrize(("path", "key"), [("lookup_version", 1), ("lookup_label", "latest")])
def test_a_lookup_is_pinned_by_version_and_label(client: Any, path: str, key: int | str) -> None:
    """Bags of a version and of a label come as their sums."""
    pooling = models().LookupPooling.SUM
    body = models().Lookup(ids=[3, 7, 9], offsets=[0, 2], pooling=pooling)
    reply = call(f"lookup.{path}").sync("item", key, client=client, body=body)
    assert reply.vectors == [(TABLE_VD[3] + TABLE_VD[7]).tolist(), TABLE_VD[9].tolist()]


def test_binary_rows_are_the_content_of_a_generated_request(client: Any) -> None:
    """The generator knows one type of reply for a call: it builds the request of int64 ids, its content is read raw."""
    file = import_module(f"{PACKAGE}.types").File
    ids_B = np.array([3, NUM, 7], "<i8")
    request = call("lookup.lookup")._get_kwargs(
        "item", body=file(payload=io.BytesIO(ids_B.tobytes())), on_missing=models().OnMissing.ZERO
    )
    reply = client.get_httpx_client().request(**request)
    rows_BD = np.frombuffer(reply.content, "<f4", 3 * DIM).reshape(3, DIM)
    np.testing.assert_array_equal(rows_BD, [TABLE_VD[3], np.zeros(DIM), TABLE_VD[7]])
    assert reply.content[rows_BD.nbytes :] == bytes([0b101])


def test_a_lookup_of_many_tables_is_of_one_release(client: Any) -> None:
    """Every table's rows, and the release that all of them are from; the release can be asked for."""
    tables = models().ManyLookupTables()
    tables["item"], tables["wide"] = models().Lookup(ids=[1]), models().Lookup(ids=[5])
    body = models().ManyLookup(tables=tables)
    reply = call("lookup.lookup_many").sync(client=client, body=body)
    assert reply.release is not None
    assert reply.tables["item"].vectors == [TABLE_VD[1].tolist()]
    assert reply.tables["wide"].vectors == [[5.0] * WIDE]
    assert call("lookup.lookup_release").sync(reply.release, client=client, body=body) == reply


def test_tables_are_listed(client: Any) -> None:
    """What is served, with its numbers; one table in full, with labels and versions."""
    listed = call("tables.list_tables").sync(client=client)
    assert [(t.table, t.version, t.num_ids, t.embedding_dim) for t in listed.tables] == [
        ("item", 1, NUM, DIM),
        ("wide", 1, 16, WIDE),
    ]
    full = call("tables.show_table").sync("item", client=client)
    assert full.labels.to_dict() == {"latest": 1}
    assert [(v.version, v.state.value, v.reason) for v in full.versions] == [(1, "ready", None)]


def test_an_error_is_a_problem_with_a_code(client: Any) -> None:
    """404 is a typed problem: which table, which code, and the id of the request."""
    reply = call("lookup.lookup").sync_detailed(
        "nothing", client=client, body=models().Lookup(ids=[1]), x_request_id="me-1"
    )
    assert reply.status_code == 404
    problem = reply.parsed
    assert isinstance(problem, models().Problem)
    assert (problem.code, problem.status) == (models().ProblemCode.TABLE_NOT_FOUND, 404)
    assert (problem.table, problem.instance) == ("nothing", "me-1")


def test_a_label_is_moved(client: Any) -> None:
    """The admin call takes a version and says what is served afterwards; a version that is not there conflicts."""
    move = call("admin.move_label")
    moved = move.sync("item", "stable", client=client, body=models().LabelMove(version=1))
    assert moved == models().Label(table="item", label="stable", version=1, served=1)
    refused = move.sync("item", "stable", client=client, body=models().LabelMove(version=9))
    assert (refused.code.value, refused.version) == ("conflict", 9)


def test_open_inference_answers(client: Any) -> None:
    """Tensors by the Open Inference Protocol, and the model's metadata."""
    ids = models().InferInput(name="ids", shape=[2], datatype=models().InferInputDatatype.INT64, data=[3, 7])
    reply = call("open_inference.infer").sync("item", client=client, body=models().InferRequest(inputs=[ids]))
    embeddings = next(output for output in reply.outputs if output.name == "embeddings")
    assert (embeddings.shape, embeddings.data) == ([2, DIM], TABLE_VD[[3, 7]].ravel().tolist())
    about = call("open_inference.show_model_version").sync("item", 1, client=client)
    assert [tensor.name for tensor in about.inputs] == ["ids", "offsets", "weights"]


def test_the_cookbook_shows_this_client(server: ServerProcess, generated: Path) -> None:
    """The Python lines in docs/cookbook.md run as they are."""
    (lines,) = re.findall(r"^```py\n(.*?)^```$", COOKBOOK.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines.replace("http://localhost:8000", server.url), names)
    assert names["reply"].vectors == TABLE_VD[[3, 7]].tolist()


def test_lookups_go_async(client: Any) -> None:
    """Every call has an asynchronous form with the same reply."""
    body = models().Lookup(ids=[4])

    async def ask() -> Any:
        async with client:
            return await call("lookup.lookup").asyncio("item", client=client, body=body)

    assert asyncio.run(ask()).vectors == [TABLE_VD[4].tolist()]


def test_the_generated_client_is_typed(client: Any, generated: Path) -> None:
    """Strict mypy passes over the generated client and a program that uses it; the program does what it says."""
    (generated / "user_of_client.py").write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir=.mypy",
        "user_of_client.py",
        PACKAGE,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=generated, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    program = import_module("user_of_client")
    assert program.vectors(client, [3, "7"]) == TABLE_VD[[3, 7]].tolist()
    with pytest.raises(KeyError, match=str(NUM)):
        program.vectors(client, [NUM])
    assert program.release(client, [3]) is not None
    assert program.names(client) == ["item", "wide"]
