"""Consoles for results and for progress: as wide as the terminal, and never wrapped in a file or a pipe."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 4096
"""Columns where nothing has a width: tables are as wide as their contents, lines as long as they are."""


def results() -> Console:
    """Console on standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def progress() -> Console:
    """Console on standard error."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)
