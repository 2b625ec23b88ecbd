"""Consoles for results and progress, as wide as the terminal; lines in files and pipes are not wrapped."""

from __future__ import annotations

import sys

from rich.console import Console

WIDE = 4096
"""Width of a console that is not a terminal; it is large enough that no line is wrapped."""


def results() -> Console:
    """Return a console on standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


def progress() -> Console:
    """Return a console on standard error."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)
