"""Progress on standard error: a live bar on a terminal, one line per tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PARTS = 10
"""Lines that a piece of work prints where there is no terminal."""


@runtime_checkable
class Update(Protocol):
    """Called with how much is done, and what to say beside it."""

    def __call__(self, done: float, figures: str = "", /) -> None: ...


@contextmanager
def track(console: Console, name: str, total: float) -> Iterator[Update]:
    """Show how far a piece of work is; the block gets a function to call as it goes on."""
    if console.quiet:
        yield lambda done, figures="": None
    elif console.is_terminal:
        columns = [TextColumn("{task.description:<10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%")]
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=console) as bar:
            task = bar.add_task(name, total=total, figures="")
            yield lambda done, figures="": bar.update(task, completed=done, figures=figures)
    else:
        began, printed = time.monotonic(), 0

        def line(done: float, figures: str = "") -> None:
            nonlocal printed
            tenths = int(PARTS * done / total) if total else PARTS
            if tenths > printed:
                printed = tenths
                left_s = (time.monotonic() - began) * (total - done) / max(done, 1e-9)
                console.print(f"{name} {done / total:4.0%}, {left_s:.0f} s left  {figures}".rstrip(), highlight=False)

        yield line
