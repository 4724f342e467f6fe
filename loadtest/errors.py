"""What can go wrong before and during a load test, for people: every message is one line."""

from __future__ import annotations


class ScenarioError(ValueError):
    """A scenario that cannot be run; the message names the field."""


class LoadError(Exception):
    """The load could not be generated: no server, no generator process, no usable reply."""
