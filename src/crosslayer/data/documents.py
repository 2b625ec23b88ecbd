"""A document, and the split that nothing may cross.

Every source yields `Document`s. Whether one is *held out* is a pure function of its id, so that
the split is the same in every run, on every rank and on every machine, and is made before any
text is tokenised. Nothing is ever measured on a document that training could have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.1
PIECE_CHARACTERS = 4_000


class Document(NamedTuple):
    """One text and the name under which it is split.

    `id` is the hash of the text for most sources, and the module path for the standard library,
    whose sources differ a little between versions of Python.
    """

    id: str
    text: str


def text_hash(text: str) -> str:
    """128 bits of BLAKE2b of the text: the default document id, and what deduplication compares."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split_of(document_id: str, held_out_share: float = HELD_OUT_SHARE) -> Split:
    """The side of the split that a document is on, from 64 bits of the hash of its id."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") < held_out_share * 2**64 else "train"


def pieces(text: str, n_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """A long text cut at blank lines into pieces of about `n_characters`; joined by blank lines they are the text
    again.

    Shuffled apart, the pieces of a book or a long module do not crowd a batch.
    """
    piece: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= n_characters:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)
