"""Influence, pruning and scores match their definitions on dense matrices; the bound holds for any tolerance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosslayer as xl
from crosslayer.core.errors import ConfigError
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.influence import Interval
from pairs import TOKENS, Pair


@pytest.fixture(scope="module")
def full(pair: Pair) -> Graph:
    return xl.attribute(*pair, TOKENS, tolerance=0.0)


def dense_influence(weights: np.ndarray, p: np.ndarray) -> np.ndarray:
    absolute = np.abs(weights.astype(np.float64))
    W = absolute / np.maximum(absolute.sum(1, keepdims=True), 1e-300)
    return p @ np.linalg.inv(np.eye(len(W)) - W) - p


def dense_prune(graph: Graph, node_threshold: float, edge_threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """circuit-tracer's definition, reimplemented over dense matrices."""
    A, p = graph.to_dense().astype(np.float64), graph.weight_N

    def cut(values: np.ndarray, share: float) -> float:
        ranked = np.sort(values.ravel())[::-1]
        return ranked[min(np.searchsorted(np.cumsum(ranked) / ranked.sum(), share), ranked.size - 1)]

    influence = dense_influence(A, p)
    nodes = influence >= cut(influence, node_threshold)
    nodes[graph.first_token :] = True
    A[~nodes] = 0
    A[:, ~nodes] = 0
    W = np.abs(A) / np.maximum(np.abs(A).sum(1, keepdims=True), 1e-300)
    score = W * (dense_influence(A, p) + p)[:, None]
    edges = score >= cut(score, edge_threshold)
    while True:
        before = nodes.copy()
        nodes[: graph.first_token] &= edges[:, : graph.first_token].any(0)
        nodes[: graph.n_features] &= edges[: graph.n_features].any(1)
        if (before == nodes).all():
            return nodes, edges
        edges[~nodes] = False
        edges[:, ~nodes] = False


def test_influence_is_the_sum_over_all_paths(full: Graph):
    np.testing.assert_allclose(full.influence_N, dense_influence(full.to_dense(), full.weight_N), atol=1e-7)
    ends = full.influence_N[full.first_error : full.first_target].sum()
    assert ends == pytest.approx(full.weight_N.sum(), rel=1e-6)


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.9), (0.95, 0.999)])
def test_pruning_matches_the_definition(full: Graph, thresholds: tuple[float, float]):
    nodes, edges = dense_prune(full, *thresholds)
    pruned = full.prune(*thresholds)
    assert (pruned.node_N == nodes).all()
    kept = np.zeros_like(edges)
    kept[pruned.target_E, pruned.source_E] = True
    assert (kept == edges).all()
    assert 0 < kept.sum() < (full.to_dense() != 0).sum()
    np.testing.assert_allclose(pruned.weight_E, full.to_dense()[pruned.target_E, pruned.source_E])


def test_scores_match_the_definition(full: Graph):
    A, p = full.to_dense().astype(np.float64), full.weight_N
    W = np.abs(A) / np.maximum(np.abs(A).sum(1, keepdims=True), 1e-300)
    influence = dense_influence(A, p)
    tokens, errors = influence[full.first_token :].sum(), influence[full.first_error : full.first_token].sum()
    reach, whole = influence + p, 1 - W[:, full.first_error : full.first_token].sum(1)
    s = full.scores()
    assert s.replacement.value == pytest.approx(tokens / (tokens + errors), rel=1e-5)
    assert s.completeness.value == pytest.approx((whole * reach).sum() / reach.sum(), rel=1e-5)
    has = np.concatenate([np.arange(full.n_features), np.arange(full.first_target, full.n_nodes)])
    assert s.completeness_strict.value == pytest.approx((whole * reach)[has].sum() / reach[has].sum(), rel=1e-5)
    for interval in s:
        assert interval.high - interval.low < 1e-6


@settings(max_examples=25, deadline=None)
@given(tolerance=st.floats(0.001, 0.9), limit=st.none() | st.integers(1, 60))
def test_influence_is_within_the_bound(full: Graph, pair: Pair, tolerance: float, limit: int | None):
    graph = xl.attribute(*pair, TOKENS, tolerance=tolerance, max_nodes=limit)
    total, slack = graph.weight_N.sum(), 1e-5
    if limit is None:
        assert graph.unexpanded <= tolerance + slack
    else:
        assert (graph.arrays.row_R < graph.n_features).sum() <= limit
    missing = (full.influence_N - graph.influence_N) / total
    assert missing.min() > -slack
    assert missing.max() <= graph.unexpanded + slack
    ends = [slice(graph.first_error, graph.first_token), slice(graph.first_token, graph.first_target)]
    shares = [graph.influence_N[e].sum() / total for e in ends]
    assert sum(shares) + graph.unexpanded == pytest.approx(1, abs=1e-4)
    for e, share in zip(ends, shares, strict=True):
        assert -slack <= full.influence_N[e].sum() / total - share <= graph.unexpanded + slack
    for true, interval in zip(full.scores(), graph.scores(), strict=True):
        assert interval.low - slack <= true.value <= interval.high + slack
        assert interval.low <= interval.value <= interval.high


