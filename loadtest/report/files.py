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
    if _is_special(path):
        return
    folder, draft = path.resolve().parent, _draft(path)
    try:
        draft.touch(exist_ok=False)
        draft.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}: {folder}") from None


def write(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old one or all of the new one. OutputError when it cannot be."""
    data = text.encode()
    try:
        if _is_special(path):
            path.write_bytes(data)
        else:
            _replace(path, data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _replace(path: Path, data: bytes) -> None:
    draft = _draft(path)
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path.resolve())
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


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


def _draft(path: Path) -> Path:
    whole = path.resolve()
    return whole.with_name(f".{whole.name}.{os.getpid()}.tmp")
