"""Sources of each kind: duplicates, weights, the split, and invalid input."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from crosslayer.core.errors import SourceError
from crosslayer.data.documents import HELD_OUT_SHARE, LONGEST, PIECE_CHARACTERS, split_of
from crosslayer.data.rows import Documents
from crosslayer.data.sources import ListedSource, open_source, open_sources
from crosslayer.data.sources.hub import HubSource


def texts(name: Path | str) -> list[str]:
    source = open_source(str(name))
    assert isinstance(source, ListedSource)
    return sorted(d.text for d in source.documents)


def test_each_kind_of_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"content": "two"}\n')
    pq.write_table(pa.table({"text": ["three", None, "four"]}), tmp_path / "c.parquet")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "d.py").write_text("import os")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "e.py").write_text("not this")
    (tmp_path / "f.bin").write_bytes(b"\xff\xfe")
    assert texts(tmp_path) == sorted(["plain", "one", "two", "three", "four", "import os"])
    assert texts(tmp_path / "a.txt") == ["plain"]


def test_exact_duplicates_are_read_once_also_across_sources(tmp_path: Path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "more.txt").write_text("other")
    assert texts(tmp_path) == ["other", "same"]
    one, other = open_sources([str(tmp_path / "a.txt"), str(tmp_path)])
    assert [d.text for d in one.source.documents] == ["same"]
    assert [d.text for d in other.source.documents] == ["other"]


def test_a_long_text_is_cut_at_blank_lines_without_loss(tmp_path: Path):
    text = "\n\n".join(tiny.make_text(200, i) for i in range(60))
    (tmp_path / "book.txt").write_text(text)
    pieces = open_source(str(tmp_path / "book.txt")).documents
    assert len(pieces) > 2
    assert "\n\n".join(d.text for d in pieces) == text


@pytest.mark.parametrize("joint", [" \n ", "\n", " ", ""])
def test_a_long_text_without_blank_lines_is_cut_too(joint: str, tmp_path: Path):
    """At line breaks if it has any, else at spaces, else anywhere; WikiText has no blank line."""
    text = joint.join(f"{i:06d}" * 12 for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    parts = [d.text for d in open_source(str(tmp_path / "book.txt")).documents]
    assert "".join(parts) == text
    assert len(parts) > 20
    assert max(map(len, parts)) <= LONGEST * PIECE_CHARACTERS
    breaks = [c for c in ("\n", " ") if c in joint]
    assert all(part.endswith(breaks[0]) for part in parts[:-1] if breaks)


def test_endoftext_separates_documents_and_is_never_part_of_one(tmp_path: Path):
    (tmp_path / "stories.txt").write_text("Once.<|endoftext|>\nTwice.\n<|endoftext|><|endoftext|>Thrice.")
    assert texts(tmp_path / "stories.txt") == ["\nTwice.\n", "Once.", "Thrice."]
    assert len({d.id for d in open_source(str(tmp_path)).documents}) == 3


def test_split_is_a_function_of_the_id_with_the_stated_share():
    sides = [split_of(f"document {i}") for i in range(20_000)]
    assert sides.count("held_out") / 20_000 == pytest.approx(HELD_OUT_SHARE, abs=0.01)
    assert split_of("stdlib:json/decoder.py") == split_of("stdlib:json/decoder.py")


def test_a_file_in_a_folder_has_one_split_and_a_single_file_both(tmp_path: Path):
    for i in range(40):
        text = "\n\n".join(f"paragraph {j} of {i} " + "x" * 900 for j in range(60))
        (tmp_path / f"{i}.txt").write_text(text)
    folder, alone = open_source(str(tmp_path)), open_source(str(tmp_path / "0.txt"))
    files = {side: {d.text.split()[3] for d in folder.documents_of(side, 0, 0)} for side in ("train", "held_out")}
    assert not files["train"] & files["held_out"]
    assert len(files["train"] | files["held_out"]) == 40
    assert sum(1 for _ in folder.documents_of("train", 0, 0)) > 40
    assert len(list(alone.documents_of("train", 0, 0))) > 1
    assert open_source(str(tmp_path)).digest() == folder.digest() != alone.digest()


def test_no_document_is_in_both_splits():
    source = open_source("stdlib")
    sides = [{d.id for d in source.documents_of(side, 0, 0)} for side in ("train", "held_out")]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {d.id for d in source.documents}
    assert all(i.startswith("stdlib:") and not i.startswith("stdlib:test/") for i in sides[0])


def test_weights_are_shares_of_tokens(host, tmp_path: Path):
    sources = []
    for name, weight, words in (("long", 3.0, 400), ("short", 1.0, 40)):
        tiny.write_text_folder(tmp_path / name, 40, words)
        sources.append(f"{tmp_path / name}={weight}")
    documents = Documents(open_sources(sources), "train", seed=0)
    for _ in range(400):
        i = documents.next_source()
        n = len(documents.read(i).text)
        documents.places[i] = documents.places[i]._replace(tokens=documents.places[i].tokens + n)
    long, short = (p.tokens for p in documents.places)
    assert long / (long + short) == pytest.approx(0.75, abs=0.01)


def test_order_changes_with_the_pass_and_the_seed_and_nothing_else():
    source = open_source("stdlib")
    order = lambda seed, epoch: [d.id for d in source.documents_of("train", seed, epoch)]  # noqa: E731
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert sorted(order(0, 0)) == sorted(order(1, 5))


def test_ranks_share_the_documents_without_overlap(text_folder: Path):
    def taken(rank: int) -> list[str]:
        documents = Documents(open_sources([str(text_folder)]), "train", 0, rank, 2)
        ids = []
        while not documents.places[0].epoch:
            ids.append(documents.read(0).id)
        return ids[:-1]

    assert not set(taken(0)) & set(taken(1))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2, is not JSON"),
        ("a.jsonl", json.dumps({"body": "x"}).encode(), "line 1, has no column text.*found body.*--column"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("a.parquet", b"nonsense", "cannot be read as Parquet"),
        ("a.txt", b"  \n", "holds no text"),
    ],
)
def test_unreadable_sources_are_named(tmp_path: Path, file: str, content: bytes, words: str):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError, match=words):
        open_source(str(tmp_path / file))


def test_wrong_names_and_weights(tmp_path: Path):
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(SourceError, match="positive number"):
        open_sources(["stdlib=-1"])
    with pytest.raises(SourceError, match="--text"):
        open_sources([])
    with pytest.raises(SourceError, match="is not a dataset name"):
        HubSource("hf:a:b:c:d")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="found body"):
        open_source(str(tmp_path / "c.parquet"))
