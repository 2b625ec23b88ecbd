"""Local sources: text, JSON Lines and Parquet files, and folders of them or of source code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, pieces, separated, text_hash

TEXT_SUFFIXES = frozenset(
    {
        *(".txt", ".md", ".rst", ".tex", ".html", ".csv", ".json", ".toml", ".yaml", ".yml"),
        *(
            ".py",
            ".pyi",
            ".js",
            ".ts",
            ".tsx",
            ".jsx",
            ".css",
            ".c",
            ".h",
            ".cc",
            ".cpp",
            ".hpp",
            ".rs",
            ".go",
            ".java",
        ),
        *(".kt", ".rb", ".php", ".sh", ".sql", ".jl", ".lua", ".scala", ".swift", ".hs", ".ml", ".r"),
    }
)
SKIPPED_FOLDERS = frozenset({".git", "node_modules", "__pycache__", ".venv"})


def local_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file, or of all supported files below a folder, in path order.

    A `.jsonl` line or a Parquet row is a document (its `text` or `content`). A plain text file in a folder is a
    document: its pieces share an id, and so a split. If the source is a single file, each piece is a document.
    `<|endoftext|>` in a text file separates documents.

    Raises:
        SourceError: for a path that does not exist, or a file whose content does not match its suffix.
    """
    if not path.exists():
        raise SourceError(f"no text at {path}: no such file or folder; check the path")
    if path.is_file():
        yield from _file(path, alone=True)
        return
    for file in sorted(path.rglob("*")):
        wanted = file.suffix.lower() in TEXT_SUFFIXES | {".jsonl", ".parquet"}
        if wanted and file.is_file() and not SKIPPED_FOLDERS.intersection(file.relative_to(path).parts):
            yield from _file(file, alone=False)


def _file(path: Path, *, alone: bool) -> Iterator[Document]:
    records = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix.lower())
    try:
        if records is not None:
            yield from (Document(text_hash(text), text) for text in records(path) if text.strip())
            return
        for text in separated(path.read_text(encoding="utf-8")):
            for piece in pieces(text):
                if piece.strip():
                    yield Document(text_hash(piece if alone else text), piece)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text (byte {error.start}); convert it or remove it") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _text_of(record: object, where: str) -> str:
    if isinstance(record, dict):
        for key in ("text", "content"):
            if isinstance(record.get(key), str):
                return record[key]
    raise SourceError(f"{where} has no string under 'text' or 'content'")


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}, line {number}, is not JSON: {error.msg}") from error
            yield _text_of(record, f"{path}, line {number},")


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        column = next((c for c in ("text", "content") if c in table.schema_arrow.names), None)
        if column is None:
            raise SourceError(f"{path} has no column 'text' or 'content'; found {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=[column]):
            yield from (str(v) for v in batch.column(0).to_pylist() if v is not None)
    except pa.ArrowException as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
