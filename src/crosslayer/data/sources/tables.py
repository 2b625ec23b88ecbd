"""Records of JSON Lines, JSON, CSV and Parquet files, each with its place for errors."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crosslayer.core.errors import SourceError
from crosslayer.data.sources.records import usable_columns

LONGEST_FIELD = 1 << 30
"""Characters of a CSV field; Python's default, 131,072, is less than a long document."""


class Record(NamedTuple):
    """Values by column, and where they are from."""

    where: str
    values: dict[str, Any]


def decoded(line: bytes, where: str) -> str:
    """Return UTF-8 text without a byte order mark.

    Raises:
        SourceError: for other text.
    """
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 text (byte {error.start}); convert it or remove it") from error


def begins_with_object(text: str) -> bool:
    """Whether the first line that is not blank is a JSON object: JSON Lines, whatever the name of the file."""
    if not re.match(r"\s*\{", text):
        return False
    try:
        json.loads(next(line for line in io.StringIO(text) if line.strip()))
    except ValueError:
        return False
    return True


def json_lines(lines: Iterable[str | bytes], path: Path) -> Iterator[Record]:
    """Yield the record of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number},"
        text = decoded(line, where) if isinstance(line, bytes) else line
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except ValueError as error:
            raise SourceError(f"{where} is not JSON: {error}; correct the line") from error
        if not isinstance(found, dict):
            raise SourceError(f'{where} is JSON but not an object; write records such as {{"text": "..."}}')
        yield Record(where, found)


def json_records(text: str, path: Path) -> Iterator[Record]:
    """Yield the records of a JSON file: a list of objects, one object, or JSON Lines.

    Raises:
        SourceError: for anything else.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        if begins_with_object(text):
            yield from json_lines(io.StringIO(text), path)
            return
        raise SourceError(f"{path} is not JSON: {error}; correct it, or leave it out of --text") from error
    if isinstance(found, dict):
        yield Record(str(path), found)
        return
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise SourceError(f'{path} is JSON but not a list of objects; write records such as {{"text": "..."}}')
    for number, record in enumerate(found, 1):
        yield Record(f"{path}, record {number},", record)


def csv_records(text: str, path: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows below the header of a CSV or TSV file."""
    csv.field_size_limit(LONGEST_FIELD)
    # Line ends are kept, because a quoted field may hold line breaks.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            where = f"{path}, line {rows.line_num},"
            if not row:
                continue
            if len(row) != len(header):
                raise SourceError(f"{where} has {len(row)} fields, but the header has {len(header)}; correct the line")
            yield Record(where, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise SourceError(f"{path}, line {rows.line_num}, is not CSV: {error}; correct the line") from error


def parquet_records(path: Path, column: str) -> Iterator[Record]:
    """Yield the rows of a Parquet file, with only the columns that may hold the text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            columns = usable_columns(table.schema_arrow.names, str(path), column)
            number = 0
            for batch in table.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number},", values)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
