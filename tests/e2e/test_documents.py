"""What the pages tell a reader to type works: their commands and Python run against a server of the demo's tables.

A block that cannot run here is fenced as `no-test`, and a comment above it says why; a page that begins with such a
comment is not run at all. A block that names a file in its fence is written to that file. Blocks of one page run in
order, in one folder; Python of a page shares its names.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.documents import PAGES, ROOT, Block, blocks
from support.serving import ServerProcess, serving

import embstore
from embstore.cli import main
from embstore.train.demo import make_clicks, write_demo

ADDRESSES = ("127.0.0.1:8000", "localhost:8000")
OTHERS = {ROOT / "docs" / "cookbook.md", ROOT / "docs" / "open-inference.md"}
"""Pages about another store: test_cookbook.py runs them."""
RUNNABLE = {"sh", "python"}
SHOWN = {"toml", "json", "yaml", "mermaid", "text", "promql"}
NO_TEST = "<!-- no-test: "
EVERY = [
    block for page in PAGES if page not in OTHERS and not page.read_text().startswith(NO_TEST) for block in blocks(page)
]
TESTED = [page for page in PAGES if any(b.page == page and b.language in RUNNABLE and not b.note for b in EVERY)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make run` leaves it, with tables of the demo's ids that took no training."""
    folder = tmp_path_factory.mktemp("world")
    write_demo(folder / "demo")
    clicks, rng = make_clicks(0), np.random.default_rng(0)
    publications = {}
    for table, column in (("user", "user_id"), ("item", "item_id")):
        ids = clicks[column].unique(maintain_order=True).to_list()
        vectors = rng.normal(size=(len(ids), 32)).astype(np.float32)
        publications[table] = embstore.Publication(vectors, ids=ids, hot_ids=ids[:100])
    embstore.open_store(folder / "demo" / "store").publish_release(publications)
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[ServerProcess]:
    """A server of that folder's store."""
    with serving(world / "demo" / "store", world / "log") as running:
        yield running


@pytest.mark.parametrize("page", TESTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(
    page: Path, world: Path, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of the page runs."""
    shutil.copytree(world / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in [block for block in blocks(page) if block.note != "no-test"]:
        code = block.code
        for address in ADDRESSES:
            code = code.replace(address, server.url.removeprefix("http://"))
        if block.note:
            Path(block.note).write_text(block.code)
        elif block.language == "python":
            exec(compile(code, str(block), "exec"), names)
        elif block.language == "sh":
            _run(block, code, monkeypatch)


def _run(block: Block, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a block: `embstore` in this process, where its imports are made already, the rest by bash."""
    lines = code.replace("\\\n", " ").splitlines()
    if all(line.startswith("embstore ") for line in lines):
        for line in lines:
            monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, (str(block), line)
        return
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, (str(block), run.stdout, run.stderr)


def test_what_is_not_run_says_why() -> None:
    """Each block that is not run has its reason above it, and no language is left out by accident."""
    silent = [str(b) for b in EVERY if b.note == "no-test" and not b.before.startswith(NO_TEST)]
    assert silent == []
    assert {block.language for block in EVERY} <= RUNNABLE | SHOWN


def test_the_ids_of_the_examples_are_the_demos() -> None:
    """Who copies a lookup gets vectors: the users and items that pages name are among those that `make run` trains."""
    clicks = make_clicks(0)
    text = "".join(page.read_text() for page in PAGES if page not in OTHERS)
    users, items = set(re.findall(r"\b\d{19}\b", text)), set(re.findall(r"sku-[0-9a-f]{5}", text))
    assert users
    assert items
    assert users <= {str(user) for user in clicks["user_id"]}
    assert items <= set(clicks["item_id"])
