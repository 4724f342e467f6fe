"""Where labels point, and how the labels that a release moves are moved as one.

A release moves one label per table, one after the other, and whoever does it can die in between. So a label keeps the
positions it had before, and as long as a table of its release still carries an older one, it counts as not yet moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_HISTORY = 16


@dataclass(frozen=True)
class Label:
    """A version, the release it was moved with (None: alone), when, and the positions before it, last first."""

    version: int
    release: str | None
    moved: str
    history: tuple[tuple[int, str | None], ...] = ()

    def back(self) -> Label | None:
        """This label one position earlier; None at the first."""
        if not self.history:
            return None
        (version, release), *rest = self.history
        return Label(version, release, self.moved, tuple(rest))

    def to(self, version: int, release: str | None, moved: str) -> Label:
        """This label moved on; a position that it has already is not kept twice."""
        if (version, release) == (self.version, self.release):
            return Label(version, release, moved, self.history)
        return Label(version, release, moved, ((self.version, self.release), *self.history)[:MAX_HISTORY])

    def to_json(self) -> dict[str, Any]:
        """As the label's file has it."""
        history = [{"version": version, "release": release} for version, release in self.history]
        return {"version": self.version, "release": self.release, "moved": self.moved, "history": history}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Label:
        """The label in a file; ValueError, KeyError or TypeError when it is none."""
        history = tuple(_position(entry) for entry in raw.get("history", []))
        return cls(*_position(raw), str(raw["moved"]), history)


def in_effect(at: Label, peers: Iterable[Label | None]) -> Label | None:
    """Where a label counts as pointing, given the same label of every table of its release (None: it has none).

    A peer is behind when an older release moved it last, or somebody by hand before this release was.
    """
    if at.release is None:
        return at

    def behind(peer: Label | None) -> bool:
        if peer is None:
            return True
        if peer.release is None:
            return peer.moved < at.moved
        return int(peer.release) < int(at.release or 0)

    return at.back() if any(behind(peer) for peer in peers) else at


def positive(value: object) -> int:
    """`value` when it is a positive int; TypeError otherwise."""
    if type(value) is not int or value < 1:
        raise TypeError(f"{value!r} is not a positive int")
    return value


def _position(raw: Mapping[str, Any]) -> tuple[int, str | None]:
    release = raw["release"]
    return positive(raw["version"]), None if release is None else str(positive(int(release)))
