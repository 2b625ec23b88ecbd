"""Suggested supernodes and predicted changes match their definitions."""

from __future__ import annotations

import numpy as np
import pytest

import crosslayer as xl
from crosslayer.graphs.circuit import LIKENESS, MOST_APART, predicted_changes, suggested
from pairs import TOKENS, make_pair


@pytest.fixture(scope="module")
def traced() -> xl.Graph:
    return xl.attribute(*make_pair(n_features=60, seed=3), TOKENS, tolerance=0.0)


def test_predicted_changes_are_the_linear_propagation(traced: xl.Graph):
    dense, a = traced.to_dense().astype(np.float64), traced.arrays
    factors = {0: 0.0, 3: 2.5, int(traced.n_features // 2): -1.0}
    F = traced.n_features
    # Activations after the change solve a triangular system: each feature's own activation plus the
    # contributions of its inputs' relative changes.
    share = np.zeros(traced.n_nodes)
    change = np.zeros(traced.n_nodes)
    for n in list(range(F)) + list(range(traced.first_target, traced.n_nodes)):
        if n in factors:
            share[n] = factors[n] - 1
            change[n] = share[n] * a.activation_F[n]
        else:
            change[n] = dense[n] @ share
            if n < F:
                share[n] = change[n] / a.activation_F[n]
    np.testing.assert_allclose(predicted_changes(traced, factors), change, rtol=1e-5, atol=1e-6)
    assert not predicted_changes(traced, {0: 1.0}).any()


def test_suggested_supernodes_are_close_similar_and_disjoint(traced: xl.Graph):
    F, a = traced.n_features, traced.arrays
    found = suggested(traced, range(F), likeness=0.3)
    assert found
    taken = [n for s in found for n in s.nodes]
    assert len(taken) == len(set(taken))
    dense = traced.to_dense().astype(np.float64)
    weight = dense / np.maximum(np.abs(dense).sum(1, keepdims=True), 1e-30)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))

    for s in found:
        assert len(s.nodes) > 1
        pairs = [(i, j) for i in s.nodes for j in s.nodes if i < j]
        likeness = [(cosine(weight[i], weight[j]) + cosine(weight[:, i], weight[:, j])) / 2 for i, j in pairs]
        assert min(likeness) >= 0.3 - 1e-6
        assert s.likeness == pytest.approx(np.mean(likeness), abs=1e-5)
        assert all(abs(int(a.position_F[i]) - int(a.position_F[j])) <= MOST_APART for i, j in pairs)
    assert len(suggested(traced, range(F), likeness=LIKENESS)) <= len(found) + F
    assert suggested(traced, [0]) == []
