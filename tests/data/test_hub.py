"""Hugging Face datasets: resume from the state of a block, duplicates, interruptions, and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document, Mark
from crosslayer.data.rows import Cursor, Documents, RowStream, redistribute
from crosslayer.data.sources import Weighted, hub, open_source
from crosslayer.data.sources.hub import HubSource
from crosslayer.data.stream import ActivationStream, StreamState
from crosslayer.host.host import Host

BLOCK = 40


class FakeDataset:
    """The interface of `datasets.IterableDataset` that is used; counts the records that are read."""

    def __init__(self, records: list[dict], fail_at: dict[int, list[Exception]]) -> None:
        self.records, self.fail_at, self.at, self.n_read = records, fail_at, 0, 0

    def __iter__(self) -> Iterator[dict]:
        while self.at < len(self.records):
            if self.fail_at.get(self.at):
                raise self.fail_at[self.at].pop(0)
            self.n_read += 1
            self.at += 1
            yield self.records[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"examples_iterable": {"shard_example_idx": self.at}, "epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["examples_iterable"]["shard_example_idx"]


class FakeHub:
    """The module `datasets`, with one dataset."""

    def __init__(self, records: list[dict]) -> None:
        self.records, self.fail_at, self.opened = records, dict[int, list[Exception]](), list[FakeDataset]()
        self.pauses = list[float]()

    def load_dataset(self, path: str, config: str | None, split: str, *, streaming: bool) -> FakeDataset:
        assert streaming
        if self.fail_at.get(-1):
            raise self.fail_at[-1].pop(0)
        self.opened.append(FakeDataset(self.records, self.fail_at))
        return self.opened[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub([{"text": f"document {i % 450} of the dataset"} for i in range(500)])
    module = ModuleType("datasets")
    module.load_dataset = made.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "BLOCK", BLOCK)
    monkeypatch.setattr(hub.time, "sleep", made.pauses.append)
    return made


def read(source: HubSource, mark: Mark | None = None) -> list[Document]:
    return list(source.documents_of("train", 0, 0, mark))


def test_hub_names():
    assert [(s.path, s.config, s.hub_split) for s in map(HubSource, ("hf:a/b", "hf:a/b:c", "hf:a/b:c:d"))] == [
        ("a/b", "", "train"),
        ("a/b", "c", "train"),
        ("a/b", "c", "d"),
    ]


def test_duplicates_within_a_block_are_dropped(fake: FakeHub):
    fake.records = [{"text": f"document {i // 2}"} for i in range(3 * BLOCK)]
    both = [list(HubSource("hf:a/b").documents_of(side, 0, 0)) for side in ("train", "held_out")]
    assert sorted(d.text for d in [*both[0], *both[1]]) == sorted({r["text"] for r in fake.records})


@pytest.mark.parametrize("at", [0, 1, 35, 36, 37, 200, 400])
def test_reading_resumes_from_the_mark_of_any_document(fake: FakeHub, at: int):
    documents = read(HubSource("hf:a/b"))
    mark = Mark(*json.loads(json.dumps(documents[at].mark)))
    assert read(HubSource("hf:a/b"), mark) == documents[mark.document :]
    assert mark.document <= at < mark.document + BLOCK


def rows_of(host: Host, rank: int = 0, ranks: int = 1) -> RowStream:
    return RowStream(host, Documents([Weighted(HubSource("hf:a/b"), 1.0)], "train", 0, rank, ranks), 17)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 100, 301, 700])
def test_rows_resume_bitwise_identical_without_reading_the_dataset_again(host: Host, fake: FakeHub, n: int, ranks: int):
    stream = rows_of(host, ranks - 1, ranks)
    if n:
        stream.rows(n)
    saved = json.loads(json.dumps(stream.cursor))
    at = fake.opened[-1].at if n else 0
    expected = stream.rows(20)
    end = fake.opened[-1].at
    again = rows_of(host, ranks - 1, ranks)
    again.cursor = Cursor.of(saved)
    assert torch.equal(again.rows(20), expected)
    assert again.cursor == stream.cursor
    if end > at:  # within one pass
        assert fake.opened[-1].n_read <= end - at + 2 * BLOCK


@pytest.mark.parametrize("after", [64, 200, 650])
def test_the_stream_of_activations_resumes_bitwise_identical(host: Host, fake: FakeHub, after: int):
    make = lambda state: ActivationStream(rows_of(host), 200, 4, dtype=torch.float32, state=state)  # noqa: E731
    stream = make(None)
    stream.batch(after)
    again = make(StreamState(*stream.state.plain()))
    for one, other in zip(stream.batch(250), again.batch(250), strict=True):
        assert torch.equal(one, other)


def test_redistributed_streams_skip_no_document(host: Host, fake: FakeHub):
    whole = [d.text for d in read(HubSource("hf:a/b"))]
    cursors, finished = [], set[str]()
    for rank in range(3):
        documents = Documents([Weighted(HubSource("hf:a/b"), 1.0)], "train", 0, rank, 3)
        texts = [documents.read(0).text for _ in range(60 + 3 * rank)]
        finished |= set(texts[:-1])
        cursors.append(Cursor(tuple(documents.places), open_source=0, used=7))
    left = list[str]()
    for rank in range(2):
        documents = Documents([Weighted(HubSource("hf:a/b"), 1.0)], "train", 0, rank, 2)
        documents.move(redistribute(cursors, rank, 2).places)
        assert documents.places[0].mark is not None
        while (text := documents.read(0).text) and not documents.places[0].epoch:
            left.append(text)
    assert finished | set(left) == set(whole)


def network_error(name: str) -> Exception:
    if name == "httpx":
        import httpx

        return httpx.ReadTimeout("slow")
    if name == "http":
        import http.client

        return http.client.IncompleteRead(b"")
    return {"connection": ConnectionResetError("reset by peer"), "time": TimeoutError(), "os": OSError("broken")}[name]


@pytest.mark.parametrize("name", ["httpx", "http", "connection", "time", "os"])
@pytest.mark.parametrize("at", [1, BLOCK - 1, BLOCK, 333])
def test_an_interrupted_stream_continues_at_the_same_record(fake: FakeHub, name: str, at: int):
    expected = read(HubSource("hf:a/b"))
    fake.fail_at = {at: [network_error(name), network_error(name)], -1: []}
    assert read(HubSource("hf:a/b")) == expected
    assert fake.pauses == [*hub.PAUSES_S[:2]]
    assert fake.opened[-1].n_read <= 500 - at + BLOCK


def test_a_stream_that_stays_interrupted_ends_in_one_sentence(fake: FakeHub):
    fake.fail_at = {300: [TimeoutError() for _ in range(9)]}
    with pytest.raises(SourceError, match=r"^hf:a/b cannot be streamed: TimeoutError$"):
        read(HubSource("hf:a/b"))
    assert fake.pauses == [*hub.PAUSES_S]


@pytest.mark.parametrize(
    ("error", "words"), [(FileNotFoundError("no such dataset\nmore"), "no such dataset$"), (ValueError("bad"), "bad$")]
)
def test_a_dataset_that_cannot_be_opened_is_refused_at_once(fake: FakeHub, error: Exception, words: str):
    fake.fail_at = {-1: [error]}
    with pytest.raises(SourceError, match=f"^hf:a/b cannot be streamed: {words}"):
        read(HubSource("hf:a/b"))
    assert fake.pauses == []


def test_records_are_read_by_the_rule_of_all_sources(fake: FakeHub):
    fake.records = [{"body": f"number {i}"} for i in range(50)]
    assert len(list(open_source("hf:a/b", "body").documents_of("train", 0, 0))) > 30
    with pytest.raises(SourceError, match=r"hf:a/b has no column text.*found body; give the column"):
        read(HubSource("hf:a/b"))
    fake.records = [{"messages": [{"role": "user", "content": f"number {i}"}]} for i in range(50)]
    assert {d.kind for d in read(HubSource("hf:a/b"))} == {"messages"}


def write_lines(folder: Path, texts: list[str]) -> None:
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))


def write_shards(folder: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(3):
        part = texts[i * len(texts) // 3 : (i + 1) * len(texts) // 3]
        pq.write_table(pa.table({"text": part}), folder / f"train-{i:05d}-of-00003.parquet", row_group_size=50)


@pytest.mark.parametrize("write", [write_lines, write_shards])
def test_the_package_datasets_resumes_from_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, list[str]], None]
):
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setattr(hub, "BLOCK", BLOCK)
    write(tmp_path, [f"document {i % 580}" for i in range(600)])
    source = HubSource(f"hf:{tmp_path}")
    ids = [d.id for d in source.documents_of("train", 0, 0)]
    at, mark = 0, None
    while at + 111 < len(ids):  # each resume starts from a mark of the resume before it
        first = mark.document if mark else 0
        stream = source.documents_of("train", 0, 0, mark)
        found = [next(stream) for _ in range(at + 111 - first)]
        assert [d.id for d in found] == ids[first : at + 111]
        at, mark = at + 111, found[-1].mark
        assert mark is not None
