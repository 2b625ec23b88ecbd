"""The interface of sources, and the source whose documents are in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Mark, Split, split_of, text_hash


@runtime_checkable
class Source(Protocol):
    """A source of documents, in an order fixed by the seed and the number of the pass."""

    name: str

    def documents_of(self, side: Split, seed: int, epoch: int, mark: Mark | None = None) -> Iterator[Document]:
        """Return one pass over the documents of a split, or the rest from a mark; the order is reproducible."""
        ...


class ListedSource:
    """Documents held in memory, shuffled for each pass."""

    def __init__(self, name: str, documents: list[Document]) -> None:
        self.name, self.documents = name, documents

    def documents_of(self, side: Split, seed: int, epoch: int, mark: Mark | None = None) -> Iterator[Document]:
        assert mark is None  # only streamed documents have one
        chosen = [d for d in self.documents if split_of(d.id) == side]
        if not chosen:
            count = len(self.documents)
            raise SourceError(
                f"{self.name} has no {side.replace('_', '-')} text: {count} document{'s' * (count > 1)};"
                " give more text, in more files"
            )
        return (chosen[i] for i in np.random.default_rng((seed, epoch)).permutation(len(chosen)))

    def digest(self) -> str:
        """Return a hash of all documents in order, which a resumed run compares."""
        return text_hash("".join(d.id + text_hash(d.text) for d in self.documents))

    def drop(self, hashes: set[str]) -> None:
        """Remove the texts with these hashes."""
        self.documents = [d for d in self.documents if text_hash(d.text) not in hashes]
        if not self.documents:
            raise SourceError(f"{self.name} holds only text that is also in another source; remove this source")
