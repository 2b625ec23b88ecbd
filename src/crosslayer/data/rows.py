"""Documents packed into rows of tokens: a stream whose cursor can be saved and loaded.

A row is the special token of the first-position policy and `context - 1` tokens of text. Documents are concatenated,
each with the special token in front, which marks its boundary. With `prepend=False` there is none. Other special tokens
that occur in a text are left out; chats and tokenised documents keep theirs. Documents without tokens are skipped. With
several sources, the next document comes from the source whose share of the tokens so far is furthest below its weight.
This mixes sources deterministically.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Mark, Split
from crosslayer.data.sources import Source, Weighted
from crosslayer.host.host import Host

EMPTY_LIMIT = 1000
"""Documents without tokens, one after another, after which the tokenizer is taken to yield none at all."""


class Place(NamedTuple):
    """Position in a source: current pass, documents read in that pass, and tokens read in total."""

    epoch: int = 0
    document: int = 0
    tokens: int = 0
    mark: Mark | None = None
    """Where a streamed source is opened to reach the last document read."""

    @classmethod
    def of(cls, saved: Sequence) -> Place:
        """Return the place of the nested lists that JSON makes of it."""
        epoch, document, tokens, *mark = saved
        return cls(epoch, document, tokens, Mark(*mark[0]) if mark and mark[0] else None)


class Cursor(NamedTuple):
    """Position of a stream: the place in each source, and the tokens used of the open document."""

    places: tuple[Place, ...]
    open_source: int = -1
    used: int = 0

    @classmethod
    def of(cls, saved: Sequence) -> Cursor:
        """Return the cursor of the nested lists that JSON makes of it."""
        places, open_source, used = saved
        return cls(tuple(map(Place.of, places)), open_source, used)


class Documents:
    """Documents of weighted sources, for one rank.

    Rank r of n reads documents r, r + n, ... of each source.
    """

    def __init__(self, sources: Sequence[Weighted], side: Split, seed: int, rank: int = 0, ranks: int = 1) -> None:
        total = sum(s.weight for s in sources)
        self.sources, self.weights = [s.source for s in sources], [s.weight / total for s in sources]
        self.side: Split = side
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.places = [Place()] * len(sources)
        self._open: list[Iterator[Document] | None] = [None] * len(sources)

    def _pass(self, i: int) -> Iterator[Document]:
        """Return the documents of this rank in the current pass that are not read yet."""
        epoch, document, _, mark = self.places[i]
        rest = self.sources[i].documents_of(self.side, self.seed + i, epoch, mark)
        return islice(rest, self.rank + self.ranks * document - (mark.document if mark else 0), None, self.ranks)

    def next_source(self) -> int:
        """Return the source whose share of the tokens is furthest below its weight."""
        taken = [p.tokens for p in self.places]
        return max(range(len(taken)), key=lambda i: self.weights[i] * (sum(taken) + 1) - taken[i])

    def read(self, i: int) -> Document:
        """Return the next document of source `i`; start its next pass if this one is finished."""
        for _ in range(2):
            stream = self._open[i]
            if stream is None:
                stream = self._open[i] = self._pass(i)
            document = next(stream, None)
            if document is not None:
                self.places[i] = self.places[i]._replace(document=self.places[i].document + 1, mark=document.mark)
                return document
            self._open[i] = None
            self.places[i] = self.places[i]._replace(epoch=self.places[i].epoch + 1, document=0, mark=None)
        name = self.sources[i].name
        raise SourceError(f"{name} has too little {self.side} text for {self.ranks} ranks; give more text")

    def move(self, places: Sequence[Place]) -> None:
        """Continue from these places."""
        self.places = list(places)
        self._open = [None] * len(self.places)


def redistribute(cursors: Sequence[Cursor], rank: int, ranks: int) -> Cursor:
    """Return the cursor of one rank when a run resumes on another number of ranks.

    Each source continues at the first document that any of the previous ranks had not finished. No document is
    skipped; some are read again.

    Args:
        cursors: one per previous rank.
        rank, ranks: this rank, and the new number of ranks.
    """
    ranks_before = len(cursors)
    places = []
    for i, of_source in enumerate(zip(*(c.places for c in cursors), strict=True)):
        unread = [
            (p.epoch, r + ranks_before * (p.document - (c.open_source == i)), p.mark)
            for r, (c, p) in enumerate(zip(cursors, of_source, strict=True))
        ]
        epoch, document, mark = min(unread, key=lambda place: place[:2])
        read = sum(p.tokens for p in of_source) // ranks
        places.append(Place(epoch, max(0, -(-(document - rank) // ranks)), read, mark))
    return Cursor(tuple(places))


class RowStream:
    """An infinite stream of rows from weighted sources; `cursor` can be read and set between rows."""

    def __init__(self, host: Host, documents: Documents, context: int) -> None:
        self.host, self.documents, self.context = host, documents, context
        self._source, self._tokens, self._used = -1, list[int](), 0

    @property
    def seed(self) -> int:
        return self.documents.seed

    @property
    def cursor(self) -> Cursor:
        return Cursor(tuple(self.documents.places), self._source, self._used)

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        places = list(cursor.places)
        self._source, self._tokens, self._used = -1, [], 0
        if cursor.open_source >= 0:
            i = cursor.open_source
            # Step back to the open document, and read it again.
            self.documents.move([p._replace(document=p.document - (j == i)) for j, p in enumerate(places)])
            self._next_document(i)
            self._used = cursor.used
        self.documents.places = places
        if cursor.open_source < 0:
            self.documents.move(places)

    def _next_document(self, source: int) -> None:
        document = self.documents.read(source)
        self._source, self._tokens, self._used = source, document_tokens(self.host, document), 0
        place = self.documents.places[source]
        self.documents.places[source] = place._replace(tokens=place.tokens + len(self._tokens))

    def rows(self, n: int) -> Int[Tensor, "B T"]:
        """Return the next `n` rows, and advance the cursor."""
        body = _body(self.host, self.context)
        flat: list[int] = []
        n_empty = 0
        while len(flat) < n * body:
            if self._used == len(self._tokens):
                self._next_document(self.documents.next_source())
                n_empty = 0 if self._tokens else n_empty + 1
                _check_empty(self.host, self.documents.sources[self._source], n_empty)
            take = self._tokens[self._used : self._used + n * body - len(flat)]
            flat.extend(take)
            self._used += len(take)
        return _rows(self.host, flat, body)


def held_out_rows(host: Host, sources: Sequence[Weighted], context: int, n_tokens: int) -> Int[Tensor, "B T"]:
    """Return rows with about `n_tokens` tokens of held-out text, each document at most once.

    Raises:
        SourceError: if the held-out text is shorter than one row.
    """
    body = _body(host, context)
    documents = Documents(sources, "held_out", seed=0)
    flat: list[int] = []
    n_empty = 0
    while len(flat) < n_tokens + body:
        i = documents.next_source()
        document = documents.read(i)
        if documents.places[i].epoch:
            break
        tokens = document_tokens(host, document)
        n_empty = 0 if tokens else n_empty + 1
        _check_empty(host, documents.sources[i], n_empty)
        place = documents.places[i]
        documents.places[i] = place._replace(tokens=place.tokens + len(tokens))
        flat.extend(tokens)
    n_rows = min(len(flat) // body, -(-n_tokens // body))
    if not flat:
        raise no_tokens(host, documents.sources[0])
    if n_rows == 0:
        raise SourceError(f"the held-out text has {len(flat)} tokens, less than one row of {body}; give more text")
    return _rows(host, flat[: n_rows * body], body)


def document_tokens(host: Host, document: Document) -> list[int]:
    """Return the tokens of a document, with the special token in front if the policy prepends it; none if it is empty.

    Raises:
        SourceError: for a chat that the tokenizer has no template for, or token ids beyond the vocabulary.
    """
    if document.kind == "text":
        special = host.special_ids
        tokens = [t for t in host.tokenizer.encode(document.text, add_special_tokens=False) if t not in special]
    elif document.kind == "messages":
        tokens = host.tokenizer.encode(_chat(host, json.loads(document.text)), add_special_tokens=False)
    else:
        tokens = json.loads(document.text)
        if beyond := [t for t in tokens if not 0 <= t < host.n_vocab]:
            raise SourceError(
                f"input_ids hold {beyond[0]}, but the vocabulary of {host.name} has {host.n_vocab} tokens; give text"
                " that was tokenised for this model"
            )
    if host.policy.prepend and tokens and tokens[0] != host.first_token:
        tokens = [host.first_token, *tokens]
    return tokens


def _chat(host: Host, messages: list[dict[str, Any]]) -> str:
    """Return the text of a chat by the tokenizer's template."""
    from jinja2 import TemplateError

    if not host.tokenizer.chat_template:
        raise SourceError(
            f"the tokenizer of {host.name} has no chat template, which messages need; give the instruction-tuned model,"
            " or a column of text with --column"
        )
    try:
        return host.tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise SourceError(
            f"the chat template of {host.name} refuses messages of the roles"
            f" {', '.join(str(m['role']) for m in messages[:8])}: {str(error).splitlines()[0]}; correct them, or leave"
            " them out of the text"
        ) from error


def _check_empty(host: Host, source: Source, n_empty: int) -> None:
    """Refuse text that yields no tokens, which a stream would read for ever."""
    if n_empty >= EMPTY_LIMIT:
        raise no_tokens(host, source)


def no_tokens(host: Host, source: Source) -> SourceError:
    """Return the error for a source whose documents have no tokens."""
    return SourceError(
        f"the tokenizer of {host.name} finds no tokens in the text of {source.name}; check the tokenizer, or give other"
        " text"
    )


def _body(host: Host, context: int) -> int:
    """Return the number of text tokens per row."""
    return context - host.policy.prepend


def _rows(host: Host, flat: list[int], body: int) -> Int[Tensor, "B T"]:
    rows_BT = torch.tensor(flat).view(-1, body)
    return torch.nn.functional.pad(rows_BT, (1, 0), value=host.first_token) if host.policy.prepend else rows_BT
