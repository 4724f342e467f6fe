"""`embstore publish`, `list`, `inspect` and `promote`: what they print for people and for programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.command_line import DIM, ROWS, VECTORS, Here

from embstore.publish.store import Store


def test_publish_says_what_it_did(here: Here, root: Path, file: Path) -> None:
    """`publish` prints the version's number, and the label that moved, if one did."""
    publish = ("publish", "item", file, "--store", root)
    dims = {"embedding_dim": DIM, "embedding_dim_before": DIM}
    unmoved = dims | {"embedding_dim_before": None}
    assert here.json(*publish) == {"table": "item", "version": 3, "label": "latest"} | dims
    assert here.json(*publish, "--no-promote") == {"table": "item", "version": 4, "label": None} | unmoved
    assert here.json(*publish, "--label", "canary") == {"table": "item", "version": 5, "label": "canary"} | unmoved
    assert here(*publish, "--no-promote") == (0, "published item version 6\n", "")
    assert {name: at.version for name, at in Store(root).labels("item").items()} == {"latest": 3, "canary": 5}


def test_publish_says_that_vectors_have_another_length(here: Here, root: Path, tmp_path: Path) -> None:
    """Vectors of another length are published, and the line names both lengths, before and after."""
    np.save(tmp_path / "short.npy", VECTORS[:, :3])
    line = ("publish", "item", tmp_path / "short.npy", "--store", root)
    said = "published item version 3, label latest moved to it, embedding_dim 4 -> 3\n"
    assert here(*line) == (0, said, "")
    assert here(*line) == (0, "published item version 4, label latest moved to it\n", "")
    assert here(*line, "--label", "new") == (0, "published item version 5, label new moved to it\n", "")


def test_ids_of_another_type_are_published_on_request(here: Here, root: Path, file: Path) -> None:
    """A label that serves strings does not move to integers unless asked to; nothing else is in the way."""
    line = ("publish", "word", file, "--store", root)
    said = here.fails(5, *line)
    assert "whose ids are strings, and those of the new one are integers" in said
    assert "--new-id-type" in said
    assert (Store(root).versions("word"), Store(root).resolve("word")) == ([1], 1)
    assert here(*line, "--no-promote") == (0, "published word version 2\n", "")
    assert here(*line, "--new-id-type") == (0, "published word version 3, label latest moved to it\n", "")


def test_a_bad_file_changes_nothing(here: Here, root: Path, tmp_path: Path) -> None:
    """NaN is a failed verification, rubbish a failure; no version comes of either."""
    np.save(tmp_path / "nan.npy", np.full((3, 2), np.nan))
    assert "NaN or infinity" in here.fails(3, "publish", "item", tmp_path / "nan.npy", "--store", root)
    for suffix in (".npy", ".parquet", ".safetensors", ".txt"):
        (tmp_path / f"bad{suffix}").write_text("rubbish\non two lines")
        assert f"bad{suffix}: " in here.fails(1, "publish", "item", tmp_path / f"bad{suffix}", "--store", root)
    assert Store(root).versions("item") == [1, 2]