@settings(max_examples=15, deadline=None)
@given(tolerance=st.floats(0.01, 0.5))
def test_stored_share_of_rows_and_exact_sums(pair: Pair, tolerance: float):
    graph = xl.attribute(*pair, TOKENS, tolerance=tolerance)
    mass_R4 = graph.arrays.mass_R4
    assert (mass_R4[:, 3] <= tolerance / 10 * mass_R4[:, :3].sum(1) + 1e-5).all()
    assert graph.sum_error() < 1e-4


def test_more_nodes_never_explain_less(pair: Pair):
    shares = [xl.attribute(*pair, TOKENS, tolerance=0.0, max_nodes=n).unexpanded for n in (3, 10, 30, 90)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_full_subgraph_scores_as_the_graph_and_smaller_ones_less(full: Graph):
    whole = full.subgraph_scores(range(full.n_features))
    for one, two in zip(whole, full.scores(), strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-5)
    best = np.argsort(-full.influence_N[: full.n_features])[:20].tolist()
    part, none = full.subgraph_scores(best), full.subgraph_scores([])
    assert none.replacement.value < part.replacement.value < whole.replacement.value
    assert part.completeness_strict.value < whole.completeness_strict.value


@settings(max_examples=25, deadline=None)
@given(
    tolerance=st.floats(0.001, 0.9), limit=st.none() | st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 9)
)
def test_subgraph_scores_of_an_incomplete_graph_contain_the_true_ones(
    full: Graph, pair: Pair, tolerance: float, limit: int | None, share: float, seed: int
):
    graph = xl.attribute(*pair, TOKENS, tolerance=tolerance, max_nodes=limit)
    keep = np.flatnonzero(np.random.default_rng(seed).random(full.n_features) < share).tolist()
    for true, interval in zip(full.subgraph_scores(keep), graph.subgraph_scores(keep), strict=True):
        assert interval.low - 1e-5 <= true.value <= interval.high + 1e-5
        assert interval.low <= interval.value <= interval.high
        assert true.high - true.low < 1e-5


def greedy_left(full: Graph, n_nodes: int) -> float:
    """Influence left if the node with the largest is expanded, and all are ranked again, `n_nodes` times."""
    W = np.abs(full.to_dense().astype(np.float64))
    W /= np.maximum(W.sum(1, keepdims=True), 1e-300)
    has_row = np.arange(full.n_nodes) >= full.first_target
    p = full.weight_N / full.weight_N.sum()
    for step in range(n_nodes + 1):
        rows = np.where(has_row[:, None], W, 0.0)
        left = np.where(has_row, 0.0, p @ np.linalg.inv(np.eye(len(W)) - rows) - p)[: full.n_features]
        if step < n_nodes:
            has_row[left.argmax()] = True
    return float(left.sum())


@pytest.mark.parametrize("n_nodes", [5, 20, 40])
def test_max_nodes_are_spent_by_influence(full: Graph, pair: Pair, n_nodes: int):
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0, max_nodes=n_nodes)
    assert (graph.arrays.row_R < graph.n_features).sum() == n_nodes
    best = greedy_left(full, n_nodes)
    assert graph.unexpanded <= 1.1 * best + 0.01
    assert best < 0.9


def test_removed_feature_counts_as_error(full: Graph):
    """By definition, the feature's column is added to the errors and its row is removed."""
    left = int(np.argmax(full.influence_N[: full.n_features]))
    A = full.to_dense().astype(np.float64)
    A[:, full.first_error] = np.abs(A[:, full.first_error]) + np.abs(A[:, left])
    A[:, left] = 0
    A[left] = 0
    influence = dense_influence(A, full.weight_N)
    tokens, errors = influence[full.first_token :].sum(), influence[full.first_error : full.first_token].sum()
    keep = [n for n in range(full.n_features) if n != left]
    assert full.subgraph_scores(keep).replacement.value == pytest.approx(tokens / (tokens + errors), rel=1e-5)


def test_bad_thresholds_and_nodes_are_refused(full: Graph):
    with pytest.raises(ConfigError, match=r"node_threshold=1\.5 must be between 0 and 1"):
        full.prune(1.5)
    with pytest.raises(ConfigError, match="is no feature of the graph"):
        full.subgraph_scores([full.n_features])
    assert isinstance(full.scores().replacement, Interval)
    assert torch.tensor(full.header.tokens).tolist() == TOKENS
