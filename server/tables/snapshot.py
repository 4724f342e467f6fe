"""What is served at one moment. A request reads it once; nothing in it ever changes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from embstore.errors import LabelNotFound, NotReady, ReleaseNotFound, TableNotFound, VersionNotFound
from embstore.store.local import LATEST, Release
from embstore.table import Table

Key = tuple[str, int]
State = Literal["loading", "ready", "failed"]


@dataclass(frozen=True)
class Status:
    """What became of a version, why, and whether that is the last word."""

    state: State
    reason: str = ""
    final: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What is served at one moment."""

    latest: Mapping[str, Table] = field(default_factory=dict)
    labels: Mapping[tuple[str, str], Table] = field(default_factory=dict)
    loaded: Mapping[Key, Table] = field(default_factory=dict)
    releases: Mapping[str, Mapping[str, Table]] = field(default_factory=dict)
    release_of: Mapping[Key, str] = field(default_factory=dict)
    unserved: Set[str] = frozenset()

    def table(self, name: str, *, version: int | None = None, label: str | None = None) -> Table:
        """A table by version, by label, or the latest; NotFound errors say what there is."""
        if version is None and label is None:
            found = self.latest.get(name)
        elif label is not None:
            found = self.labels.get((name, label))
        else:
            found = self.loaded.get((name, version or 0))
        if found is not None:
            return found
        if name in self.unserved and version is None and label in (None, LATEST):
            raise NotReady(f"no version of table {name!r} can be served", table=name)
        versions = sorted(v for n, v in self.loaded if n == name)
        if not versions:
            raise TableNotFound(name, "is being served")
        if version is not None:
            raise VersionNotFound(name, version, f" loaded; loaded are {', '.join(map(str, versions))}")
        labels = sorted(known for n, known in self.labels if n == name)
        raise LabelNotFound(name, LATEST if label is None else label, f"; it has {', '.join(labels) or 'none'}")

    def together(self, names: list[str], release: str | None) -> tuple[str | None, dict[str, Table]]:
        """Tables of one release, with its id: the one asked for, or the one now serving all of them.

        The id is None where the tables now serving were not published together.
        """
        if release is not None:
            tables = self.releases.get(release)
            if tables is None:
                raise ReleaseNotFound(release, f"; loaded are {', '.join(self.releases) or 'none'}")
            for name in names:
                if name not in tables:
                    raise TableNotFound(name, f"in release {release!r}")
            return release, {name: tables[name] for name in names}
        chosen = {name: self.table(name) for name in names}
        ids = {self.release_of.get((table.name, table.version)) for table in chosen.values()}
        return (ids.pop() if len(ids) == 1 else None), chosen


def snapshot_of(
    labels: dict[tuple[str, str], Table], loaded: dict[Key, Table], releases: Mapping[str, Release], unserved: Set[str]
) -> Snapshot:
    """What is served when labels mean these tables; a release is there when all of it is loaded."""
    complete = {
        release.id: {name: loaded[name, version] for name, version in release.tables.items()}
        for release in releases.values()
        if all(key in loaded for key in release.tables.items())
    }
    latest = {name: table for (name, label), table in labels.items() if label == LATEST}
    release_of = {
        (name, table.version): release_id
        for release_id, tables in complete.items()  # ascending: the newest release of a version wins
        for name, table in tables.items()
    }
    return Snapshot(latest, labels, loaded, complete, release_of, unserved)
