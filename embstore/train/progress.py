"""What a run tells while it works: a progress bar on a terminal, plain lines in a log, nothing for programs."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Where a run reports to."""

    def note(self, message: str) -> None:
        """Something worth a line."""

    def epoch_started(self, epoch: int, num_steps: int) -> None:
        """An epoch of so many steps begins."""

    def advanced(self, step: int, loss: float, num_examples: int) -> None:
        """So far this epoch: steps, mean loss, examples."""

    def epoch_done(self, epoch: int, loss: float, metric: float, improved: bool) -> None:
        """An epoch's loss and validation metric, and whether it is the best so far."""


class Silent(AbstractContextManager["Silent"]):
    """Reports nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def epoch_started(self, epoch: int, num_steps: int) -> None:
        """Nothing."""

    def advanced(self, step: int, loss: float, num_examples: int) -> None:
        """Nothing."""

    def epoch_done(self, epoch: int, loss: float, metric: float, improved: bool) -> None:
        """Nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to end."""


class PlainLines(Silent):
    """One line a fact, with the seconds since the start in front; an epoch's inner progress stays untold."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.started = stream, time.monotonic()

    def note(self, message: str) -> None:
        """A line."""
        self.stream.write(f"{time.monotonic() - self.started:7.1f}s  {message}\n")
        self.stream.flush()

    def epoch_done(self, epoch: int, loss: float, metric: float, improved: bool) -> None:
        """A line."""
        self.note(epoch_line(epoch, loss, metric, improved))


class Terminal(Silent):
    """A bar for the epoch that runs, lines above it for what is done."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False)
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        detail = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} examples/s")
        self.progress = Progress(*columns, detail, console=self.console, transient=True)
        self.task = self.progress.add_task("", visible=False, epoch=0, loss=0.0, rate=0.0)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, markup=False)

    def epoch_started(self, epoch: int, num_steps: int) -> None:
        """An empty bar."""
        self.epoch_start = time.monotonic()
        self.progress.reset(self.task, total=num_steps, visible=True, epoch=epoch, loss=0.0, rate=0.0)

    def advanced(self, step: int, loss: float, num_examples: int) -> None:
        """Move the bar."""
        rate = num_examples / max(time.monotonic() - self.epoch_start, 1e-9)
        self.progress.update(self.task, completed=step, loss=loss, rate=rate)

    def epoch_done(self, epoch: int, loss: float, metric: float, improved: bool) -> None:
        """A line above the bar."""
        self.note(epoch_line(epoch, loss, metric, improved))


def epoch_line(epoch: int, loss: float, metric: float, improved: bool) -> str:
    """An epoch in a line."""
    return f"epoch {epoch:3d}  loss {loss:.4f}  validation nDCG {metric:.4f}{'  best so far' if improved else ''}"


def make_reporter(*, silent: bool = False, stream: TextIO | None = None) -> Silent:
    """The reporter that fits: none when `silent`, a bar when the stream (stderr) is a terminal, else plain lines.

    A context manager: `with make_reporter() as report: train(config, store, report=report)`.
    """
    if silent:
        return Silent()
    stream = stream or sys.stderr
    return Terminal(stream) if stream.isatty() else PlainLines(stream)
