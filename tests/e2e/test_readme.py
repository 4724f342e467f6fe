"""What the README shows is there."""

from __future__ import annotations

import re
from pathlib import Path

from embstore.train.demo import make_clicks

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_ids_of_the_examples_are_the_demos() -> None:
    """Who copies a lookup gets vectors: the users and items named are among those that `make run` trains."""
    clicks = make_clicks(0)
    users, items = set(re.findall(r"\b\d{19}\b", README)), set(re.findall(r"sku-\w+", README))
    assert users
    assert items
    assert users <= {str(user) for user in clicks["user_id"]}
    assert items <= set(clicks["item_id"])
