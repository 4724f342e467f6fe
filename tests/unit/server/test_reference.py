"""Pages of the documentation that are made from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import reference

FOLDER = Path(__file__).parents[3] / reference.FOLDER


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_reference_page_is_up_to_date(name: str) -> None:
    """The page in the repository is what the code gives now."""
    written = (FOLDER / name).read_text("utf-8")
    assert written == reference.PAGES[name](), f"out of date: run `{reference.COMMAND}`"
