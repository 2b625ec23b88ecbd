"""The atlas: features grouped by how near they are to each other, at several resolutions, and drawn on a map.

Nearness is a weighted sum of what the bundle's lists of neighbours say: co-activation, encoder, summed decoder. Groups are found by the Leiden algorithm
(Traag et al. 2019, of `igraph`), the finest first; coarser ones by running it on the groups of the level below, so that each lies in one above it.
The map is `igraph`'s UMAP (McInnes et al. 2018) of the same graph, begun from a map of the finest groups, so that few epochs suffice.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from crosslayer.core.errors import ConfigError

KINDS = ("coactivation", "encoder", "decoder")
LEVELS = 4
FINEST_SIZE = 12
"""Features that a group of the finest level is to have, about; each next level has about the cube root of the finest's number of groups times fewer."""
EPOCHS = 60
ITERATIONS = 4
GAP = 3.0
"""Distance, in spreads of a group, between the groups of the map that members are first placed by."""


class Lineage(NamedTuple):
    """For each group, those of earlier layers that feed it, the strongest first; -1 where there are fewer."""

    ids_GK: NDArray
    share_GK: NDArray
    """Of all positive virtual weight that comes to the group's members from their strongest upstream features."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that make no graph."""
    for kind, weight in weights.items():
        if kind not in KINDS:
            raise ConfigError(f"the atlas knows no neighbours by {kind!r}; give weights to {', '.join(KINDS)}")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"the atlas weight {kind}={weight} is no number from 0 on; give 0 to leave that kind out")
    if not any(weights.values()):
        raise ConfigError("all atlas weights are 0; give one of them a positive number")


def neighbour_graph(
    lists: Mapping[str, tuple[NDArray, NDArray]], weights: Mapping[str, float], live_N: NDArray
) -> csr_array:
    """Symmetric (N, N), not negative, without loops.

    A pair that only one of the two names as its neighbour counts in full, as that of a rare feature and a common one does: the greater of the two
    directions is taken.

    Args:
        lists: ids (N, K), -1 for none, and similarities (N, K) of each kind; those below 0 count as 0.
        weights: of each kind; one that is left out counts 0.
        live_N: features that may have edges.
    """
    check_weights(weights)
    n = len(live_N)
    total = csr_array((n, n), dtype=np.float32)
    for kind, (ids_NK, similarity_NK) in lists.items():
        weight = weights.get(kind, 0.0)
        if not weight:
            continue
        source = np.repeat(np.arange(n), ids_NK.shape[1])
        target, value = ids_NK.reshape(-1).astype(np.int64), similarity_NK.reshape(-1).astype(np.float32) * weight
        keep = (target >= 0) & (value > 0) & (target != source) & live_N[source] & live_N[np.maximum(target, 0)]
        directed = coo_array((value[keep], (source[keep], target[keep])), shape=(n, n)).tocsr()
        total = csr_array(total + directed.maximum(directed.T))
    total.sort_indices()
    return total


def _size(graph: csr_array) -> int:
    return len(graph.indptr) - 1


def groups(graph: csr_array, n_levels: int = LEVELS, seed: int = 0) -> NDArray:
    """(levels, N) group of each feature, the finest level first, each group inside one of the next level; -1 for features without edges.

    Groups are numbered by size, the largest first, and of equals by the lowest member.
    """
    n = _size(graph)
    isolated = np.diff(graph.indptr) == 0
    found = np.full((n_levels, n), -1, np.int32)
    here = np.flatnonzero(~isolated)
    if not len(here):
        return found
    small = graph[here][:, here]
    n_finest = max(2.0, len(here) / FINEST_SIZE)
    current, member = small, np.arange(len(here))
    for level in range(n_levels):
        # Modularity's resolution is about the number of groups that a graph without structure falls into.
        wanted = n_finest ** (1 - level / n_levels)
        member = _leiden(current, max(1.0, wanted / 3), seed)[member]
        found[level, here] = _numbered(member)
        n_groups = member.max() + 1
        of = csr_array((np.ones(len(here), np.float32), (member, np.arange(len(here)))), shape=(n_groups, len(here)))
        current = (of @ small @ of.T).tocsr()
    return found


def _leiden(graph: csr_array, resolution: float, seed: int) -> NDArray:
    """A group of each node."""
    with _chance(seed):
        g, weight = _igraph(graph, loops=True)
        found = g.community_leiden(
            objective_function="modularity", weights=weight, resolution=resolution, n_iterations=ITERATIONS
        )
    return np.asarray(found.membership)


