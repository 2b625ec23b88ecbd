"""Sketches and token samples do not depend on how the text is cut, ordered or merged."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.bundles.settings import ScanSettings
from crosslayer.clt.sparse import Active
from crosslayer.features import sketch as sketch_module
from crosslayer.features.sample import TokenSample, token_hash
from crosslayer.features.sketch import LayerSketch

CONTEXT, F, SKIP = 10, 7, 1
SETTINGS = ScanSettings(n_top=2, n_quantiles=2, per_quantile=1, n_reservoir=3, window=4, before=2)


def make_active(seed: int, n_rows: int) -> list[Active]:
    """Make activations of widely different magnitude, so that histograms widen."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n_rows):
        f = torch.rand(CONTEXT - SKIP, F, generator=g)
        f = torch.where(f > 0.6, f * 2 ** torch.randint(-9, 9, f.shape, generator=g), 0.0)
        token, feature = f.nonzero(as_tuple=True)
        found.append(Active(token, feature, f[token, feature], (CONTEXT - SKIP, F)))
    return found


def sketch_of(rows: list[int], actives: list[Active]) -> LayerSketch:
    sketch = LayerSketch(1, F, 2, CONTEXT, SETTINGS, torch.device("cpu"))
    for row in rows:
        sketch.add(actives[row], row % 2, row, SKIP)
    return sketch


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14))
def test_order_cuts_and_merging_do_not_change_the_sketch(seed: int, n_rows: int):
    actives = make_active(seed, n_rows)
    whole = sketch_of(list(range(n_rows)), actives).state()
    rows = list(range(n_rows))
    random.Random(seed).shuffle(rows)
    cut = random.Random(seed + 1).randrange(n_rows + 1)
    one, two = sketch_of(rows[:cut], actives), sketch_of(rows[cut:], actives)
    again = LayerSketch(1, F, 2, CONTEXT, SETTINGS, torch.device("cpu"))
    again.restore(two.state())
    one.merge(again)
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_result_does_not_depend_on_how_often_candidates_are_ranked(monkeypatch: pytest.MonkeyPatch):
    actives = make_active(3, 60)
    once = sketch_of(list(range(60)), actives).state()
    monkeypatch.setattr(sketch_module, "COMPACT_AT_LEAST", 5)
    often = sketch_of(list(range(60)), actives).state()
    for name, array in often.items():
        np.testing.assert_array_equal(array, once[name], err_msg=name)


def test_memory_is_bounded_by_features_not_by_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sketch_module, "COMPACT_AT_LEAST", 50)
    sketch = sketch_of(list(range(300)), make_active(4, 300))
    kept = sketch.candidates()
    assert len(kept.feature) <= F * (SETTINGS.n_top + SETTINGS.n_reservoir)
    assert sketch._n_waiting == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 400))
def test_token_sample_is_the_largest_that_fits_in_any_order(seed: int, budget: int):
    actives = make_active(seed, 12)
    rows = list(range(12))
    entries = {}
    for row in rows:
        for token in range(CONTEXT - SKIP):
            entries[row * CONTEXT + SKIP + token] = int((actives[row].token_K == token).sum())
    random.Random(seed).shuffle(rows)
    parts = [TokenSample(budget), TokenSample(budget)]
    for n, row in enumerate(rows):
        parts[n % 2].add([actives[row]], row, CONTEXT, SKIP)
    again = TokenSample(budget)
    again.restore(parts[1].state())
    parts[0].merge(again)
    sample = parts[0].collected()
    positions = np.array(sorted(entries))
    chance = token_hash(positions)
    level = next(n for n in range(63) if sum(entries[p] for p in positions[(chance >> (63 - n)) == 0]) <= budget)
    np.testing.assert_array_equal(sample.position, positions[(chance >> (63 - level)) == 0])
    for i, p in enumerate(sample.position):
        row, token = p // CONTEXT, p % CONTEXT - SKIP
        own = actives[row].feature_K[actives[row].token_K == token]
        np.testing.assert_array_equal(sample.feature[sample.indptr[i] : sample.indptr[i + 1]], own.numpy())
