"""The manifest file: a format that cannot drift, and a reader that takes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embstore.errors import VerificationFailed
from embstore.store.manifest import FORMAT_VERSION, FileEntry, Golden, Manifest

pytestmark = pytest.mark.slow

EXAMPLE = Manifest(
    table="item",
    version=3,
    scheme="memcom",
    parameters={"bias": False, "num_buckets": 50},
    num_embeddings=1000,
    embedding_dim=16,
    dtype="float32",
    id_space="string",
    num_ids=2,
    files=[FileEntry(name="arrays.safetensors", num_bytes=640, sha256="ab" * 32)],
    golden=Golden(ids=["a", "\u00e9\u4e16"], sha256="cd" * 32),
    created="2026-07-31T12:00:00.000+00:00",
    hot_ids=["a"],
    parent=2,
    metrics={"auc": 0.75},
)
FORMAT_1 = b"""{
 "created": "2026-07-31T12:00:00.000+00:00",
 "dtype": "float32",
 "embedding_dim": 16,
 "files": [
  {
   "name": "arrays.safetensors",
   "num_bytes": 640,
   "sha256": "%s"
  }
 ],
 "format_version": 1,
 "golden": {
  "ids": [
   "a",
   "\\u00e9\\u4e16"
  ],
  "sha256": "%s"
 },
 "hot_ids": [
  "a"
 ],
 "id_space": "string",
 "metrics": {
  "auc": 0.75
 },
 "num_embeddings": 1000,
 "num_ids": 2,
 "parameters": {
  "bias": false,
  "num_buckets": 50
 },
 "parent": 2,
 "scheme": "memcom",
 "table": "item",
 "version": 3
}
""" % (b"ab" * 32, b"cd" * 32)
REQUIRED = sorted(set(json.loads(FORMAT_1)) - {"hot_ids", "parent", "metrics"})


def refused(data: bytes, *says: str) -> None:
    """`data` is no manifest, and the one line that says so names the source and `says`."""
    with pytest.raises(VerificationFailed) as raised:
        Manifest.from_json(data, "table 'item' version 3")
    message = str(raised.value)
    for part in ("table 'item' version 3: not a valid manifest", *says):
        assert part in message
    assert "\n" not in message


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The example with one change."""
    raw = json.loads(FORMAT_1)
    change(raw)
    return json.dumps(raw).encode()


def test_format_1_is_written_as_ever() -> None:
    """The same manifest is the same bytes in every release."""
    assert EXAMPLE.to_json() == FORMAT_1


def test_format_1_stays_readable() -> None:
    """A manifest written by the first release means today what it meant then."""
    assert Manifest.from_json(FORMAT_1, "") == EXAMPLE
    assert FORMAT_VERSION == 1


def test_the_bytes_of_a_version_are_those_of_its_files() -> None:
    """`num_bytes` is the sum over files."""
    files = [FileEntry(name=name, num_bytes=size, sha256="") for name, size in (("a", 3), ("b", 40))]
    assert replace(EXAMPLE, files=files).num_bytes == 43


def test_hot_ids_parent_and_metrics_may_be_left_out() -> None:
    """What a writer need not know has a default."""
    read = Manifest.from_json(changed(lambda raw: [raw.pop(name) for name in ("hot_ids", "parent", "metrics")]), "")
    assert (read.hot_ids, read.parent, read.metrics) == ([], None, {})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_named(name: str) -> None:
    """Every other key must be there."""
    refused(changed(lambda raw: raw.pop(name)), name)


@pytest.mark.parametrize("name", [*REQUIRED, "hot_ids", "metrics", "parent"])
@pytest.mark.parametrize("value", [1.5, True, -1, [[]], {"a": {}}], ids=repr)
def test_a_value_of_the_wrong_kind_is_refused(name: str, value: Any) -> None:
    """No key takes a fraction, a truth value, a negative number, a list of lists, or an object it does not know."""
    if (name, value) not in [("parameters", {"a": {}}), ("metrics", {"a": {}})]:
        refused(changed(lambda raw: raw.update({name: value})))


@pytest.mark.parametrize(
    ("part", "name"),
    [("files", "name"), ("files", "num_bytes"), ("files", "sha256"), ("golden", "ids"), ("golden", "sha256")],
)
@pytest.mark.parametrize("value", [None, 1.5, True, [[]], {"a": 1}], ids=repr)
def test_the_parts_are_checked_too(part: str, name: str, value: Any) -> None:
    """Names, sizes, digests and golden ids are what they should be."""
    refused(changed(lambda raw: (raw[part] if part == "golden" else raw[part][0]).update({name: value})))


@pytest.mark.parametrize("part", ["files", "golden"])
def test_the_parts_are_complete(part: str) -> None:
    """Nothing is missing from them, and nothing added."""
    refused(changed(lambda raw: (raw[part] if part == "golden" else raw[part][0]).pop("sha256")), "sha256")
    refused(changed(lambda raw: (raw[part] if part == "golden" else raw[part][0]).update(more=1)), "more")


@pytest.mark.parametrize("keys", [[1, "a"], [1.0], [True], [None], [[1]], "abc", {"a": 1}], ids=repr)
def test_keys_are_integers_or_strings(keys: Any) -> None:
    """Golden ids and hot ids are lists of one kind of key."""
    refused(changed(lambda raw: raw["golden"].update(ids=keys)))
    refused(changed(lambda raw: raw.update(hot_ids=keys)))


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a b", "a\n", "\ud800", "\u00e9"]
)
def test_a_file_name_cannot_leave_the_folder(name: str) -> None:
    """A file is named by plain letters, digits, '_', '.' and '-', in the version's own folder."""
    refused(changed(lambda raw: raw["files"][0].update(name=name)), "leaves the version's folder")


@pytest.mark.parametrize("version", [0, 2, 99, None, "1", True, 1.0])
def test_another_format_is_named(version: Any) -> None:
    """A manifest of a later release says that it is one."""
    refused(changed(lambda raw: raw.update(format_version=version)), f"format version {version!r}", "reads up to 1")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"\0" * 100, FORMAT_1[:-10], b"[" * 100_000, b'{"a":' * 100_000],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_not_a_manifest_at_all_is_refused(data: bytes) -> None:
    """Broken JSON, other JSON, no JSON: one line, whatever it is."""
    refused(data)


@given(st.binary(max_size=200))
def test_no_bytes_can_crash_the_reader(data: bytes) -> None:
    """Anything but a manifest is refused."""
    refused(data)


@given(
    st.sampled_from(sorted(json.loads(FORMAT_1))),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
)
def test_no_value_can_crash_the_reader(name: str, value: Any) -> None:
    """Whatever a key holds, the manifest is refused, or read as it stands."""
    data = changed(lambda raw: raw.update({name: value}))
    with suppress(VerificationFailed):
        read = Manifest.from_json(data, "here")
        assert name in ("metrics", "parameters") or getattr(read, name) == json.loads(data)[name]
