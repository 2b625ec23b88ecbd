"""Find the documents of a bundle's text, and identify them by a hash of their tokens.

Each row of the token file starts with the policy's special token, and so does each document within a row; this marks
the documents. Copies of one text have the same hash, so they are always in the same split. Text without such tokens is
cut into blocks of rows. In an imported bundle each example is a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crosslayer.bundles.bundle import FeatureBundle

BLOCK_ROWS = 8
"""Rows per block of text without document marks: about the length of a document."""


class Stretch(NamedTuple):
    """Positions `first` to `last` (exclusive) of one document within one row."""

    first: int
    last: int


class Documents:
    """The documents of a bundle.

    Attributes:
        identification: how the documents were identified.
        body: positions of a row that hold text.
    """

    def __init__(self, bundle: FeatureBundle) -> None:
        m, self.tokens = bundle.manifest, bundle.tokens
        self.context = m.context
        self.prepended = 1 if m.policy.prepend and m.imported is None else 0
        self.body = max(1, self.context - m.policy.n_skip)
        self._hashes: dict[int, bytes] = {}
        if m.imported is not None:
            self.identification, self._begin = (
                "by example",
                np.unique(np.asarray(bundle.array("example_start"), np.int64)),
            )
            self._row = self._begin
        else:
            self._row = np.arange(0, len(self.tokens), self.context, dtype=np.int64)
            streams = np.cumsum([0, *(s.n_rows * self.context for s in m.text)])[:-1]
            if self.prepended and len(self.tokens):
                marks = np.flatnonzero(np.asarray(self.tokens) == self.tokens[0])
                self.identification, begin = "by their first token", marks[marks % self.context != 0]
            else:
                self.identification, begin = f"as blocks of {BLOCK_ROWS} rows", self._row[::BLOCK_ROWS]
            self._begin = np.unique(np.concatenate([streams, begin]).astype(np.int64))

    def number(self, position: int) -> int:
        """Return the document of a position."""
        return int(np.searchsorted(self._begin, position, side="right")) - 1

    def hash(self, position: int) -> bytes:
        """Hash the text of the document that holds a position."""
        n = self.number(position)
        if n not in self._hashes:
            first = int(self._begin[n])
            last = int(self._begin[n + 1]) if n + 1 < len(self._begin) else len(self.tokens)
            text = np.asarray(self.tokens[first:last])
            if self.prepended:
                text = text[np.arange(first, last) % self.context != 0]
            self._hashes[n] = hashlib.blake2b(text.astype("<u4").tobytes(), digest_size=16).digest()
        return self._hashes[n]

    def stretch(self, position: int) -> Stretch:
        """Return the part of a position's row in its document, without tokens that the policy prepends."""
        row = int(np.searchsorted(self._row, position, side="right")) - 1
        row_end = int(self._row[row + 1]) if row + 1 < len(self._row) else len(self.tokens)
        n = self.number(position)
        end = int(self._begin[n + 1]) if n + 1 < len(self._begin) else len(self.tokens)
        return Stretch(max(int(self._row[row]) + self.prepended, int(self._begin[n])), min(row_end, end))

    def row(self, position: int) -> int:
        """Return the row of a position."""
        return int(np.searchsorted(self._row, position, side="right")) - 1


def runs(tokens: NDArray, n: int) -> set[bytes]:
    """Return all runs of `n` tokens in a text."""
    raw, size = tokens.astype("<u4").tobytes(), 4
    return {raw[i * size : (i + n) * size] for i in range(len(tokens) - n + 1)}


def draw(*parts: object) -> int:
    """Return 64 pseudo-random bits that depend only on the parts, for reproducible sampling."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def in_drawn_order(items: Iterable[int], *parts: object) -> list[int]:
    """Shuffle numbers reproducibly."""
    return sorted(items, key=lambda i: draw(*parts, i))
