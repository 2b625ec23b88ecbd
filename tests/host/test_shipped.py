"""Capabilities of the bundled host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crosslayer.host.host import SHIPPED, SHIPPED_FOLDER, Host, load_host


@pytest.fixture(scope="module")
def shipped() -> Host:
    return load_host(SHIPPED)


def probability(host: Host, prompt: str, expected: str) -> float:
    """Return the probability of the first token of `expected` after the prompt."""
    logits = host.run(host.encode(prompt))
    token = host.tokenizer.encode(expected, add_special_tokens=False)[0]
    return logits[0, -1].softmax(-1)[token].item()


def continuation(host: Host, prompt: str, n: int) -> str:
    """Generate `n` tokens greedily."""
    ids = host.encode(prompt)
    for _ in range(n):
        ids = torch.cat([ids, host.run(ids)[:, -1:].argmax(-1)], dim=1)
    return host.tokenizer.decode(ids[0, 1:].tolist())[len(prompt) :]


def test_size_and_shape(shipped: Host):
    assert sum(p.stat().st_size for p in Path(SHIPPED_FOLDER).iterdir()) <= 12 * 2**20
    assert shipped.n_layers >= 6
    assert shipped.d_model >= 192
    assert shipped.first_token == shipped.n_vocab - 1
    assert shipped.tokenizer.decode([shipped.first_token]) == "<|endoftext|>"


def test_a_method_takes_self(shipped: Host):
    assert probability(shipped, "class Stack:\n    def __init__(", "self") > 0.8
    assert continuation(shipped, "class Stack:\n    def push", 3).startswith("(self")


@pytest.mark.parametrize(
    ("prompt", "bracket"), [("    return isinstance(value, str", ")"), ("value = (1 + 2", ")"), ("names = [name", "]")]
)
def test_brackets_are_closed(shipped: Host, prompt: str, bracket: str):
    line = continuation(shipped, prompt, 16).split("\n")[0]
    assert bracket in line, line


def test_a_block_is_indented(shipped: Host):
    for prompt in ("def run(self):\n", "    for name in names:\n"):
        own = len(prompt) - len(prompt.lstrip())
        written = continuation(shipped, prompt, 2)
        assert len(written) - len(written.lstrip(" ")) >= own + 4, repr(written)


def test_a_name_seen_before_is_copied(shipped: Host):
    context = "def frobnicate(zibbler):\n    if zibbler is None:\n        return\n    print(zib"
    assert continuation(shipped, context, 2).startswith("bl")


def test_repeated_random_tokens_are_predicted_the_second_time(shipped: Host):
    ids = torch.randint(300, 1800, (8, 40), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.full((8, 1), shipped.first_token), ids, ids], dim=1)
    logp = shipped.run(rows)[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    first, second = -logp[:, 1:40].mean(), -logp[:, 41:].mean()
    assert second < first - 2.0, (first, second)


def test_the_tokenizer_is_of_a_class_that_transformers_4_and_5_know():
    """circuit-tracer opens the host with transformers 4; AutoTokenizer goes by the class that the folder names."""
    settings = json.loads((SHIPPED_FOLDER / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in settings
