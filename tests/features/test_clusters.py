"""Planted clusters are found, nested, kept together on the map and labelled; lineage matches its definition."""

from __future__ import annotations

import itertools
import math
import random

import igraph
import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from crosslayer.core.errors import ConfigError
from crosslayer.features import clusters, feature_map, neighbour_graph

N_CLUSTERS, SIZE, DEAD = 24, 15, 10
N = N_CLUSTERS * SIZE + DEAD


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists of 12 neighbours and each feature's cluster.

    Ten neighbours are near and in the same cluster, two are anywhere and far. Dead features at the end have cluster -1.
    """
    chance = np.random.default_rng(seed)
    cluster_N = np.append(np.repeat(np.arange(N_CLUSTERS), SIZE), np.full(DEAD, -1))
    ids, similarity = np.full((N, 12), -1, np.int32), np.zeros((N, 12), np.float32)
    for n in range(N - DEAD):
        same = np.flatnonzero((cluster_N == cluster_N[n]) & (np.arange(N) != n))
        ids[n] = np.append(chance.choice(same, 10, replace=False), chance.integers(N - DEAD, size=2))
        similarity[n] = np.append(chance.uniform(0.5, 1, 10), chance.uniform(0, 0.05, 2))
    return ids, similarity, cluster_N


@pytest.fixture(scope="module")
def cluster_N() -> np.ndarray:
    return planted()[2]


@pytest.fixture(scope="module")
def graph(cluster_N: np.ndarray) -> csr_array:
    ids, similarity, _ = planted()
    return neighbour_graph.neighbour_graph({"encoder": (ids, similarity)}, {"encoder": 1.0}, cluster_N >= 0)


@pytest.fixture(scope="module")
def groups_GN(graph: csr_array) -> np.ndarray:
    return clusters.groups(graph)


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = len(set(zip(first.tolist(), second.tolist(), strict=True)))
    return pairs == len(set(first.tolist())) == len(set(second.tolist()))


def test_neighbour_graph_matches_its_definition():
    chance = np.random.default_rng(0)
    n, k = 30, 4
    live = chance.random(n) < 0.8
    lists = {
        kind: (
            np.stack([chance.choice(n, k, replace=False) for _ in range(n)]).astype(np.int32),
            chance.uniform(-1, 1, (n, k)).astype(np.float32),
        )
        for kind in neighbour_graph.KINDS
    }
    lists["decoder"][0][:, 2] = -1
    lists["decoder"][1][0] = np.nan
    weights = {"coactivation": 1.0, "encoder": 0.0, "decoder": 0.5}
    expected = np.zeros((n, n))
    for kind, (ids, similarity) in lists.items():
        one = np.zeros((n, n))
        for i in range(n):
            for j, s in zip(ids[i], similarity[i], strict=True):
                if j >= 0 and i != j and live[i] and live[j] and s > 0:
                    one[i, j] = weights[kind] * s
        expected += np.maximum(one, one.T)
    got = neighbour_graph.neighbour_graph(lists, weights, live)
    np.testing.assert_allclose(got.toarray(), expected, rtol=1e-6)
    assert (got.data > 0).all()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_invalid_weights_are_refused(weight: float):
    with pytest.raises(ConfigError, match=rf"encoder={weight} .*; give 0"):
        neighbour_graph.neighbour_graph({}, {"encoder": weight}, np.ones(2, bool))


def test_unknown_kinds_are_refused():
    none = np.full((2, 1), -1, np.int32), np.zeros((2, 1), np.float32)
    with pytest.raises(ConfigError, match=r"'encode'.*give weights to coactivation, encoder, decoder"):
        neighbour_graph.neighbour_graph({}, {"encode": 1.0}, np.ones(2, bool))
    with pytest.raises(ConfigError, match="'encode'"):
        neighbour_graph.neighbour_graph({"encode": none}, {"encoder": 1.0}, np.ones(2, bool))
    with pytest.raises(ConfigError, match="all cluster weights are 0"):
        neighbour_graph.neighbour_graph({}, {"encoder": 0.0}, np.ones(2, bool))


def test_planted_clusters_are_found(groups_GN: np.ndarray, cluster_N: np.ndarray):
    assert any(same_partition(level, cluster_N) for level in groups_GN)


def test_levels_follow_clusters_of_clusters():
    n, chance = 4800, np.random.default_rng(0)
    tiers = [np.arange(n) // size for size in (12, 120, 1200)]
    # Neighbours in the same cluster, and fewer and weaker ones in the wider clusters.
    ids = np.concatenate(
        [
            chance.integers(size, size=(n, k)) + tier[:, None] * size
            for tier, size, k in zip(tiers, (12, 120, 1200), (8, 5, 3), strict=True)
        ],
        axis=1,
    )
    similarity = np.broadcast_to(np.repeat([0.9, 0.4, 0.2], [8, 5, 3]), ids.shape)
    near = {"decoder": (ids.astype(np.int32), similarity.astype(np.float32))}
    groups_GN = clusters.groups(neighbour_graph.neighbour_graph(near, {"decoder": 1.0}, np.ones(n, bool)))
    assert [len(set(level.tolist())) for level in groups_GN[:1]] == pytest.approx([400], rel=0.3)
    assert len(set(groups_GN[-1].tolist())) <= 12
    for level in groups_GN:
        # Nearly all of a group is from one of the four: no level mixes the most distant clusters.
        main = [np.bincount(tiers[2][level == g]).max() for g in range(level.max() + 1)]
        assert sum(main) / n > 0.95


def test_groups_are_nested(groups_GN: np.ndarray):
    for fine, coarse in itertools.pairwise(groups_GN):
        assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == len(set(fine.tolist()))


def test_groups_are_numbered_by_size_and_first_member(groups_GN: np.ndarray):
    for level in groups_GN:
        numbers, first, sizes = np.unique(level[level >= 0], return_index=True, return_counts=True)
        assert numbers.tolist() == list(range(len(numbers)))
        assert sorted(zip(-sizes, first, strict=True)) == list(zip(-sizes, first, strict=True))


def test_finest_groups_are_not_too_small(groups_GN: np.ndarray):
    assert np.bincount(groups_GN[0][groups_GN[0] >= 0]).min() >= clusters.SMALLEST


def test_dead_features_have_no_group_and_no_position(graph: csr_array, groups_GN: np.ndarray, cluster_N: np.ndarray):
    xy = feature_map.layout(graph, groups_GN[0])
    assert ((groups_GN >= 0) == (cluster_N >= 0)).all()
    assert (np.isnan(xy).all(1) == (cluster_N < 0)).all()
    assert np.isfinite(xy[cluster_N >= 0]).all()


def test_only_dead_features():
    empty = csr_array((4, 4), dtype=np.float32)
    groups_GN = clusters.groups(empty, n_levels=3)
    assert groups_GN.tolist() == [[-1] * 4] * 3
    assert np.isnan(feature_map.layout(empty, groups_GN[0])).all()
    assert clusters.group_labels(groups_GN[0], [None] * 4, np.zeros(4)) == []


def test_single_pair():
    pair = csr_array(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32))
    groups_GN = clusters.groups(pair)
    assert groups_GN[-1].tolist() == [0, 0, -1]
    assert np.isfinite(feature_map.layout(pair, groups_GN[0])[:2]).all()


def test_result_does_not_depend_on_random_state(graph: csr_array, groups_GN: np.ndarray):
    random.seed(5)
    again = clusters.groups(graph)
    np.testing.assert_array_equal(again, groups_GN)
    first = feature_map.layout(graph, again[0], seed=3)
    random.seed(6)
    np.testing.assert_array_equal(feature_map.layout(graph, again[0], seed=3), first)


def test_igraph_random_generator_is_restored():
    # Not through `groups`: beartype, which checks the package in tests, also uses `random`.
    drawn = lambda: igraph.Graph.Erdos_Renyi(n=30, p=0.2).get_edgelist()  # noqa: E731
    before = random.getstate()
    with clusters._chance(0):
        first = drawn()
    with clusters._chance(0):
        assert drawn() == first
    assert random.getstate() == before
    random.seed(1)
    free = drawn()
    random.seed(1)
    assert drawn() == free != first


def test_order_of_features_does_not_matter(graph: csr_array, cluster_N: np.ndarray):
    order = np.random.default_rng(1).permutation(N)
    shuffled = clusters.groups(csr_array(graph[order][:, order]))
    assert any(same_partition(level, cluster_N[order]) for level in shuffled)


def share_in_the_same_cluster(xy: np.ndarray, cluster_N: np.ndarray) -> float:
    live = np.flatnonzero(cluster_N >= 0)
    near = live[cKDTree(xy[live]).query(xy[live], k=9)[1][:, 1:]]
    return float((cluster_N[near] == cluster_N[live][:, None]).mean())


@pytest.mark.parametrize("seed", range(3))
def test_feature_map_keeps_clusters_together(graph: csr_array, groups_GN: np.ndarray, cluster_N: np.ndarray, seed: int):
    xy = feature_map.layout(graph, groups_GN[0], seed)
    assert xy.dtype == np.float32
    np.testing.assert_allclose(np.nanmean(xy, 0), 0, atol=1e-3)
    assert share_in_the_same_cluster(xy, cluster_N) > 0.9


def test_feature_map_separates_unconnected_clusters(cluster_N: np.ndarray):
    blocks = csr_array(
        np.where((cluster_N[:, None] == cluster_N) & (cluster_N >= 0), 1.0, 0.0) - np.diag(cluster_N >= 0)
    )
    groups_GN = clusters.groups(blocks)
    assert same_partition(groups_GN[-1], cluster_N)
    assert share_in_the_same_cluster(feature_map.layout(blocks, groups_GN[0]), cluster_N) > 0.9


def test_group_labels_are_distinctive():
    groups_N = np.repeat([0, 1, 2, 3], 5)
    labels = [
        *["“ dog”, “ a”", "“ dog”, “ cat”", "“ dog”, “ the”", "“ cat”, “ a”", None],
        *["after “ in”", "after “ in”", "after “ in”", "“ a”, “ the”", "“ the”"],
        *["digits of years", "years in brackets", "the years before", "", "ends of years"],
        *[None] * 5,
    ]
    got = clusters.group_labels(groups_N, labels, np.ones(20))
    assert got[0].split(" · ")[:2] == ["“ dog”", "“ cat”"]
    assert got[1].startswith("after “ in”")
    assert got[2].startswith("years")
    assert got[3] == "unlabelled"
    assert [len(g.split(" · ")) <= 1 for g in clusters.group_labels(groups_N, labels, np.ones(20), n_words=1)] == [
        True
    ] * 4


def test_common_phrases_are_not_labels():
    labels = ["alpha common", "alpha mixed common", "beta common", "beta mixed common"]
    assert clusters.group_labels(np.array([0, 0, 1, 1]), labels, np.ones(4)) == ["alpha", "beta"]


def test_confident_labels_count_more():
    labels = ["“a”", "“a”", "“b”", "“b”", "“c”", "“c”"]
    score_N = np.array([0.3, 0.3, 0.9, 0.9, np.nan, 0.5])
    assert clusters.group_labels(np.array([0, 0, 0, 0, 1, 1]), labels, score_N)[0] == "“b” · “a”"


def test_lineage_matches_its_definition():
    chance = np.random.default_rng(0)
    n, k, n_groups, top = 200, 6, 9, 3
    groups_N = chance.integers(-1, n_groups, n).astype(np.int32)
    layer_N = chance.integers(0, 4, n)
    ids, weight = chance.integers(-1, n, (n, k)).astype(np.int32), chance.normal(size=(n, k)).astype(np.float32)
    depth = [layer_N[groups_N == g].mean() for g in range(n_groups)]
    got = clusters.lineage(groups_N, layer_N, ids, weight, top)
    assert (got.ids_GK.dtype, got.share_GK.dtype) == (np.int32, np.float32)
    for g in range(n_groups):
        fed, whole = {}, 0.0
        for i in np.flatnonzero(groups_N == g):
            for j, w in zip(ids[i], weight[i], strict=True):
                if j < 0 or w <= 0:
                    continue
                whole += w
                s = groups_N[j]
                if s >= 0 and depth[s] < depth[g]:
                    fed[s] = fed.get(s, 0.0) + w
        best = sorted(fed, key=lambda s: -fed[s])[:top]
        assert got.ids_GK[g].tolist() == best + [-1] * (top - len(best))
        np.testing.assert_allclose(got.share_GK[g, : len(best)], [fed[s] / whole for s in best], rtol=1e-5)
        assert not got.share_GK[g, len(best) :].any()
