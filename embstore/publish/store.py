"""A store that speaks of modules and tables: `publish` makes versions of them, `load` makes them tables again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from embstore.errors import ConfigError, Conflict
from embstore.ids import StringVocabulary
from embstore.parallel import num_cores
from embstore.publish.publication import Publication
from embstore.publish.stage import stage
from embstore.store.local import LATEST, FileStore, Release, StoredVersion, check_label
from embstore.table import Table, check_finite, check_golden, described, make_table
from embstore.vectors import read_vectors


class Store(FileStore):
    """A folder of tables: `publish` and `load`, beside what FileStore reads and writes."""

    def publish(self, table: str, source: Any, *, label: str | None = LATEST, **options: Any) -> int:
        """Publish one version of one table and point `label` at it; returns its number.

        `source` and `options` are the fields of Publication; a path is read as a file of vectors. Raises
        VerificationFailed on NaN or infinity, DataError or ConfigError on what cannot be a table, Conflict when the
        label points at ids of another type, StoreError when the disk refuses. After an error no label has moved; a disk
        that fails while the label is moved, the last step, leaves a complete version without one.
        """
        if isinstance(source, str | os.PathLike):
            source, ids = read_vectors(Path(source))
            options = {"ids": ids, **options}
        if label is not None:
            check_label(label)
        publication = Publication(source, **options)
        with stage(self, table, publication) as staged, self.turn():
            if label is not None and not publication.new_id_type:
                self.check_id_type(table, label, staged.draft.id_space)
            version = staged.commit()
            if label is not None:
                self.set_label(table, label, version)
        return version

    def publish_release(self, tables: Mapping[str, Publication], *, label: str | None = LATEST) -> Release:
        """Publish several tables that belong together, as one release, and point `label` of each at its version.

        Everything is written and checked before the first version becomes visible.
        """
        if not tables:
            raise ConfigError("a release needs at least one table")
        if label is not None:
            check_label(label)
        with ExitStack() as stack:
            staged = {name: stack.enter_context(stage(self, name, tables[name])) for name in tables}
            stack.enter_context(self.turn())
            for name, publication in tables.items():
                if label is not None and not publication.new_id_type:
                    self.check_id_type(name, label, staged[name].draft.id_space)
            versions = {name: version.commit() for name, version in staged.items()}
            release = self.write_release(versions)
            if label is not None:
                for name, version in versions.items():
                    self.set_label(name, label, version, release=release.id)
        return release

    def check_id_type(self, table: str, label: str, id_space: str) -> None:
        """Conflict when `label` points at string ids and this kind of id space has integers, or the other way round."""
        before = self.labelled(table, label)
        if before is None or (before.id_space == StringVocabulary.kind) == (id_space == StringVocabulary.kind):
            return
        old, new = ("strings", "integers") if before.id_space == StringVocabulary.kind else ("integers", "strings")
        raise Conflict(
            f"table {table!r}: label {label!r} points at version {before.version}, whose ids are {old}, and those of "
            f"the new one are {new}: requests would fail; new_id_type (--new-id-type) moves the label all the same, "
            "label=None (--no-promote) leaves it where it is"
        )

    def load(
        self,
        table: str,
        version: int | str = LATEST,
        *,
        device: str = "cpu",
        verify: bool = True,
        num_threads: int | None = None,
    ) -> Table:
        """A table ready for lookups, by version number or label; VerificationFailed when it cannot be trusted.

        Verifying reads every byte once: digests, NaN and infinity, and the golden ids' vectors on this device.
        num_threads: how many threads share a large lookup; None: as many as this process has cores.
        """
        threads = num_cores() if num_threads is None else num_threads
        stored = self.read_version(table, self.resolve(table, version), verify=verify)
        if verify:
            return self.verified_table(stored, device=device, num_threads=threads)
        return make_table(stored.manifest, stored.arrays, device, threads)

    @staticmethod
    def verified_table(stored: StoredVersion, *, device: str = "cpu", num_threads: int = 1) -> Table:
        """The table of a version whose digests were checked, once its numbers and golden ids are checked too."""
        manifest = stored.manifest
        check_finite(stored.arrays, f"table {manifest.table!r} version {manifest.version}", described(manifest)[2])
        table = make_table(manifest, stored.arrays, device, num_threads)
        check_golden(table)
        return table


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store at a path; it need not exist yet, the first publish creates it."""
    return Store(path)
