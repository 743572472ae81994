"""The terminal: progress bars with time left, tables, warnings. The only module that writes to it.

On a terminal bars are live; in a pipe a line appears at each tenth of a phase. Left out: log files,
which the loop writes itself.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_WIDE = 110
console = Console(highlight=False)
if not console.is_terminal:  # a pipe or a log: tables need not fold at 80 columns
    console = Console(highlight=False, width=_WIDE)


def configure_logging() -> None:
    """Send warnings of the package to the terminal, without paths."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logger = logging.getLogger("fusedmm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def say(text: str) -> None:
    """One line of plain progress."""
    console.print(text)


class Meter:
    """Progress of one phase: `update(done, note)` from any callback."""

    def __init__(self, name: str, total: int, bar: Progress | None) -> None:
        self.name, self.total, self.bar = name, total, bar
        self.start = time.perf_counter()
        self.first: int | None = None
        self.tenth = 0
        self.task = None if bar is None else bar.add_task(name, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total is finished; `note` stands at the end of the line."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        if self.first is None:  # the first call starts the clock: a resumed run begins late
            self.first, self.start = done, time.perf_counter()
            if done < self.total:
                return
        tenth = 10 * done // self.total
        if tenth > self.tenth:
            self.tenth = tenth
            taken = time.perf_counter() - self.start
            left = taken / max(done - self.first, 1) * (self.total - done)
            say(f"{self.name} {done}/{self.total}, about {left:.0f} s left  {note}".rstrip())


@contextlib.contextmanager
def meter(name: str, total: int) -> Iterator[Meter]:
    """A bar for one phase with elapsed and remaining time."""
    if not console.is_terminal:
        yield Meter(name, total, None)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(name, total, bar)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others numbers."""
    out = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    console.print(out)
