"""Documents are kept in order: their length, their links, and the files and functions that they name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.documents import PAGES, READMES, ROOT, blocks, outside_fences

from server.http.problems import KINDS
from server.metrics.families import FAMILIES, SCRAPED
from server.settings import PREFIX, Settings

MAX_WIDTH, MAX_README = 120, 150
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w/.-])(?:server|embstore|loadtest|tests|benchmarks|clients|configs|docs)/[\w/.*{},-]*[\w/*}]"
)
_GENERATED = "<!-- Made by "
_ROW = re.compile(r"^\| `([\w/]+\.py)` \| ((?:`[\w.]+`(?:, )?)+) \|", re.MULTILINE)
OTHER_NAMES = {"embstore_client", "embstore_api_client"}
"""What begins like a metric: packages."""
OTHER_VARIABLES = {"config", "data", "api_key"}
"""Not of the server: the file of settings, where data sets are, the key of `embstore lookup`."""
FLOWS = ["how-a-request-flows.md", "how-a-publish-flows.md"]
pages = pytest.mark.parametrize("page", PAGES + READMES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_lines_are_short(page: Path) -> None:
    """No line of prose or code is wider than 120 characters; rows of tables and shown output cannot be wrapped."""
    if _GENERATED in page.read_text():
        return
    prose = [(number, line) for number, line in outside_fences(page) if not line.startswith("|")]
    code = [
        (block.line + number, line)
        for block in blocks(page)
        if block.language != "json"
        for number, line in enumerate(block.code.splitlines(), 1)
    ]
    assert [number for number, line in prose + code if len(line) > MAX_WIDTH and "](http" not in line] == []


def test_the_readme_is_short() -> None:
    """The README is read in one go."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that exists, and where it has a fragment, a heading of it."""
    broken = []
    for _, line in outside_fences(page):
        for target in _LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, fragment = unquote(target).partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (fragment and fragment not in _anchors(file)):
                broken.append(target)
    assert broken == []


def test_every_page_is_linked() -> None:
    """A reader who starts at the README reaches every page."""
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for _, line in outside_fences(page):
            for target in _LINK.findall(line):
                file = (page.parent / target.partition("#")[0]).resolve()
                if file.suffix == ".md" and file.exists():
                    waiting.append(file)
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


@pages
def test_named_files_exist(page: Path) -> None:
    """A path of the source tree that a page names is there; `{a,b}` stands for each, `*` for some."""
    code = [code for _, line in outside_fences(page) for code in re.findall(r"`([^`]+)`", line)]
    named = [one.rstrip("/") for path in _PATH.findall("\n".join(code)) for one in _spelt_out(path)]
    assert [path for path in named if not any(ROOT.glob(path))] == []


@pytest.mark.parametrize("name", FLOWS)
def test_functions_of_a_flow_exist(name: str) -> None:
    """Each row of a page that follows the code names functions that its file defines."""
    rows = _ROW.findall((ROOT / "docs" / name).read_text())
    assert len(rows) >= 10
    missing = []
    for path, functions in rows:
        defined = _defined(ROOT / path) if (ROOT / path).exists() else set()
        missing += [f"{path}: {one}" for one in re.findall(r"`([\w.]+)`", functions) if one not in defined]
    assert missing == []


def test_every_error_is_in_the_reference() -> None:
    """The HTTP reference lists each code that the server answers with, and its status."""
    listed = re.findall(
        r"^\| `(\w+)` \| (\d{3}) \|", (ROOT / "docs" / "reference" / "http.md").read_text(), re.MULTILINE
    )
    assert {code: int(status) for code, status in listed} == {code: kind.status for code, kind in KINDS.items()}


@pages
def test_named_metrics_and_settings_exist(page: Path) -> None:
    """A metric that a page names is one of the server's, and so is a setting by its environment variable."""
    text = page.read_text()
    metrics = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in re.findall(r"\bembstore_[a-z_]+", text)}
    assert metrics - {*FAMILIES, *SCRAPED} <= OTHER_NAMES
    variables = {name.removeprefix(PREFIX).lower() for name in re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", text)}
    assert variables - set(Settings.model_fields) <= OTHER_VARIABLES


def _anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    heads = [line.lstrip("#").strip().lower() for _, line in outside_fences(page) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads}


def _spelt_out(path: str) -> list[str]:
    """`a/{b,c}` as a/b and a/c."""
    found = re.search(r"\{([^}]+)\}", path)
    if found is None:
        return [path]
    return [one for part in found[1].split(",") for one in _spelt_out(path.replace(found[0], part, 1))]


def _defined(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{one.name}" for one in functions}
    return names
