"""The benchmark of shared memory, small: every way gives the same vectors, over each kind of socket."""

from __future__ import annotations

import json

import pytest

from benchmarks.shared_memory import SIZES, main
from server.api.shared_objects import FOLDER

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")


def test_it_measures_each_way_over_each_socket(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each socket and number of ids, a rate for each way; no shared memory object is left behind."""
    before = set(FOLDER.glob("psm_*"))
    main(num=1_000, seconds=0.01, rounds=1, json=True)
    (rows,) = json.loads(capsys.readouterr().out)["tables"].values()
    assert [(row["over"], row["ids"]) for row in rows] == [(over, n) for over in ("tcp", "unix") for n in SIZES]
    for row in rows:
        for way in ("octet stream", "infer, binary", "infer, shared memory"):
            assert int(row[way].replace(",", "")) > 0
    assert set(FOLDER.glob("psm_*")) <= before
