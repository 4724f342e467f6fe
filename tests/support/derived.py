"""Texts that follow from the schemes there are. `python tests/support/derived.py` writes them where they stand."""

from __future__ import annotations

import re
from pathlib import Path

from embstore.schemes import SCHEMES, scheme_class

ROOT = Path(__file__).parents[2]
BEGIN = "made by `python tests/support/derived.py`"
HEAD = "| scheme | a vector is | bytes stored | reads, bytes | ceiling | an id in range that training never saw |"


def imports() -> str:
    """The imports of all scheme classes, for type checkers."""
    return "".join(
        f"    from embstore.schemes.{name} import {found} as {found}\n" for name, found in sorted(SCHEMES.items())
    )


def table() -> str:
    """What each scheme stores and costs, as Markdown."""
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for name in SCHEMES:
        f = scheme_class(name).facts
        lines.append(f"| `{name}` | {f.vector} | {f.stored} | {f.reads} | {f.ceiling} | {f.unseen} |")
    return "\n".join(lines) + "\n"


DERIVED = {
    ROOT / "embstore/schemes/__init__.py": (f"    # {BEGIN}\n", "    # end\n", imports),
    ROOT / "docs/schemes.md": (f"<!-- {BEGIN} -->\n", "<!-- end -->\n", table),
}


def renewed(path: Path) -> str:
    """The file's text with what is derived in it made anew."""
    begin, end, make = DERIVED[path]
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    text, count = pattern.subn(lambda _: make(), path.read_text(), count=1)
    assert count, f"{path} has no {begin!r} .. {end!r}"
    return text


if __name__ == "__main__":
    for path in DERIVED:
        path.write_text(renewed(path))
