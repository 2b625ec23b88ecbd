"""The first-position policy: prepended tokens and skipped positions."""

from __future__ import annotations

import torch

import tiny
from crosslayer.data.stream import collect_activations
from crosslayer.host.host import Host
from crosslayer.schemas.policy import FirstPosition


def test_text_begins_with_a_special_token_once(host: Host):
    ids = host.encode("def name").tolist()[0]
    assert ids[0] == tiny.N_VOCAB - 1
    assert host.encode("<|endoftext|>def name").tolist()[0] == ids


def test_without_prepend_text_gets_no_special_token(host: Host):
    bare = Host(host.model, host.tokenizer, "bare", policy=FirstPosition(prepend=False))
    assert bare.encode("def name").tolist()[0] == host.encode("def name").tolist()[0][1:]


def test_collected_activations_exclude_exactly_the_first_positions(host: Host):
    rows_BT = torch.arange(20).view(2, 10)
    everything = host.tap(rows_BT)
    for n_skip in (0, 1, 4):
        policy_host = Host(host.model, host.tokenizer, "skip", policy=FirstPosition(n_skip=n_skip))
        x_BLD, y_BLD = collect_activations(policy_host, rows_BT)
        torch.testing.assert_close(x_BLD, everything.x_BTLD[:, n_skip:].flatten(0, 1))
        torch.testing.assert_close(y_BLD, everything.y_BTLD[:, n_skip:].flatten(0, 1))
