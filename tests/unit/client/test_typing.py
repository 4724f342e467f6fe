"""What a type checker sees of the client: an example passes `mypy --strict`, and mistakes in it do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = """
import asyncio
from collections.abc import Mapping

import numpy as np
from embstore_client import (
    AsyncEmbeddingClient, Bags, EmbeddingClient, EmbstoreError, Hedge, NearCache, Observer, Overloaded, Retries, Rows,
)


class Trace(Observer):
    def headers(self) -> Mapping[str, str]:
        return {"traceparent": "00-1"}

    def retry(self, *, address: str, wait_s: float, reason: str) -> None:
        print(address, wait_s, reason)


def vectors(client: EmbeddingClient) -> Rows | None:
    try:
        many = client.lookup_many({"user": [1], "item": Bags(np.arange(3), [0, 2], "mean")}, release="12")
        print(many.release, many["user"].found.all())
        client.lookup("item", ["a", "b"], label="stable", dtype="float16")
        return client.lookup("item", np.arange(3), version=7, offsets=[0, 2], pooling="sum", weights=[0.5, 1.0, 1.0])
    except Overloaded as error:
        print(error.retry_after_s)
    except EmbstoreError:
        pass
    return None


async def main() -> None:
    async with AsyncEmbeddingClient(["http://a", "http://b"], hedge=Hedge(percentile=99), near_cache=1 << 20) as client:
        rows = await client.lookup("item", [1, 2])
        print(rows.vectors.shape, rows.version + 1, await client.ready(), await client.tables())


with EmbeddingClient(retries=Retries(max_attempts=5), near_cache=NearCache(1 << 20), observer=Trace()) as client:
    vectors(client)
asyncio.run(main())
"""
MISTAKES = """
from embstore_client import EmbeddingClient

client = EmbeddingClient(retries=3)
rows = client.lookup("item", [1.5])
rows.versions
"""


@pytest.fixture(scope="module")
def mypy_says(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says about both files, checked in one run."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "example.py").write_text(EXAMPLE)
    (folder / "mistakes.py").write_text(MISTAKES)
    root = Path(__file__).parents[3]
    # The project's own settings and cache: where types were checked before, numpy need not be read again.
    settings = ["--strict", "--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings]
    done = subprocess.run(
        [*command, "example.py", "mistakes.py"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert not done.stderr
    return done.stdout.splitlines()


def test_an_example_passes_strictly(mypy_says: list[str]) -> None:
    """A program that uses every feature needs no cast and no ignore."""
    assert [line for line in mypy_says if "mistakes.py" not in line] == [
        "Found 3 errors in 1 file (checked 2 source files)"
    ]


def test_mistakes_are_found(mypy_says: list[str]) -> None:
    """Wrong settings, wrong ids and a wrong attribute are reported where they are."""
    assert [line.partition(": error:")[0] for line in mypy_says if ": error:" in line] == [
        "mistakes.py:4",
        "mistakes.py:5",
        "mistakes.py:6",
    ]
