"""Documents, and their split into train and held-out.

Every source yields `Document`s. The split is a pure function of the document id, so it is the same in every run, on
every rank and on every machine. It is made before tokenisation. Metrics are computed only on held-out documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

Split = Literal["train", "held_out"]
Kind = Literal["text", "messages", "input_ids"]

HELD_OUT_SHARE = 0.1
PIECE_CHARACTERS = 4_000
LONGEST = 4
"""Pieces longer than this many times the usual size are cut where there is no blank line."""
SEPARATOR = "<|endoftext|>"


class Mark(NamedTuple):
    """A point of a streamed source from which it can be read again."""

    document: int
    """Documents of the split before this point, in this pass."""
    state: dict[str, Any] | None
    """State of the dataset, JSON types; None: its beginning."""


class Document(NamedTuple):
    """A text, and the id that decides its split.

    `id` is the hash of the text for most sources. For the standard library it is the module path, because the sources
    differ between versions of Python. `text` is JSON if the document is a chat (`messages`: a list of objects with
    `role` and `content`) or tokenised (`input_ids`: a list of ints).
    """

    id: str
    text: str
    kind: Kind = "text"
    mark: Mark | None = None
    """Of streamed sources: where reading can start to reach this document."""


def text_hash(text: str) -> str:
    """Return the 128-bit BLAKE2b hash of a text: the default document id, also used for deduplication."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split_of(document_id: str, held_out_share: float = HELD_OUT_SHARE) -> Split:
    """Return the split of a document, from a 64-bit hash of its id."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") < held_out_share * 2**64 else "train"


def separated(text: str) -> list[str]:
    """Split a text at `<|endoftext|>`, which many corpora write between documents and is never a token of them."""
    return text.split(SEPARATOR)


def pieces(text: str, n_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Split a long text into pieces of about `n_characters`: at blank lines, else at line breaks, else anywhere.

    Blank lines between pieces are dropped, a line break stays with the piece before it. Pieces are shuffled separately,
    so that one long document does not fill a batch.
    """
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= n_characters:
            yield from _cut("\n\n".join(piece), n_characters)
            piece, size = [], 0
    if piece:
        yield from _cut("\n\n".join(piece), n_characters)


def _cut(piece: str, n_characters: int) -> Iterator[str]:
    """Cut a piece that blank lines have left much too long."""
    while len(piece) > LONGEST * n_characters:
        at = piece.rfind("\n", 0, n_characters) + 1 or piece.rfind(" ", 0, n_characters) + 1 or n_characters
        yield piece[:at]
        piece = piece[at:]
    yield piece
