"""A streamed Hugging Face dataset; nothing is downloaded in advance or stored.

Documents come in the order of the dataset. Exact duplicates are dropped by hash. A resumed run streams the current pass
again from its beginning, so that it drops the same duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Split, split_of, text_hash

TEXT_COLUMNS = ("text", "content", "markdown", "code")


class HubSource:
    """`hf:NAME[:CONFIG][:SPLIT]`; SPLIT is `train` by default, and NAME may be a local dataset folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        parts = name.removeprefix("hf:").split(":")
        if not parts[0] or len(parts) > 3:
            raise SourceError(f"{name!r} is not a dataset name; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        self.path, self.config, self.hub_split = (*parts, *("", "train")[len(parts) - 1 :])[:3]

    def _records(self) -> Iterator[Any]:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SourceError(f"{self.name} needs the package datasets; run pip install 'crosslayer[hub]'") from error
        try:
            yield from load_dataset(self.path, self.config or None, split=self.hub_split, streaming=True)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.name} cannot be streamed: {str(error).splitlines()[0]}") from error

    def documents_of(self, side: Split, seed: int, epoch: int) -> Iterator[Document]:
        del seed, epoch  # a stream has one order
        seen: set[str] = set()
        for record in self._records():
            column = next((c for c in TEXT_COLUMNS if isinstance(record.get(c), str)), None)
            if column is None:
                raise SourceError(f"{self.name} has no text under {', '.join(TEXT_COLUMNS)}; found {', '.join(record)}")
            identity = text_hash(record[column])
            if identity not in seen and record[column].strip():
                seen.add(identity)
                if split_of(identity) == side:
                    yield Document(identity, record[column])
