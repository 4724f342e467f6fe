"""The reference pages of the documentation, made from what they describe: `python -m server.reference`."""

from __future__ import annotations

import sys
from pathlib import Path

from server.flags import shown_default, shown_type
from server.metrics.families import FAMILIES, SCRAPED
from server.settings import PREFIX, Settings

FOLDER = Path("docs/reference")
COMMAND = "python -m server.reference"


def configuration() -> str:
    """Every setting of the server, in Markdown."""
    rows = [
        f"| `{name}` | `--{name.replace('_', '-')}` | `{PREFIX}{name.upper()}` "
        f"| {shown_type(field).replace('|', ', ')} | {shown_default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return _page(
        "Server configuration",
        "A setting is taken from the command-line flag, else the environment variable, else the TOML file that "
        f"`{PREFIX}CONFIG` names, else its default. `embstore config` shows the settings in effect.",
        "| TOML key | Flag of `embstore serve` | Environment | Type | Default | Meaning |",
        rows,
    )


def metrics() -> str:
    """Every metric of the server, in Markdown."""
    rows = [
        f"| `{name}{'_total' if family.kind == 'counter' else ''}` | {family.kind} "
        f"| {', '.join(f'`{label}`' for label in family.labels)} | {family.help} |"
        for name, family in (FAMILIES | SCRAPED).items()
    ]
    return _page(
        "Server metrics",
        "`GET /metrics` answers in the Prometheus text format, for all workers together. Every series exists from "
        "start-up, those of a table from the moment it is loaded.",
        "| Metric | Type | Labels | Meaning |",
        rows,
    )


PAGES = {"configuration.md": configuration, "metrics.md": metrics}


def _page(title: str, introduction: str, head: str, rows: list[str]) -> str:
    rule = "|".join(["", *["---"] * (head.count("|") - 1), ""])
    return "\n".join([f"# {title}", "", introduction, "", f"<!-- Made by `{COMMAND}`. -->", "", head, rule, *rows, ""])


def main(folder: Path = FOLDER) -> None:
    """Write the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), "utf-8")
        sys.stdout.write(f"{folder / name}\n")


if __name__ == "__main__":
    main()
