"""A record of JSON, CSV, Parquet or a Hugging Face dataset as a document: one rule for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Kind, text_hash

TEXT_COLUMNS = ("text", "content", "markdown", "code")
TOKEN_COLUMNS = ("input_ids", "messages")
COLUMNS = (*TEXT_COLUMNS, *TOKEN_COLUMNS)
"""Columns that are read without `--column`, in order of preference."""
SHOWN = 12


def document_of(record: Mapping[str, Any], where: str, column: str = "") -> Document | None:
    """Return the document of a record, or None if it is empty.

    Args:
        record: values by column.
        where: file and line, or dataset, for errors.
        column: column to read; default: the first of `COLUMNS` with a usable value.

    Raises:
        SourceError: for a record without such a column, or whose value is not text, a chat or a list of token ids.
    """
    names = usable_columns(record, where, column)
    found = [(name, record[name]) for name in names if record[name] is not None]
    for name, value in found:
        kind = _kind(value)
        # A list under `content` is read only if it is asked for; a string under `input_ids` is never text.
        if kind is None or (not column and name in TEXT_COLUMNS if kind != "text" else name in TOKEN_COLUMNS):
            continue
        text = _valid(value) if isinstance(value, str) else json.dumps(value, default=str)
        return Document(text_hash(text), text, kind) if value and text.strip() else None
    if not found:
        return None
    name, value = found[0]
    raise SourceError(
        f"{where} has {type(value).__name__} under {name!r}, which is not text, a list of messages with role and"
        " content, or a list of token ids; give the column of the text with --column"
    )


def usable_columns(names: Iterable[str], where: str, column: str = "") -> list[str]:
    """Return the columns to read, in order of preference.

    Raises:
        SourceError: if there are none.
    """
    present = list(names)
    wanted = (column,) if column else COLUMNS
    if usable := [name for name in wanted if name in present]:
        return usable
    shown = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in present[:SHOWN]) or "no columns"
    more = f" and {len(present) - SHOWN} more" if len(present) > SHOWN else ""
    of = f"column {column!r}" if column else f"column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    raise SourceError(f"{where} has no {of}; found {shown}{more}; give the column of the text with --column")


def _kind(value: object) -> Kind | None:
    """Return how a value is read; None for one that cannot be."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return "input_ids"
    if all(isinstance(v, dict) and {"role", "content"} <= v.keys() for v in value):
        return "messages"
    return None


def _valid(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
