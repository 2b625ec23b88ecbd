"""Rules find what a feature fires on, and their metrics are correct."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from crosslayer.features.attributes import KINDS, Attribute, Vocabulary, attributes_of, next_tokens, places_of
from crosslayer.features.rules import MIN_AUROC, Rules, measuring_half, rules
from crosslayer.features.sample import Sampled
from made_bundle import Made

STRINGS = ["<|end|>", "a", " b", " c", "\n", "    ", "(", ")", "1", "Дом", " def", "[", "]", " x", " y", "Name", "NAME"]
VOCABULARY = Vocabulary(STRINGS, special=[0])
CONTEXT, ROWS = 20, 400


def text(seed: int = 0) -> NDArray:
    rows = np.random.default_rng(seed).integers(1, len(STRINGS), (ROWS, CONTEXT))
    rows[:, 0] = 0
    return rows


def sampled_of(fires_BTF: NDArray) -> Sampled:
    """All tokens except the first of each row."""
    inside = fires_BTF[:, 1:].reshape(-1, fires_BTF.shape[2])
    position = (np.arange(ROWS)[:, None] * CONTEXT + np.arange(1, CONTEXT)).reshape(-1)
    matrix = csr_array(inside)
    return Sampled(
        position, matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float16)
    )


def found_for(fires_BTF: NDArray, rows: NDArray, promoted: NDArray | None = None) -> Rules:
    n = fires_BTF.shape[2]
    sampled = sampled_of(fires_BTF)
    attributes = attributes_of(sampled.position, rows, VOCABULARY)
    promoted = np.full((n, 2), len(STRINGS) + 5) if promoted is None else promoted
    density = fires_BTF[:, 1:].any(axis=(0, 1)) * fires_BTF[:, 1:].astype(bool).mean(axis=(0, 1))
    return rules(sampled, attributes, rows, promoted, 1, density, lambda ids: str(list(ids)))


def test_planted_features_are_found_and_labelled():
    rows = text()
    previous = np.roll(rows, 1, axis=1)
    place = np.broadcast_to(np.arange(CONTEXT), rows.shape)
    following = np.roll(rows, -1, axis=1)
    brackets = places_of(rows, VOCABULARY).bracket
    planted = {
        "token": (rows == 2, "“ b”"),
        "tokens": (np.isin(rows, [2, 3, 8]), "(“ b”|“ c”|“1”), (“ b”|“ c”|“1”), (“ b”|“ c”|“1”)$"),
        "previous": (previous == 10, "after “ def”"),
        "n-gram": ((previous == 10) & (rows == 13), "“ def x”"),
        "position": ((place >= 1) & (place <= 2), "positions 1–2 of a document"),
        "kind": (np.isin(VOCABULARY.kind_V[rows], [KINDS.index("opening brackets")]), "“\\(”, “\\[”|“\\[”, “\\(”"),
        "brackets": (brackets == 2, r"inside \[…\]"),
        "promotes": ((following == 9) & (place < CONTEXT - 1), r"promotes \[9, 14\]"),
        "dense": (np.random.default_rng(1).random(rows.shape) < 0.4, "dense: fires on 4.% of tokens"),
        "dead": (np.zeros(rows.shape, bool), "dead: did not fire"),
        "chance": (np.random.default_rng(2).random(rows.shape) < 0.05, None),
    }
    fires = np.stack([f for f, _ in planted.values()], axis=2).astype(float)
    promoted = np.full((len(planted), 2), 16)
    promoted[list(planted).index("promotes")] = (9, 14)
    found = found_for(fires, rows, promoted)
    for n, (name, (_, label)) in enumerate(planted.items()):
        if label is None:
            assert found.label[n] is None, name
        else:
            assert found.label[n] is not None, name
            pytest.importorskip("re").fullmatch(label, found.label[n]) or pytest.fail(f"{name}: {found.label[n]}")
        if name not in ("dense", "dead", "chance", "promotes"):
            assert found.auroc[n] == pytest.approx(1.0), name
            assert (found.precision[n], found.recall[n]) == (1.0, 1.0), name
    # The label names both promoted tokens, and the second does not follow: precision is one half.
    n = list(planted).index("promotes")
    assert found.recall[n] == 1.0
    assert found.precision[n] == pytest.approx(0.5, abs=0.1)


def test_metrics_are_of_held_out_text(made: Made):
    """Recompute precision, recall and AUROC token by token from the values that a bundle stores."""
    bundle, rows = made.bundle, made.rows_BT
    f = made.activations() > 0
    strings = bundle.vocabulary
    vocabulary = Vocabulary(strings, made.host.tokenizer.all_special_ids)
    places = places_of(rows, vocabulary)
    positions = np.arange(rows.size).reshape(rows.shape)
    here = measuring_half(positions.reshape(-1), rows.shape[1]).reshape(rows.shape)
    here[:, : made.host.policy.n_skip] = False
    before = np.roll(rows, 1, axis=1)
    before[:, 0] = -1
    following = next_tokens(positions.reshape(-1), rows).reshape(rows.shape)
    checked = set()
    for n in range(bundle.n_layers * bundle.n_features):
        rule = bundle.feature(*bundle.place(n)).rule
        if rule is None or rule.auroc is None:
            continue
        values = {tuple(v) if isinstance(v, list) else v for v in rule.values}
        match rule.kind:
            case "token":
                says = np.isin(rows, list(values))
            case "previous token":
                says = np.isin(before, list(values))
            case "n-gram":
                says = np.array(
                    [
                        [(int(a), int(b)) in values for a, b in zip(p, t, strict=True)]
                        for p, t in zip(before, rows, strict=True)
                    ]
                )
            case "promotes":
                says = np.isin(following, list(values))
            case "kind":
                says = np.isin(vocabulary.kind_V[rows], list(values))
            case "line":
                says = np.isin(places.head, list(values))
            case _:
                continue
        checked.add(rule.kind)
        fires = f[:, :, n]
        hits = (says & fires & here).sum()
        recall, false = hits / (fires & here).sum(), (says & ~fires & here).sum() / (~fires & here).sum()
        assert rule.precision == pytest.approx(hits / max((says & here).sum(), 1)), rule.kind
        assert rule.recall == pytest.approx(recall)
        assert rule.auroc == pytest.approx((1 + recall - false) / 2)
        assert (bundle.feature(*bundle.place(n)).label is not None) == (rule.auroc >= MIN_AUROC)
    assert "token" in checked


def test_label_is_chosen_without_the_held_out_half():
    """Where the two halves disagree, the metrics show it: a rule chosen on one half is useless on the other."""
    rows = text(1)
    positions = np.arange(rows.size).reshape(rows.shape)
    measures = measuring_half(positions.reshape(-1), CONTEXT).reshape(rows.shape)
    fires = np.where(measures, rows == 3, rows == 2)[:, :, None].astype(float)
    found = found_for(fires, rows)
    assert json.loads(found.values[0] or "") == [2]
    assert (found.precision[0], found.recall[0]) == (0.0, 0.0)
    assert found.auroc[0] < 0.5
    assert found.label[0] is None


def test_lines_and_brackets_are_tracked():
    rows = np.array([[0, 10, 6, 11, 1, 12, 7, 4, 5, 10, 13]])
    places = places_of(rows, VOCABULARY)
    assert places.in_document[0].tolist() == list(range(11))
    assert places.bracket[0].tolist() == [0, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0]
    assert places.head[0].tolist() == [-1, 10, 10, 10, 10, 10, 10, -1, -1, 10, 10]
    assert places.indent[0].tolist()[8:] == [4, 4, 4]


def test_kinds_and_scripts():
    kinds = {s: KINDS[k] for s, k in zip(STRINGS, VOCABULARY.kind_V, strict=True)}
    assert kinds["<|end|>"] == "special tokens"
    assert kinds["\n"] == "line breaks"
    assert kinds["    "] == "indentation"
    assert kinds["("] == "opening brackets"
    assert kinds["1"] == "numbers"
    assert kinds["Дом"] == "letters of other scripts"
    assert kinds[" def"] == "lower-case words"
    assert VOCABULARY.scripts[VOCABULARY.script_V[9]] == "Cyrillic"


def test_every_attribute_gives_each_token_one_value():
    rows = text(2)
    position = (np.arange(ROWS)[:, None] * CONTEXT + np.arange(1, CONTEXT)).reshape(-1)
    for attribute in attributes_of(position, rows, VOCABULARY):
        assert isinstance(attribute, Attribute)
        assert len(attribute.value) == len(position)
        values = np.unique(attribute.value[attribute.value >= 0]).tolist()
        assert attribute.say(values[:1])
        assert json.dumps([attribute.key(v) for v in values])
