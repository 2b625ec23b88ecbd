"""Progress on standard error: a live bar on a terminal, one line per tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PARTS = 10
"""Progress lines per task if there is no terminal."""


@runtime_checkable
class Update(Protocol):
    """Called with the amount done and metrics to print beside it."""

    def __call__(self, done: float, metrics: str = "", /) -> None: ...


@contextmanager
def track(console: Console, name: str, total: float) -> Iterator[Update]:
    """Show the progress of a task; yield the function to call with updates."""
    if console.quiet:
        yield lambda done, metrics="": None
    elif console.is_terminal:
        columns = [TextColumn("{task.description:<10}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%")]
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"), console=console) as bar:
            task = bar.add_task(name, total=total, metrics="")
            yield lambda done, metrics="": bar.update(task, completed=done, metrics=metrics)
    else:
        began, printed = time.monotonic(), 0

        def line(done: float, metrics: str = "") -> None:
            nonlocal printed
            tenths = int(PARTS * done / total) if total else PARTS
            if tenths > printed:
                printed = tenths
                left_s = (time.monotonic() - began) * (total - done) / max(done, 1e-9)
                console.print(f"{name} {done / total:4.0%}, {left_s:.0f} s left  {metrics}".rstrip(), highlight=False)

        yield line
