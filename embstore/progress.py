"""What a long job tells while it works: a bar on a terminal, plain lines in a log, nothing for programs."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Silent(AbstractContextManager["Silent"]):
    """Tells nothing."""

    def note(self, message: str) -> None:
        """Something worth a line."""

    def advanced(self, what: str, done: int, total: int) -> None:
        """How much of a step is done."""

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
        self.progress = Progress(*columns, console=self.console, transient=True)
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

    def advanced(self, what: str, done: int, total: int) -> None:
        """Move the bar, a new one for a new step."""
        if self.task is None or what != self.what:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task, self.what = self.progress.add_task(what, total=total), what
        self.progress.update(self.task, completed=done, total=total)


def make_reporter(*, silent: bool = False, stream: TextIO | None = None) -> Silent:
    """The reporter that fits: none when `silent`, a bar when the stream (stderr) is a terminal, else plain lines."""
    if silent:
        return Silent()
    stream = stream or sys.stderr
    return Terminal(stream) if stream.isatty() else PlainLines(stream)
