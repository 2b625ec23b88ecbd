"""Tokens of documents: special tokens, chats, tokenised text, and tokenizers that find nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import tiny
from crosslayer.core.errors import SourceError
from crosslayer.data.documents import Document
from crosslayer.data.rows import Documents, RowStream, document_tokens, held_out_rows
from crosslayer.data.sources import ListedSource, Weighted, open_sources
from crosslayer.host.host import Host, load_host
from crosslayer.schemas.policy import FirstPosition
from crosslayer.training.config import TrainConfig
from crosslayer.training.setup import units_of_text

BOS, TURN = "<bos>", "<|im_start|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def with_tokenizer(host: Host, tokenizer: Any, policy: FirstPosition | None = None) -> Host:
    return Host(host.model, tokenizer, "tiny", policy=policy)


@pytest.fixture
def chatty(host: Host) -> Host:
    """A host whose tokenizer has a BOS token, a special token that is not named in its config, and a template."""
    tokenizer = copy.deepcopy(host.tokenizer)
    tokenizer.backend_tokenizer.add_special_tokens([BOS, AddedToken(TURN, special=True)])
    tokenizer.bos_token, tokenizer.chat_template = BOS, TEMPLATE
    made = with_tokenizer(host, tokenizer)
    made.n_vocab = len(tokenizer)
    return made


def ids(host: Host, text: str) -> list[int]:
    return host.tokenizer.encode(text, add_special_tokens=False)


def tokens(host: Host, value: Any, kind: Any = "text") -> list[int]:
    return document_tokens(host, Document("0", value if kind == "text" else json.dumps(value), kind))


def test_special_tokens_in_a_text_are_left_out(chatty: Host):
    (bos,), (turn,) = ids(chatty, BOS), ids(chatty, TURN)
    assert {bos, turn} <= chatty.special_ids
    words = ids(chatty, "value name")
    assert tokens(chatty, "value name") == [bos, *words]
    assert tokens(chatty, f"{BOS}value{TURN} name{tiny.EOT}{BOS}") == [bos, *words]
    assert tokens(chatty, f"{TURN}{BOS}") == []


def test_no_special_token_is_in_front_without_prepend(chatty: Host):
    bare = with_tokenizer(chatty, chatty.tokenizer, FirstPosition(prepend=False))
    assert tokens(bare, f"{BOS}value") == ids(bare, "value")


def test_chats_follow_the_template_and_begin_with_one_bos(chatty: Host):
    chat = [{"role": "user", "content": "print"}, {"role": "assistant", "content": "value"}]
    expected = ids(chatty, f"{BOS}{TURN}user: print\n{TURN}assistant: value\n")
    assert tokens(chatty, chat, "messages") == expected
    assert expected.count(expected[0]) == 1
    chatty.tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert tokens(chatty, chat, "messages") == expected


def test_chats_that_the_tokenizer_cannot_write_are_refused(host: Host, chatty: Host):
    with pytest.raises(SourceError, match=r"no chat template.*--column$"):
        tokens(host, [{"role": "user", "content": "print"}], "messages")
    with pytest.raises(SourceError, match="refuses messages of the roles user, tool: no tools here; correct"):
        tokens(chatty, [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "messages")


def test_token_ids_are_used_as_they_are(chatty: Host):
    (bos,), (turn,) = ids(chatty, BOS), ids(chatty, TURN)
    assert tokens(chatty, [5, turn, 6], "input_ids") == [bos, 5, turn, 6]
    assert tokens(chatty, [bos, 5, turn, 6], "input_ids") == [bos, 5, turn, 6]
    for wrong in (-1, chatty.n_vocab):
        with pytest.raises(
            SourceError, match=f"input_ids hold {wrong}, but the vocabulary of tiny has {chatty.n_vocab}"
        ):
            tokens(chatty, [5, wrong], "input_ids")


def test_prompts_get_bos_unless_they_begin_with_it(chatty: Host):
    (bos,), (turn,) = ids(chatty, BOS), ids(chatty, TURN)
    assert chatty.encode(f"{TURN}value")[0, :2].tolist() == [bos, turn]
    assert chatty.encode(f"{BOS}{TURN}value")[0, :2].tolist() == [bos, turn]


def test_the_shipped_tokenizer_leaves_out_its_special_token():
    shipped = load_host("stdlib-qwen3")
    assert tokens(shipped, f"a = 1{tiny.EOT}") == tokens(shipped, "a = 1")


class Selective:
    """A tokenizer that finds tokens only in texts with a certain word."""

    def __init__(self, inner: Any, word: str) -> None:
        self.inner, self.word = inner, word

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return self.inner.encode(text, **kwargs) if self.word in text else []


def listed(n: int) -> list[Weighted]:
    documents = [Document(f"document {i}", ("some value " if i % 3 else "nothing ") + str(i)) for i in range(n)]
    return [Weighted(ListedSource("made up", documents), 1.0)]


def test_documents_without_tokens_are_skipped(host: Host):
    picky = with_tokenizer(host, Selective(host.tokenizer, "value"))
    rows_BT = RowStream(picky, Documents(listed(60), "train", 0), 17).rows(20)
    assert "nothing" not in host.tokenizer.decode(rows_BT.flatten().tolist())
    assert not ((rows_BT[:, 1:-1] == host.first_token) & (rows_BT[:, 2:] == host.first_token)).any()
    assert held_out_rows(picky, listed(600), 17, 100).shape == (7, 17)


@pytest.mark.parametrize("prepend", [True, False])
def test_a_tokenizer_without_tokens_is_refused(host: Host, tiny_config: TrainConfig, text_folder: Path, prepend: bool):
    from rich.console import Console

    from crosslayer import parallel

    silent = with_tokenizer(host, Selective(host.tokenizer, "no such word"), FirstPosition(prepend=prepend))
    sources = open_sources([str(text_folder)])
    words = "the tokenizer of tiny finds no tokens in the text of .*; check the tokenizer"
    with pytest.raises(SourceError, match=words):
        RowStream(silent, Documents(sources, "train", 0), 17).rows(1)
    with pytest.raises(SourceError, match=words):
        held_out_rows(silent, sources, 17, 100)
    with pytest.raises(SourceError, match=words):
        units_of_text(tiny_config, silent, sources, parallel.lay_out(1, "cpu"), "cpu", Console(quiet=True))


def test_rows_of_documents_of_all_kinds_resume(chatty: Host, tmp_path: Path):
    chat = lambda i: [{"role": "user", "content": tiny.make_text(30, i)}]  # noqa: E731
    records = [
        {"text": tiny.make_text(40, i)}
        if i % 3 == 0
        else {"messages": chat(i)}
        if i % 3 == 1
        else {"input_ids": ids(chatty, tiny.make_text(30, i))}
        for i in range(90)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    make = lambda: RowStream(chatty, Documents(open_sources([str(tmp_path / "a.jsonl")]), "train", 0), 17)  # noqa: E731
    stream = make()
    stream.rows(41)
    again = make()
    again.cursor = stream.cursor
    assert torch.equal(again.rows(50), stream.rows(50))
