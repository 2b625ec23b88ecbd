"""Rows and the shuffled stream: every token once, document boundaries, and exact resume from any point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from crosslayer.core.errors import SourceError
from crosslayer.data.massive import MASSIVE, Typical
from crosslayer.data.rows import Cursor, Documents, Place, RowStream, held_out_rows, redistribute
from crosslayer.data.sources import open_sources
from crosslayer.data.stream import Activations, ActivationStream, StreamState, collect_activations
from crosslayer.host.host import Host

CONTEXT = 17
EOT = tiny.N_VOCAB - 1


def make_rows(host: Host, text_folder: Path, weights: tuple[float, ...] = (1.0,)) -> RowStream:
    names = [f"{text_folder}={w}" for w in weights[:1]] + [f"stdlib={w}" for w in weights[1:]]
    return RowStream(host, Documents(open_sources(names), "train", seed=3), CONTEXT)


def test_rows_start_with_the_special_token_and_mark_boundaries(host: Host, text_folder: Path):
    stream = make_rows(host, text_folder)
    rows_BT = stream.rows(50)
    assert rows_BT.shape == (50, CONTEXT)
    assert (rows_BT[:, 0] == EOT).all()
    body = rows_BT[:, 1:].flatten().tolist()
    documents = Documents(stream.documents.sources and open_sources([str(text_folder)]), "train", seed=3)
    expected: list[int] = []
    while len(expected) < len(body):
        expected += [EOT, *host.tokenizer.encode(documents.read(0).text, add_special_tokens=False)]
    assert body == expected[: len(body)]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0)])
def test_rows_resume_from_any_cursor(host: Host, text_folder: Path, weights: tuple[float, ...]):
    stream = make_rows(host, text_folder, weights)
    for n in (1, 7, 130):
        stream.rows(n)
        saved = json.loads(json.dumps(stream.cursor))
        expected = stream.rows(23)
        again = make_rows(host, text_folder, weights)
        again.cursor = Cursor.of(saved)
        assert torch.equal(again.rows(23), expected)
        assert again.cursor == stream.cursor


def test_a_cursor_saved_without_marks_is_read():
    assert Cursor.of([[[1, 3, 50]], 0, 7]) == Cursor((Place(1, 3, 50),), 0, 7)


def test_passes_follow_one_another_without_end(host: Host, text_folder: Path):
    stream = make_rows(host, text_folder)
    stream.rows(10_000)
    assert stream.cursor.places[0].epoch >= 2


def test_held_out_rows_hold_no_trained_text(host: Host, text_folder: Path):
    sources = open_sources([str(text_folder)])
    held = held_out_rows(host, sources, CONTEXT, 10**9)
    text = host.tokenizer.decode(held[:, 1:].flatten().tolist())
    trained = list(sources[0].source.documents_of("train", 0, 0))
    assert trained
    assert not any(d.text[:200] in text for d in trained)
    with pytest.raises(SourceError, match="less than one row"):
        held_out_rows(host, sources, 10**6, 100)


def unique_stream(host: Host, rows: RowStream, **kwargs) -> ActivationStream:
    return ActivationStream(rows, size=200, rows_per_forward=4, dtype=torch.float32, **kwargs)


def test_every_collected_token_is_served_exactly_once(host: Host, text_folder: Path):
    stream = unique_stream(host, make_rows(host, text_folder))
    served = torch.cat([stream.batch(n).x_BLD for n in (64, 100, 236, 200)])
    rows = make_rows(host, text_folder)
    collected = torch.cat([collect_activations(host, rows.rows(4)).x_BLD for _ in range(16)])
    key = lambda x: sorted(map(tuple, x[:, -1].round(decimals=4).tolist()))  # noqa: E731
    first_turns = torch.cat([collected[:600]])
    assert key(served) == key(first_turns)
    assert not torch.equal(served, first_turns)


@pytest.mark.parametrize("after", [1, 64, 200, 333, 650])
@pytest.mark.parametrize("reuse", [1, 2, 3])
def test_stream_resumes_bitwise_identical(host: Host, text_folder: Path, after: int, reuse: int):
    stream = unique_stream(host, make_rows(host, text_folder), reuse=reuse)
    stream.batch(after)
    state = StreamState(*json.loads(json.dumps(stream.state)))
    again = unique_stream(host, make_rows(host, text_folder), reuse=reuse, state=state)
    for n in (30, 250, 7):
        assert torch.equal(again.peek(5).x_BLD, stream.peek(5).x_BLD)
        for one, other in zip(stream.batch(n), again.batch(n), strict=True):
            assert torch.equal(one, other)
    assert again.state == stream.state


def test_tokens_with_massive_activations_are_left_out_and_a_resumed_stream_leaves_out_the_same(
    host: Host, text_folder: Path
):
    rows = make_rows(host, text_folder)
    collected = Activations(
        *map(torch.cat, zip(*(collect_activations(host, rows.rows(4)) for _ in range(40)), strict=True))
    )
    typical = Typical.of([collected])
    # The tokens whose outputs are among the largest twentieth of layer 1.
    typical.y_L[1] = collected.y_BLD[:, 1].norm(dim=1).quantile(0.95) / MASSIVE
    massive_B = typical.massive(*collected)
    assert 0.02 < massive_B.float().mean() < 0.1
    stream = unique_stream(host, make_rows(host, text_folder), typical=typical)
    assert stream.counts.massive > 0
    first = stream.batch(200).x_BLD
    key = lambda x: sorted(map(tuple, x[:, -1].round(decimals=4).tolist()))  # noqa: E731
    assert key(first) == key(collected.x_BLD[~massive_B][:200])
    for n in (1, 130, 300):
        stream.batch(n)
        state = StreamState(*json.loads(json.dumps(stream.state)))
        again = unique_stream(host, make_rows(host, text_folder), typical=typical, state=state)
        assert again.counts == stream.counts
        assert torch.equal(again.batch(333).x_BLD, stream.batch(333).x_BLD)
        assert again.state == stream.state
    n = stream.counts.collected
    assert stream.counts.massive == massive_B[:n].sum()
    assert n < len(massive_B)


def test_reused_tokens_are_served_once_per_turn_in_another_order(host: Host, text_folder: Path):
    stream = unique_stream(host, make_rows(host, text_folder), reuse=2)
    turns = [stream.batch(200).x_BLD[:, 0, 0] for _ in range(4)]
    assert torch.equal(turns[0].sort().values, turns[1].sort().values)
    assert torch.equal(turns[2].sort().values, turns[3].sort().values)
    assert not torch.equal(turns[0], turns[1])
    assert not torch.equal(turns[0].sort().values, turns[2].sort().values)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 4), (4, 1)])
def test_redistributed_text_skips_no_document(text_folder: Path, before: int, after: int):
    sources = open_sources([str(text_folder)])
    whole = [d.text for d in sources[0].source.documents_of("train", 3, 0)]
    cursors, finished = [], set[str]()
    for rank in range(before):
        documents = Documents(sources, "train", 3, rank, before)
        read = [documents.read(0).text for _ in range(5 + rank)]
        finished |= set(read[:-1])  # the last one is still open
        cursors.append(Cursor(tuple(documents.places), open_source=0, used=7))
    left = list[str]()
    for rank in range(after):
        documents = Documents(sources, "train", 3, rank, after)
        documents.move(redistribute(cursors, rank, after).places)
        while True:
            text = documents.read(0).text
            if documents.places[0].epoch:
                break
            left.append(text)
    assert len(left) == len(set(left))
    assert finished | set(left) == set(whole)
    assert len(finished & set(left)) <= before * before
