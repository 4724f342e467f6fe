"""What a long job tells while it works: a bar on a terminal, plain lines in a log, nothing for programs."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Where a job reports to."""

    def note(self, message: str) -> None:
        """Something worth a line."""

    def advanced(self, what: str, done: int, total: int, detail: str = "") -> None:
        """How much of a step is done, and what else is known of it."""


class Silent(AbstractContextManager["Silent"]):
    """Tells nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def advanced(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to end."""


class PlainLines(Silent):
    """One line a fact, with the seconds since the start in front; how far a step is stays untold."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.started = stream, time.monotonic()

    def note(self, message: str) -> None:
        """A line."""
        self.stream.write(f"{time.monotonic() - self.started:7.1f}s  {message}\n")
        self.stream.flush()


class Terminal(Silent):
    """A bar for the step that runs, lines above it for what is done."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        detail = TextColumn("{task.fields[detail]}", markup=False)
        self.progress = Progress(*columns, detail, console=self.console, transient=True)
        self.task: TaskID | None = None
        self.what = ""

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, markup=False)

    def advanced(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Move the bar, a new one for a new step."""
        if self.task is None or what != self.what:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task, self.what = self.progress.add_task(what, total=total, detail=detail), what
        self.progress.update(self.task, completed=done, total=total, detail=detail)


def make_reporter(*, silent: bool = False, stream: TextIO | None = None) -> Silent:
    """The reporter that fits: none when `silent`, a bar when the stream (stderr) is a terminal, else plain lines.

    A context manager: `with make_reporter() as report: train(config, store, report=report)`.
    """
    if silent:
        return Silent()
    stream = stream or sys.stderr
    return Terminal(stream) if stream.isatty() else PlainLines(stream)
