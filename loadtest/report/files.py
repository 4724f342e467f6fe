"""Files of results: written whole or not at all, asked for before the run, read back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from embstore.common.atomic_files import staging, write_bytes
from loadtest.results.result import Result


class OutputError(Exception):
    """A file cannot be written or read; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where the results of runs go: all that was counted, pages with plots, percentiles; None: nowhere."""

    out: Path | None = None
    html: Path | None = None
    hgrm: Path | None = None

    def check(self) -> None:
        """Nothing, when all of them can be written; OutputError otherwise."""
        for path in (self.out, self.html, self.hgrm):
            if path is not None:
                check_writable(path)

    def write(self, results: Sequence[Result]) -> None:
        """Write them all; one that cannot be written, an OutputError, does not keep the others from it."""
        failed = []
        for path, text in self._files(results):
            try:
                write(path, text())
            except OutputError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _files(self, results: Sequence[Result]) -> Iterator[tuple[Path, Callable[[], str]]]:
        from loadtest.report.html import to_html
        from loadtest.results.hgrm import to_hgrm

        if self.out is not None:
            yield self.out, lambda: results_to_json(results)
        for number, result in enumerate(results, 1):
            if self.html is not None:
                yield numbered(self.html, number, len(results)), partial(to_html, result)
            if self.hgrm is not None:
                yield numbered(self.hgrm, number, len(results)), partial(to_hgrm, result.total().latency)


def check_writable(path: Path) -> None:
    """Nothing, when a file can be written there; OutputError otherwise. For asking before long work."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    with _output_errors(path):
        if not _is_special(path):
            with _draft(path) as draft:
                draft.touch()


def write(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old one or all of the new one. OutputError when it cannot be."""
    data = text.encode()
    with _output_errors(path):
        if _is_special(path):
            path.write_bytes(data)
            return
        with _draft(path) as draft:
            write_bytes(draft, data)
            draft.replace(path.resolve())


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A place in the file's own folder, which must exist."""
    whole = path.resolve()
    os.scandir(whole.parent).close()
    with staging(whole.parent) as folder:
        yield folder / whole.name


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def results_to_json(results: Sequence[Result]) -> str:
    """One run as it is, several as a list."""
    found = [result.to_json() for result in results]
    return json.dumps(found if len(found) != 1 else found[0], separators=(",", ":")) + "\n"


def read_results(path: Path) -> list[Result]:
    """The runs of a file; OutputError when it is none of ours."""
    try:
        found: Any = json.loads(path.read_text("utf-8"))
        return [Result.from_json(one) for one in (found if isinstance(found, list) and found else [found])]
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} is no result of a load test, as --out writes it: {error}") from None


def numbered(path: Path, number: int, of: int) -> Path:
    """`run.html` for a single run, `run.2.html` for the second of several."""
    return path if of == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def _is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or a folder: nothing that a file may take the place of."""
    return path.exists() and not path.is_file()
