"""Text sources, one kind per file, and their names.

    stdlib                      the running Python's standard library
    PATH                        a text, JSON, CSV or Parquet file, or a folder of them or of source code
    hf:NAME[:CONFIG][:SPLIT]    a Hugging Face dataset, streamed (needs the extra `hub`)

`=WEIGHT` after a name sets its share of the tokens in a mix of sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, pieces, text_hash
from crosslayer.data.sources.hub import HubSource
from crosslayer.data.sources.listed import ListedSource, Source
from crosslayer.data.sources.local import local_documents
from crosslayer.data.sources.stdlib import stdlib_documents

__all__ = ["HubSource", "ListedSource", "Source", "Weighted", "open_source", "open_sources"]


class Weighted(NamedTuple):
    """A source and its relative share of the tokens."""

    source: Source
    weight: float


def open_source(name: str, column: str = "") -> Source:
    """Open a source by name; local sources are read at once and deduplicated.

    Args:
        name: as listed above, without a weight.
        column: column of the text in JSON, CSV, Parquet and Hugging Face records; default: the usual names.

    Raises:
        SourceError: for a source that does not exist, cannot be read, or holds no text.
    """
    if not name:
        raise SourceError("the name of a text source is empty; give a file, a folder, stdlib, or hf:NAME with --text")
    if name.startswith("hf:"):
        return HubSource(name, column)
    if name == "stdlib":
        # Pieces of a module share its id, and so its split.
        documents = [Document(d.id, piece) for d in stdlib_documents() for piece in pieces(d.text)]
    else:
        documents = list(local_documents(Path(name), column))
    unique = list({text_hash(d.text): d for d in documents}.values())
    if not unique:
        raise SourceError(f"{name} holds no text; give a file or folder of text, JSON, CSV, Parquet or source code")
    return ListedSource(name, unique)


def open_sources(names: Sequence[str], column: str = "") -> list[Weighted]:
    """Open sources by `NAME` or `NAME=WEIGHT`; a text in two local sources is read from the first.

    Raises:
        SourceError: for a weight that is not a positive number, or as `open_source` does.
    """
    if not names:
        raise SourceError("no text was given; give a file, a folder, stdlib, or hf:NAME with --text")
    opened = [Weighted(open_source(name, column), weight) for name, weight in map(split_weight, names)]
    seen: set[str] = set()
    for source, _ in opened:
        if isinstance(source, ListedSource):
            source.drop(seen)
            seen.update(text_hash(d.text) for d in source.documents)
    return opened


def split_weight(name: str) -> tuple[str, float]:
    """Split `books.txt=0.3` into ("books.txt", 0.3); the default weight is 1."""
    head, separator, tail = name.rpartition("=")
    if not separator:
        return name, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return name, 1.0
    if not 0 < weight < float("inf"):
        raise SourceError(f"the weight of {head} is {tail}; give a positive number")
    return head, weight
