"""Formats of transcoder folders, one file each. Nothing is ever unpickled.

To add a format, write its file with a `FORMAT` at its end and put that into `FORMATS`.
"""

from __future__ import annotations

from crosslayer.clt.formats import bluelight, gemma_scope, published, transcoder_set
from crosslayer.clt.formats.format import Format

FORMATS: tuple[Format, ...] = (published.FORMAT, transcoder_set.FORMAT, bluelight.FORMAT, gemma_scope.FORMAT)

__all__ = ["FORMATS", "Format"]