def test_a_list_fits_a_narrow_terminal(here: Here, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment stays in one line of 80 columns, beside millions of ids and hundreds of megabytes."""
    manifest = root / "tables/item/versions/2/manifest.json"
    raw = json.loads(manifest.read_bytes()) | {"created": "2026-07-31T10:11:12.345+00:00", "num_ids": 12_345_678}
    raw["files"][0]["num_bytes"] = 987_654_321
    manifest.write_text(json.dumps(raw))
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = here("list", "--store", root)
    assert (code, out.count("2026-07-31 10:11 ")) == (0, 1)
    (line,) = (line for line in out.splitlines() if "2026-07-31" in line)
    for part in ("item", "memcom", "latest", "12,345,678", "987,654,321"):
        assert part in line


def test_list_shows_every_version_and_release(here: Here, root: Path) -> None:
    """For programs every version with its labels and sizes; for people a table; a bad one with its reason in both."""
    (root / "tables/item/versions/1/manifest.json").write_text('{"format_version": "[/red]"}')
    listed = here.json("list", "--store", root)
    bad, item, word = listed["versions"]
    assert set(bad) == {"table", "version", "error"}
    assert "format version '[/red]'" in bad["error"]
    assert (item["table"], item["version"], item["labels"], item["scheme"]) == ("item", 2, ["latest"], "memcom")
    assert (word["table"], word["ids"], word["dim"]) == ("word", ROWS, DIM)
    files = root / "tables/word/versions/1/arrays.safetensors"
    assert word["num_bytes"] == files.stat().st_size
    assert [(r["release"], r["tables"]) for r in listed["releases"]] == [("1", {"item": 2, "word": 1})]
    code, out, err = here("list", "--store", root)
    assert (code, err) == (0, "")
    for part in ("memcom", "latest", "item 2, word 1", "[/red]"):
        assert part in out


def test_an_empty_store_lists_nothing(here: Here, tmp_path: Path) -> None:
    """A store nobody published to is empty, not an error, and is not created by looking; where it was is said."""
    no = tmp_path / "no"
    missing = f"there is no store {no}: no such folder; --store or EMBSTORE_STORE names another"
    assert here("list", "--store", no) == (0, f"{missing}\n", "")
    assert here.json("list", "--store", no) == {"versions": [], "releases": []}
    for arguments in (["inspect", "item"], ["promote", "item", "1"], ["lookup", "item", "1"]):
        assert here.fails(4, *arguments, "--store", no) == missing
    assert not no.exists()
    no.mkdir()
    assert here("list", "--store", no) == (0, f"no tables in the store {no}\n", "")
    assert here.fails(4, "inspect", "item", "--store", no) == f"no table named 'item' in the store {no}; it has none"


@pytest.mark.parametrize("arguments", [["list"], ["inspect", "item"], ["publish", "item", "FILE"]], ids=" ".join)
def test_a_store_that_cannot_be_is_a_failure(here: Here, file: Path, arguments: list[str]) -> None:
    """A store below a file is refused in one line."""
    said = here.fails(1, *(file if part == "FILE" else part for part in arguments), "--store", file / "store")
    assert said.endswith("failed: Not a directory")


def test_inspect_tells_all(here: Here, root: Path) -> None:
    """Scheme, sizes, ratio, digests, metrics of a version, named by number or label; every byte was verified."""
    about = here.json("inspect", "item", "--store", root)
    assert (about["version"], about["scheme"], about["parameters"]["num_buckets"]) == (2, "memcom", 5)
    assert (about["full_bytes"], about["scheme_bytes"]) == (4 * ROWS * DIM, 4 * 5 * DIM + 4 * ROWS)
    assert about["ratio"] == round(about["full_bytes"] / about["scheme_bytes"], 2)
    assert about["metrics"] == {"auc": 0.75}
    assert about["verified"] is True
    assert here.json("inspect", "item", "--store", root, "--version", "1")["scheme"] == "full"
    code, out, err = here("inspect", "item", "--store", root, "--version", "latest")
    assert (code, err) == (0, "")
    for part in ("memcom", "num_buckets=5", "auc=0.75"):
        assert part in out


def test_promote_moves_a_label_to_what_it_verified(here: Here, root: Path) -> None:
    """`promote` takes a number or another label; a version that does not verify keeps the label where it was."""
    store = Store(root)
    promote = ("promote", "item", "--store", root)
    assert here.json(*promote, "1") == {"table": "item", "label": "latest", "version": 1}
    assert here(*promote, "2", "--label", "stable") == (0, "label stable of item points at version 2\n", "")
    assert here.json(*promote, "stable")["version"] == store.resolve("item") == 2
    os.truncate(root / "tables/item/versions/1/arrays.safetensors", 100)
    assert "version 1: arrays.safetensors has 100 bytes" in here.fails(3, *promote, "1")
    assert here.fails(4, *promote, "9") == "table 'item' has no version 9; it has 1, 2"
    assert here.fails(4, *promote, "gold") == "table 'item' has no label 'gold'; it has latest, stable"
    assert "a label cannot be a number" in here.fails(2, *promote, "2", "--label", "7")
    assert {name: at.version for name, at in store.labels("item").items()} == {"latest": 2, "stable": 2}
