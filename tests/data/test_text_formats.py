"""Local formats: records under any column, compression, other names, and files that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document
from crosslayer.data.sources import ListedSource, open_source
from crosslayer.data.sources.records import document_of

TEXTS = ["one, with a comma", 'two "quoted"\nlines', "drei, größer\t."]


def documents(path: Path, column: str = "") -> list[Document]:
    source = open_source(str(path), column)
    assert isinstance(source, ListedSource)
    return source.documents


def texts(path: Path, column: str = "") -> list[str]:
    return [d.text for d in documents(path, column)]


def table(delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *([str(i), t] for i, t in enumerate(TEXTS))])
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


RECORDS = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, RECORDS))
FORMATS = {
    "a.jsonl": LINES,
    "a.ndjson": f"\n{LINES}\n\n",
    "lines.json": LINES,
    "list.json": json.dumps(RECORDS, indent=1),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.txt": LINES,
    "a.md": LINES,
    "a": LINES,
    "a.unknown": f"\n \n{LINES}",
}
COMPRESSION: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESSION)
@pytest.mark.parametrize("name", FORMATS)
def test_records_of_each_format(tmp_path: Path, name: str, compression: str):
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(COMPRESSION[compression](FORMATS[name].encode()))
    assert texts(file) == TEXTS
    if Path(name).suffix not in ("", ".unknown"):
        assert texts(tmp_path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESSION)
def test_compressed_text_with_a_byte_order_mark_and_other_line_ends(tmp_path: Path, compression: str):
    file = tmp_path / f"a.txt{compression}"
    file.write_bytes(COMPRESSION[compression]("\ufeffone\r\ntwo<|endoftext|>three".encode()))
    assert texts(file) == ["one\ntwo", "three"]


def test_one_record_per_file(tmp_path: Path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.json").write_text(json.dumps({"text": text}, indent=2))
    assert texts(tmp_path) == TEXTS


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_content_is_recognised_under_another_name(tmp_path: Path, compress: Callable[[bytes], bytes]):
    (tmp_path / "data").write_bytes(compress(LINES.encode()))
    assert texts(tmp_path / "data") == TEXTS
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table")
    assert texts(tmp_path / "table") == TEXTS
    (tmp_path / "notes.log").write_text("no records here")
    assert texts(tmp_path / "notes.log") == ["no records here"]


def test_an_object_in_source_code_is_code(tmp_path: Path):
    (tmp_path / "a.py").write_text('{"a": 1}\n')
    (tmp_path / "b.yaml").write_text('{"a": 1}  # a comment\n')
    assert texts(tmp_path) == ['{"a": 1}\n', '{"a": 1}  # a comment\n']


def test_data_without_text_is_skipped_beside_source_code_only(tmp_path: Path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / "readme.md").write_text("words")
    with pytest.raises(SourceError, match=r"package.json has no column text.*found name; give"):
        open_source(str(tmp_path))
    (tmp_path / "a.py").write_text("import os")
    assert texts(tmp_path) == ["import os", "words"]
    with pytest.raises(SourceError, match="has no column 'body'; found name"):
        open_source(str(tmp_path), "body")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_column_is_read_by_name(tmp_path: Path, suffix: str):
    file = tmp_path / f"a{suffix}"
    records = [{"body": f"body {i}", "text": f"text {i}", "none": ""} for i in range(3)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif suffix == ".csv":
        file.write_text("body,text,none\n" + "".join(",".join(r.values()) + "\n" for r in records))
    else:
        file.write_text("\n".join(map(json.dumps, records)))
    assert texts(file, "body") == [f"body {i}" for i in range(3)]
    assert texts(file) == [f"text {i}" for i in range(3)]
    with pytest.raises(SourceError, match="has no column 'words'; found body, text, none; give the column"):
        open_source(str(file), "words")
    with pytest.raises(SourceError, match="holds no text"):
        open_source(str(file), "none")


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


@pytest.mark.parametrize(
    ("record", "column", "kind", "text"),
    [
        ({"content": "b", "text": "a"}, "", "text", "a"),
        ({"text": None, "content": "b"}, "", "text", "b"),
        ({"code": "c", "markdown": "m"}, "", "text", "m"),
        ({"text": [1], "code": "c"}, "", "text", "c"),
        ({"input_ids": [1, 2]}, "", "input_ids", "[1, 2]"),
        ({"messages": CHAT}, "", "messages", json.dumps(CHAT)),
        ({"conversation": CHAT, "text": "a"}, "conversation", "messages", json.dumps(CHAT)),
        ({"text": CHAT}, "text", "messages", json.dumps(CHAT)),
        ({"tokens": [1, 2]}, "tokens", "input_ids", "[1, 2]"),
        ({"text": "half \ud83d of a pair"}, "", "text", "half \ufffd of a pair"),
    ],
)
def test_kinds_of_documents(record: dict, column: str, kind: str, text: str):
    document = document_of(record, "a file", column)
    assert document is not None
    assert (document.kind, document.text) == (kind, text)


@pytest.mark.parametrize(
    "record", [{"text": " \n"}, {"text": None}, {"input_ids": []}, {"messages": []}, {"text": None, "content": None}]
)
def test_empty_records_are_skipped(record: dict):
    assert document_of(record, "a file") is None


@pytest.mark.parametrize(
    ("record", "column", "words"),
    [
        ({"text": 5}, "", "has int under 'text'"),
        ({"input_ids": "1 2 3"}, "", "has str under 'input_ids'"),
        ({"input_ids": [1, True]}, "", "has list under 'input_ids'"),
        ({"input_ids": [1.0]}, "", "has list under 'input_ids'"),
        ({"messages": [{"from": "human"}]}, "", "has list under 'messages'"),
        ({}, "", "found no columns"),
        ({f"column {i}": "" for i in range(40)}, "", "column 11 and 28 more"),
    ],
)
def test_records_without_text_are_refused(record: dict, column: str, words: str):
    with pytest.raises(SourceError, match=f"^a file .*{words}.*--column$"):
        document_of(record, "a file", column)


LONG = "\n".join(f"line {i}" for i in range(50_000)).encode()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.txt.gz", gzip.compress(LONG, mtime=0)[:-900], "is not a whole gzip file"),
        ("a.txt.gz", b"plain text", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:40], "is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(LONG, mtime=0)[:50] + b"x" * 50, "is not a whole gzip file"),
        ("a.txt.zst", zstd(LONG)[:-900], "cannot be read: Truncated"),
        ("a.jsonl.zst", b"plain text", "cannot be read: ZSTD"),
        ("a.txt.gz", gzip.compress(b"caf\xe9", mtime=0), r"a.txt.gz is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}', "line 2, is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n["text"]', "line 2, is JSON but not an object"),
        ("a.txt", b'{"text": "ok"}\n{"text": "cut', "line 2, is not JSON"),
        ("a.json", b'{"text": "ok"}\n{"text": "cut', "line 2, is not JSON"),
        ("a.json", b'[{"text": "ok"}, {"text"', "a.json is not JSON"),
        ("a.json", b'["one", "two"]', "not a list of objects"),
        ("a.json", b'[{"text": "ok"}, {"body": "x"}]', "record 2, has no column"),
        ("a.csv", b"id,text\n1,one\n2\n", "line 3, has 1 fields, but the header has 2"),
        ("a.csv", b'id,text\n1,"open\n', "line 2, is not CSV: unexpected end of data"),
        ("a.csv", b"a line\nof text\n", "found a line; give the column"),
        ("a.csv", b"", "holds no text"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read as Parquet"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "is a compressed Parquet file"),
        ("data", b"\x00\xff\xfe", "not UTF-8"),
    ],
)
def test_unreadable_files_are_named_in_one_sentence(tmp_path: Path, file: str, content: bytes, words: str):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError, match=words) as raised:
        open_source(str(tmp_path / file))
    assert file in str(raised.value)
    assert "\n" not in str(raised.value)
