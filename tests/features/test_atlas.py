"""The atlas keeps together what belongs together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from crosslayer.core.errors import ConfigError
from crosslayer.features import atlas

N_CLUSTERS, SIZE = 12, 25
N = N_CLUSTERS * SIZE + 2


def planted(seed: int = 0) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Lists of neighbours, mostly in the own cluster; the last two features are dead, and one has no neighbour."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(N) // SIZE
    ids = np.full((N, 8), -1, np.int32)
    value = np.zeros((N, 8), np.float32)
    for i in range(N - 2):
        others = np.flatnonzero((cluster == cluster[i]) & (np.arange(N) != i) & (np.arange(N) < N - 2))
        ids[i, :7] = rng.choice(others, 7, replace=False)
        value[i, :7] = 0.9
        ids[i, 7], value[i, 7] = rng.choice(np.setdiff1d(np.arange(N - 2), ids[i])), 0.02
    live = np.arange(N) < N - 2
    return ids, value, live, cluster


def graph_of(ids: NDArray, value: NDArray, live: NDArray):
    return atlas.neighbour_graph({"encoder": (ids, value)}, {"encoder": 1.0}, live)


def test_the_graph_is_symmetric_and_adds_its_kinds_by_weight():
    ids, value, live, _ = planted()
    lists = {"encoder": (ids, value), "decoder": (ids, -value), "coactivation": (ids[::-1], value)}
    graph = atlas.neighbour_graph(lists, {"encoder": 0.5, "decoder": 3.0, "coactivation": 0.0}, live)
    dense = graph.toarray()
    np.testing.assert_array_equal(dense, dense.T)
    assert not dense.diagonal().any()
    assert not dense[-2:].any()
    wanted = np.zeros((N, N), np.float32)
    for i in range(N):
        for j, v in zip(ids[i], value[i], strict=True):
            if j >= 0 and j != i:
                wanted[i, j] = max(wanted[i, j], 0.5 * v)
    np.testing.assert_allclose(dense, np.maximum(wanted, wanted.T), rtol=1e-6)


@pytest.mark.parametrize(("weights", "words"), [({"encoder": -1.0}, "-1.0"), ({"sound": 1.0}, "'sound'"), ({"encoder": float("nan")}, "nan"), ({}, "all")])  # fmt: skip
def test_weights_that_make_no_graph(weights: dict[str, float], words: str):
    ids, value, live, _ = planted()
    with pytest.raises(ConfigError, match=words):
        atlas.neighbour_graph({"encoder": (ids, value)}, weights, live)


def test_groups_are_nested_deterministic_and_find_planted_clusters():
    ids, value, live, cluster = planted()
    graph = graph_of(ids, value, live)
    found = atlas.groups(graph)
    np.testing.assert_array_equal(found, atlas.groups(graph))
    assert (found[:, -2:] == -1).all()
    for fine, coarse in pairwise(found):
        assert fine[:-2].max() >= coarse[:-2].max()
        for g in range(fine.max() + 1):
            assert len(np.unique(coarse[fine == g])) == 1
    for level in found:
        sizes = np.bincount(level[level >= 0])
        assert (np.diff(sizes) <= 0).all()
    # At some level the groups are the clusters.
    assert any(len(np.unique(level[:-2] * 1000 + cluster[:-2])) == N_CLUSTERS == level.max() + 1 for level in found)


def test_the_order_of_features_does_not_matter():
    ids, value, live, _ = planted()
    order = np.random.default_rng(1).permutation(N)
    place = np.argsort(order)
    moved = np.where(ids[order] >= 0, place[ids[order]], -1)
    level = next(n for n, x in enumerate(atlas.groups(graph_of(ids, value, live))) if x.max() + 1 == N_CLUSTERS)
    one = atlas.groups(graph_of(ids, value, live))[level]
    two = atlas.groups(graph_of(moved, value[order], live[order]))[level][place]
    assert len(set(zip(one.tolist(), two.tolist(), strict=True))) == N_CLUSTERS + 1


def test_the_map_keeps_clusters_together():
    ids, value, live, cluster = planted()
    graph = graph_of(ids, value, live)
    xy = atlas.layout(graph, atlas.groups(graph)[0])
    np.testing.assert_array_equal(xy, atlas.layout(graph, atlas.groups(graph)[0]))
    assert np.isnan(xy[-2:]).all()
    assert np.isfinite(xy[:-2]).all()
    _, near = cKDTree(xy[:-2]).query(xy[:-2], k=9)
    assert (cluster[near[:, 1:]] == cluster[:-2, None]).mean() > 0.9


def test_an_atlas_of_next_to_nothing():
    ids, value = np.full((4, 2), -1, np.int32), np.zeros((4, 2), np.float32)
    graph = graph_of(ids, value, np.ones(4, bool))
    found = atlas.groups(graph)
    assert (found == -1).all()
    assert np.isnan(atlas.layout(graph, found[0])).all()
    assert atlas.group_labels(found[0], [None] * 4, np.zeros(4)) == []
    assert len(atlas.lineage(found[0], np.zeros(4), ids, value).ids_GK) == 0
    ids[0, 0], value[0, 0] = 1, 1.0
    graph = graph_of(ids, value, np.ones(4, bool))
    assert np.isfinite(atlas.layout(graph, atlas.groups(graph)[0])[:2]).all()


def test_labels_of_groups_are_what_tells_them_apart():
    groups = np.array([0, 0, 0, 1, 1, 1, 2, -1])
    labels = ["“ the”, “ cat”", "“ cat”, “ dog”", "“ cat”", "“ the”, “ red”", "“ red”", "inside (…)", None, "“ the”"]
    found = atlas.group_labels(groups, labels, np.ones(8))
    assert found[0].startswith(" cat")
    assert found[1].startswith(" red")
    assert found[2] == "unlabelled"


def test_lineage_is_the_share_of_what_comes_from_earlier_groups():
    rng = np.random.default_rng(0)
    groups, layer = rng.integers(-1, 6, 60), np.sort(rng.integers(0, 5, 60))
    ids, weight = rng.integers(-1, 60, (60, 4)), rng.normal(size=(60, 4))
    found = atlas.lineage(groups, layer, ids, weight, top=3)
    depth = [layer[groups == g].mean() for g in range(6)]
    for g in range(6):
        fed, whole = {}, 0.0
        for t in np.flatnonzero(groups == g):
            for s, w in zip(ids[t], weight[t], strict=True):
                if s < 0 or w <= 0:
                    continue
                whole += w
                h = groups[s]
                if h >= 0 and h != g and depth[h] < depth[g]:
                    fed[h] = fed.get(h, 0.0) + w
        best = sorted(fed.items(), key=lambda p: -p[1])[:3]
        assert found.ids_GK[g].tolist()[: len(best)] == [h for h, _ in best]
        np.testing.assert_allclose(found.share_GK[g][: len(best)], [w / whole for _, w in best], rtol=1e-5)
        assert (found.ids_GK[g][len(best) :] == -1).all()