def _numbered(member: NDArray) -> NDArray:
    sizes = np.bincount(member)
    first = np.full(len(sizes), len(member))
    np.minimum.at(first, member, np.arange(len(member)))
    place = np.empty(len(sizes), np.int32)
    place[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return place[member]


def _igraph(graph: csr_array, *, loops: bool) -> tuple[Any, list[float]]:
    """The upper triangle as igraph has it, and its weights."""
    import igraph

    coo = graph.tocoo()
    keep = coo.row <= coo.col if loops else coo.row < coo.col
    edges = np.stack([coo.row[keep], coo.col[keep]], axis=1)
    # A loop's weight is counted from both of its ends, as each other edge's is.
    weight = np.where(coo.row[keep] == coo.col[keep], coo.data[keep] / 2, coo.data[keep])
    return igraph.Graph(n=_size(graph), edges=edges), weight.tolist()


@contextmanager
def _chance(seed: int) -> Iterator[None]:
    """igraph's chance from a seed, and its own again afterwards."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


def layout(graph: csr_array, groups_N: NDArray, seed: int = 0) -> NDArray:
    """(N, 2) places on the map, NaN for features without edges.

    Args:
        groups_N: the finest level of `groups`.
    """
    xy = np.full((_size(graph), 2), np.nan, np.float32)
    here = np.flatnonzero(groups_N >= 0)
    if len(here) < 3:
        xy[here] = np.arange(2 * len(here)).reshape(-1, 2)
        return xy
    member = groups_N[here]
    of = csr_array((np.ones(len(here), np.float32), (member, here)), shape=(member.max() + 1, _size(graph)))
    between = (of @ graph @ of.T).tocsr()
    chance = np.random.default_rng(seed)
    # Between groups, the mean of the edges that there could be.
    sizes = np.bincount(member).astype(np.float32)
    coo = between.tocoo()
    between = coo_array(
        (coo.data / np.sqrt(sizes[coo.row] * sizes[coo.col]), (coo.row, coo.col)), shape=between.shape
    ).tocsr()
    centres = _umap(between, chance.normal(size=(len(sizes), 2)) * math.sqrt(len(sizes)), 4 * EPOCHS, seed)
    start = GAP * centres[member] + chance.normal(size=(len(here), 2))
    xy[here] = _umap(graph[here][:, here], start, EPOCHS, seed)
    return xy


def _umap(graph: csr_array, start_N2: NDArray, epochs: int, seed: int) -> NDArray:
    if _size(graph) < 3:
        return start_N2
    with _chance(seed):
        g, weight = _igraph(graph, loops=False)
        if not weight:
            return start_N2
        # Distances, as UMAP takes them: the nearest neighbours of all at 0.
        distance = 1 - np.asarray(weight) / max(weight)
        return np.asarray(g.layout_umap(dist=distance.tolist(), seed=start_N2.tolist(), epochs=epochs).coords)


def group_labels(groups_N: NDArray, label_N: Sequence[str | None], score_N: NDArray, n_phrases: int = 3) -> list[str]:
    """A label for each group: the words of its members' labels that tell it from all other features, the most telling first.

    Words count by the score of the label that they are in; a word is telling by its log-odds against all labels, times how many members have it.
    """
    n_groups = int(groups_N.max()) + 1 if len(groups_N) else 0
    phrases = [_phrases(label) if label else [] for label in label_N]
    everywhere = Counter(p for some in phrases for p in some)
    n_labelled = max(1, sum(bool(p) for p in phrases))
    members: list[list[int]] = [[] for _ in range(n_groups)]
    for n, g in enumerate(groups_N.tolist()):
        if g >= 0 and phrases[n]:
            members[g].append(n)
    labels = []
    for some in members:
        weight: dict[str, float] = {}
        for n in some:
            for p in phrases[n]:
                weight[p] = weight.get(p, 0.0) + max(float(score_N[n]), 0.1)
        telling = {
            p: w * math.log((w / len(some) + 1e-3) / (everywhere[p] / n_labelled + 1e-3)) for p, w in weight.items()
        }
        best = sorted(telling, key=lambda p: (-telling[p], p))[:n_phrases]
        labels.append(" · ".join(best) or "unlabelled")
    return labels


def _phrases(label: str) -> list[str]:
    """What is between quotes, each once; the whole where nothing is."""
    quoted = re.findall("“([^”]+)”", label)
    return list(dict.fromkeys(quoted)) if quoted else [label]


def lineage(
    groups_N: NDArray, layer_N: NDArray, upstream_ids_NK: NDArray, upstream_weight_NK: NDArray, top: int = 5
) -> Lineage:
    """Which groups of earlier layers, by the mean layer of their members, feed each group."""
    n_groups = int(groups_N.max()) + 1 if len(groups_N) else 0
    ids = np.full((n_groups, top), -1, np.int32)
    share = np.zeros((n_groups, top), np.float32)
    if not n_groups:
        return Lineage(ids, share)
    here = groups_N >= 0
    depth = np.bincount(groups_N[here], weights=layer_N[here]) / np.bincount(groups_N[here])
    target = np.repeat(groups_N, upstream_ids_NK.shape[1])
    source_id = upstream_ids_NK.reshape(-1)
    source = np.where(source_id >= 0, groups_N[np.maximum(source_id, 0)], -1)
    weight = np.maximum(upstream_weight_NK.reshape(-1).astype(np.float64), 0)
    inside = (target >= 0) & (source_id >= 0)
    whole = np.bincount(target[inside], weights=weight[inside], minlength=n_groups)
    keep = inside & (source >= 0) & (source != target) & (weight > 0)
    keep[keep] = depth[source[keep]] < depth[target[keep]]
    pair, inverse = np.unique(target[keep].astype(np.int64) * n_groups + source[keep], return_inverse=True)
    total = np.bincount(inverse, weights=weight[keep], minlength=len(pair))
    to, from_ = pair // n_groups, pair % n_groups
    order = np.lexsort((from_, -total, to))
    to, from_, total = to[order], from_[order], total[order]
    rank = np.arange(len(to)) - np.searchsorted(to, to)
    kept = rank < top
    ids[to[kept], rank[kept]] = from_[kept]
    share[to[kept], rank[kept]] = total[kept] / whole[to[kept]]
    return Lineage(ids, share)
