"""Local sources: text, JSON, CSV and Parquet files, compressed or not, and folders of them or of source code."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, pieces, separated, text_hash
from crosslayer.data.sources import tables
from crosslayer.data.sources.records import document_of

PROSE = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".html"})
CODE = frozenset(
    {
        *(".py", ".pyi", ".js", ".ts", ".tsx", ".jsx", ".css", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go"),
        *(".java", ".kt", ".rb", ".php", ".sh", ".sql", ".jl", ".lua", ".scala", ".swift", ".hs", ".ml", ".r"),
    }
)
SETTINGS = frozenset({".toml", ".yaml", ".yml"})
TABLES = frozenset({".json", ".csv", ".tsv"})
LINES = frozenset({".jsonl", ".ndjson"})
SUFFIXES = PROSE | CODE | SETTINGS | TABLES | LINES | {".parquet"}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
SKIPPED_FOLDERS = frozenset({".git", "node_modules", "__pycache__", ".venv"})


def local_documents(path: Path, column: str = "") -> Iterator[Document]:
    """Yield the documents of a file, or of all supported files below a folder, in path order.

    A record of a JSON, CSV or Parquet file is a document. A plain text file in a folder is a document: its pieces share
    an id, and so a split. If the source is a single file, each piece is a document. `<|endoftext|>` in a text file
    separates documents. JSON Lines, gzip, Zstandard and Parquet are recognised under other names. In a folder with
    source code, JSON and CSV files without text are skipped.

    Args:
        path: file or folder.
        column: column of records to read; default: the usual names.

    Raises:
        SourceError: for a path that does not exist, or a file whose content does not match its suffix.
    """
    if not path.exists():
        raise SourceError(f"no text at {path}: no such file or folder; check the path")
    if path.is_file():
        yield from _file(path, column, alone=True)
        return
    files = [
        file
        for file in sorted(path.rglob("*"))
        if _suffix(file) in SUFFIXES
        and file.is_file()
        and not SKIPPED_FOLDERS.intersection(file.relative_to(path).parts)
    ]
    has_code = any(_suffix(file) in CODE for file in files)
    for file in files:
        if not (has_code and not column and _suffix(file) in TABLES):
            yield from _file(file, column, alone=False)
            continue
        try:
            documents = list(_file(file, column, alone=False))
        except SourceError:
            continue  # package.json, test data
        yield from documents


def _suffix(path: Path) -> str:
    """Return the suffix of a file's content: `.jsonl` of `a.jsonl.gz`."""
    outer = path.suffix.lower()
    return Path(path.stem).suffix.lower() if outer in COMPRESSED else outer


def _file(path: Path, column: str, *, alone: bool) -> Iterator[Document]:
    suffix, outer = _suffix(path), path.suffix.lower()
    try:
        with path.open("rb") as file:
            start = file.read(4)
        found = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "")
        if suffix == ".parquet" or found == "parquet":
            if outer in COMPRESSED:
                raise SourceError(
                    f"{path} is a compressed Parquet file; decompress it, Parquet has its own compression"
                )
            records = tables.parquet_records(path, column)
        else:
            with _opened(path, COMPRESSED.get(outer, found)) as file:
                if suffix in LINES:
                    yield from _documents(tables.json_lines(file, path), column)
                    return
                text = tables.decoded(file.read(), str(path))
            if suffix == ".json":
                records = tables.json_records(text, path)
            elif suffix in {".csv", ".tsv"}:
                records = tables.csv_records(text, path, "," if suffix == ".csv" else "\t")
            elif suffix not in CODE | SETTINGS and tables.begins_with_object(text):
                records = tables.json_lines(io.StringIO(text), path)
            else:
                yield from _texts(text, alone=alone)
                return
        yield from _documents(records, column)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path} is not a whole gzip file: {error}; compress it again") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}; restore it or remove it") from error


def _opened(path: Path, compression: str) -> io.BufferedReader:
    """Open a file to read its decompressed content."""
    if compression == "gzip":
        return io.BufferedReader(gzip.open(path))
    if compression == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return path.open("rb")


def _documents(records: Iterator[tables.Record], column: str) -> Iterator[Document]:
    for where, values in records:
        document = document_of(values, where, column)
        if document is not None:
            yield document


def _texts(text: str, *, alone: bool) -> Iterator[Document]:
    for whole in separated(text.replace("\r\n", "\n").replace("\r", "\n")):
        for piece in pieces(whole):
            if piece.strip():
                yield Document(text_hash(piece if alone else whole), piece)
