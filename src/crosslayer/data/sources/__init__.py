"""Where text comes from, one kind a file, and how sources are named.

    stdlib                      the running Python's standard library
    PATH                        a text, JSONL or Parquet file, or a folder of them or of source code
    hf:NAME[:CONFIG][:SPLIT]    a Hugging Face data set, streamed (needs the extra `hub`)

`=WEIGHT` after any of them sets its share of the tokens where several are mixed.
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
    """A source and its share of the tokens, relative to the other sources'."""

    source: Source
    weight: float


def open_source(name: str) -> Source:
    """The source that a name stands for; local ones are read at once, each text once.

    Raises:
        SourceError: for a source that is not there, cannot be read, or holds no text.
    """
    if not name:
        raise SourceError("a text without a name was given; name a file, a folder, stdlib, or hf:NAME with --text")
    if name.startswith("hf:"):
        return HubSource(name)
    if name == "stdlib":
        # Pieces of a module keep its name, so that they stay on its side of the split.
        documents = [Document(d.id, piece) for d in stdlib_documents() for piece in pieces(d.text)]
    else:
        documents = list(local_documents(Path(name)))
    unique = list({text_hash(d.text): d for d in documents}.values())
    if not unique:
        raise SourceError(f"{name} holds no text; give a file or folder of .txt, .md, .jsonl, .parquet or source code")
    return ListedSource(name, unique)


def open_sources(names: Sequence[str]) -> list[Weighted]:
    """Sources by `NAME` or `NAME=WEIGHT`; a text that two local ones share stays in the first.

    Raises:
        SourceError: for a weight that is no positive number, or as `open_source` does.
    """
    if not names:
        raise SourceError("no text was given; name a file, a folder, stdlib, or hf:NAME with --text")
    opened = [Weighted(open_source(name), weight) for name, weight in map(split_weight, names)]
    seen: set[str] = set()
    for source, _ in opened:
        if isinstance(source, ListedSource):
            source.drop(seen)
            seen.update(text_hash(d.text) for d in source.documents)
    return opened


def split_weight(name: str) -> tuple[str, float]:
    """`books.txt=0.3` is ("books.txt", 0.3); without a number the weight is 1."""
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
