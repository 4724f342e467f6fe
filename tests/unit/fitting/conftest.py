"""Fixtures of the tests of fits."""

from __future__ import annotations

import pytest

from embstore.fitting import checks as fitting_checks


@pytest.fixture(params=["one chunk", "small chunks"])
def any_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors read at once, and a few rows at a time."""
    if request.param == "small chunks":
        monkeypatch.setattr(fitting_checks, "CHUNK_ELEMENTS", 100)
