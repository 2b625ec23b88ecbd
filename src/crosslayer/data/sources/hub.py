"""A streamed Hugging Face dataset; nothing is downloaded in advance or stored.

Documents come in the order of the dataset. Exact duplicates within a block of `BLOCK` records are dropped. The state of
the dataset at the start of each block is kept in the cursor of the run: a resumed run, or a stream that was
interrupted, continues there: it opens only the shard of that block, and reads at most one block again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Mark, Split, split_of
from crosslayer.data.sources.records import document_of

BLOCK = 10_000
PAUSES_S = (1.0, 5.0, 25.0)
"""Seconds before each retry of an interrupted stream."""
NETWORK_ERRORS = (
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("aiohttp", "ClientError"),
    ("requests", "RequestException"),
    ("urllib3.exceptions", "HTTPError"),
    ("http.client", "HTTPException"),
)
"""Errors of the libraries that `datasets` reads through; those of fsspec and sockets are `OSError`s."""


class HubSource:
    """`hf:NAME[:CONFIG][:SPLIT]`; SPLIT is `train` by default, and NAME may be a local dataset folder."""

    def __init__(self, name: str, column: str = "") -> None:
        self.name, self.column = name, column
        parts = name.removeprefix("hf:").split(":")
        if not parts[0] or len(parts) > 3:
            raise SourceError(f"{name!r} is not a dataset name; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        self.path, self.config, self.hub_split = (*parts, *("", "train")[len(parts) - 1 :])[:3]

    def _open(self) -> Any:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SourceError(f"{self.name} needs the package datasets; run pip install 'crosslayer[hub]'") from error
        return load_dataset(self.path, self.config or None, split=self.hub_split, streaming=True)

    def documents_of(self, side: Split, seed: int, epoch: int, mark: Mark | None = None) -> Iterator[Document]:
        """Return one pass over the documents of a split, or the rest of it from a mark.

        Raises:
            SourceError: for a dataset that cannot be read, also after retries, or without a column of text.
        """
        del seed, epoch  # a stream has one order
        n_documents, state = mark or Mark(0, None)
        records = _Records(self._open, state)
        seen: set[str] = set()
        while True:
            if records.read == 0:
                mark, seen = Mark(n_documents, records.state), set()
            try:
                record = next(records, None)
            except (*_network_errors(), ValueError) as error:
                raise SourceError(f"{self.name} cannot be streamed: {_first_line(error)}") from error
            if record is None:
                return
            document = document_of(record, self.name, self.column)
            if document is None or document.id in seen:
                continue
            seen.add(document.id)
            if split_of(document.id) == side:
                n_documents += 1
                yield document._replace(mark=mark)


class _Records:
    """Records of a dataset from a state; after a network error, the block is opened again up to the last record.

    Attributes:
        state: state of the dataset at the start of the block; None: its beginning.
        read: records read of the block.
    """

    def __init__(self, open_dataset: Callable[[], Any], state: dict[str, Any] | None) -> None:
        self._open, self.state, self.read = open_dataset, state, 0
        self._records: Iterator[Any] | None = None
        self._started = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        record = self._retried()
        self._started = True
        self.read += 1
        if self.read == BLOCK:
            self.state, self.read = self._dataset.state_dict(), 0
        return record

    def _retried(self) -> Any:
        for pause_s in PAUSES_S:
            try:
                return self._next()
            except _network_errors():
                self._records = None
                if not self._started:  # a wrong name, or no network at all
                    raise
                time.sleep(pause_s)
        return self._next()

    def _next(self) -> Any:
        if self._records is None:
            self._dataset = self._open()
            if self.state is not None:
                self._dataset.load_state_dict(self.state)
            self._records = islice(self._dataset, self.read, None)
        return next(self._records)


def _network_errors() -> tuple[type[Exception], ...]:
    """Return the errors that may pass; a library that was not imported has raised none."""
    return (OSError, *(getattr(sys.modules[module], name) for module, name in NETWORK_ERRORS if module in sys.modules))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
