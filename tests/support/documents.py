"""The project's documents, taken apart: pages, fenced blocks, what is prose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
READMES = [
    ROOT / folder / "README.md" for folder in ("clients/python", "clients/examples/ranker", "benchmarks", "tests/fuzz")
]
"""Of parts; their blocks are not run."""
_FENCE = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block, and what the block of text after it shows as its output."""

    page: Path
    line: int
    language: str
    note: str
    """What the fence says after the language: `no-test`, or the name of the file that the block is."""
    code: str
    shown: str | None
    before: str
    """The line above the fence."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)} line {self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of a page but those of output, in order."""
    text = page.read_text()
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, after in zip(fences, [*fences[1:], None], strict=False):
        if fence[1] != "text":
            shown = after[3] if after is not None and after[1] == "text" else None
            above = text[: fence.start()].rstrip("\n").rpartition("\n")[2]
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(page, line, fence[1], fence[2] or "", fence[3], shown, above))
    return found


def outside_fences(page: Path) -> list[tuple[int, str]]:
    """The lines of a page that are in no block, with their numbers."""
    inside, found = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            found.append((number, line))
    return found
