"""Clusters of similar features at several resolutions.

Similarity is a weighted sum over the bundle's lists of neighbours: co-activation, encoder, summed decoder. Groups are
found with the Leiden algorithm (Traag et al. 2019, from `igraph`), the finest level first. Coarser levels cluster the
groups of the level below, so that each group is nested in one above. `docs/design/features.md` lists the alternatives
that were tried.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from crosslayer.features.neighbour_graph import contracted, size_of, without_loops

LEVELS = 4
FINEST_SIZE = 12
"""Approximate number of features per group at the finest level."""
SMALLEST = 5
"""A finest group with fewer features joins its nearest group, if it has edges to any."""
TRIES, TOLERANCE = 4, 1.5
"""Number of resolutions tried per level, and the tolerated factor between found and wanted number of groups."""
ITERATIONS = 4
PRIOR = 10.0
"""Weight of the labels of all features, in members, against the labels of a group."""
LEAST_SCORE = 0.1


class Lineage(NamedTuple):
    """For each group, the groups of earlier layers that feed it, the strongest first.

    Attributes:
        ids_GK: groups, -1 where there are fewer than K.
        share_GK: share of the positive virtual weight into the group's members from their strongest upstream features.
    """

    ids_GK: Int[np.ndarray, "G K"]
    share_GK: Float[np.ndarray, "G K"]


def groups(graph: csr_array, n_levels: int = LEVELS, seed: int = 0) -> Int[np.ndarray, "G N"]:
    """Compute nested groups of the features at each level, the finest first; -1 for features without edges.

    Of n features the finest level aims at n / FINEST_SIZE groups. The number falls by equal factors to one step above a
    single group: at 573,440 features and four levels 47,800, 3,200, 220 and 15. Components of the graph are never
    joined, so no level has fewer groups than the graph has components. Groups are numbered by size, the largest first,
    then by lowest member.
    """
    n = size_of(graph)
    found = np.full((n_levels, n), -1, np.int32)
    here = np.flatnonzero(np.diff(graph.indptr))
    if not len(here):
        return found
    current = graph[here][:, here]
    n_finest = max(2.0, len(here) / FINEST_SIZE)
    member, size = np.arange(len(here)), np.ones(len(here))
    for level in range(n_levels):
        part = _partition(current, size, n_finest ** (1 - level / n_levels), seed)
        if level == 0:
            part = _absorb(current, part)
        member = part[member]
        found[level, here] = _numbered(member)
        current, size = contracted(current, part), np.bincount(part, weights=size)
    return found


def _partition(graph: csr_array, size_N: Float[np.ndarray, " N"], wanted: float, seed: int) -> Int[np.ndarray, " N"]:
    """Run Leiden at a few resolutions and return the partition whose number of groups is closest to the wanted.

    Modularity at resolution r holds together what has r times more edges than expected by chance, so a graph of r
    similar groups breaks apart at about r. The number of groups is proportional to r, with a factor that depends on the
    graph, near 3 on lists of 20 neighbours. The count is the effective number of groups, 1 / Σ share². In a graph
    without structure of the wanted size, the plain number could come from one giant group and many tiny ones.
    """
    low, high, resolution = 0.0, math.inf, wanted / 3
    best, error = np.zeros(size_of(graph), np.int64), math.inf
    for _ in range(TRIES):
        part = _leiden(graph, resolution, seed)
        share = np.bincount(part, weights=size_N) / size_N.sum()
        off = 1 / float(share @ share) / wanted
        # Too few groups are useless; too many are still usable.
        missed = math.log(off) if off > 1 else -2 * math.log(off)
        if missed < error:
            best, error = part, missed
        if error <= math.log(TOLERANCE):
            break
        low, high = (low, resolution) if off > 1 else (resolution, high)
        # Scale in proportion, but stay between the resolutions known to be too low and too high.
        resolution = resolution / off
        if not low < resolution < high:
            resolution = math.sqrt(low * high)
    return best


def _leiden(graph: csr_array, resolution: float, seed: int) -> Int[np.ndarray, " N"]:
    with _chance(seed):
        g, weight = _igraph(graph)
        found = g.community_leiden(
            objective_function="modularity", weights=weight, resolution=resolution, n_iterations=ITERATIONS
        )
    return np.asarray(found.membership, dtype=np.int64)


def _igraph(graph: csr_array) -> tuple[Any, list[float]]:
    """Convert the upper triangle to an igraph graph with weights."""
    import igraph

    coo = graph.tocoo()
    keep = coo.row <= coo.col
    row, col, weight = coo.row[keep], coo.col[keep], coo.data[keep]
    # igraph counts a loop's weight twice; a contracted graph's diagonal already includes both.
    weight = np.where(row == col, weight / 2, weight)
    return igraph.Graph(n=size_of(graph), edges=np.stack([row, col], axis=1)), weight.tolist()


@contextmanager
def _chance(seed: int) -> Iterator[None]:
    """Seed igraph's random numbers, and restore Python's `random`, from which igraph draws."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


def _absorb(graph: csr_array, part: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Merge small groups into the group with most edges to them, until none with edges to another is left."""
    while True:
        between = without_loops(contracted(graph, part))
        n_groups = size_of(between)
        few = np.flatnonzero((np.bincount(part) < SMALLEST) & (np.diff(between.indptr) > 0))
        if not len(few):
            return part
        to = np.asarray(between.argmax(axis=1)).reshape(-1)[few]
        joined = coo_array((np.ones(len(few)), (few, to)), shape=(n_groups, n_groups))
        part = connected_components(joined, directed=False)[1].astype(np.int64)[part]


def _numbered(member: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    sizes = np.bincount(member)
    first = np.full(len(sizes), len(member))
    np.minimum.at(first, member, np.arange(len(member)))
    place = np.empty(len(sizes), np.int32)
    place[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return place[member]


def group_labels(
    groups_N: Int[np.ndarray, " N"], label_N: Sequence[str | None], score_N: Float[np.ndarray, " N"], n_words: int = 3
) -> list[str]:
    """Label each group by the phrases that its members' labels share and that distinguish it from other groups.

    The most distinctive phrases come first, joined by " · ". A phrase is a whole label or a word in it; text in quotes
    is one word. Phrases are ranked by their log-odds against all other features in standard deviations, with all labels
    as the prior (Monroe et al. 2008). A phrase of a single member counts only if no two members share a phrase.

    Args:
        label_N: None or empty for features without one; a group of only those is "unlabelled".
        score_N: confidence of each label, from 0 to 1.
    """
    n_groups = int(groups_N.max()) + 1 if len(groups_N) else 0
    cache = {label: _phrases(label) for label in set(label_N) if label}
    trust = np.maximum(np.nan_to_num(score_N.astype(np.float64)), LEAST_SCORE).tolist()
    everywhere: Counter[str] = Counter()
    total = 0.0
    members: list[list[int]] = [[] for _ in range(n_groups)]
    for n, (group, label) in enumerate(zip(groups_N.tolist(), label_N, strict=True)):
        if not label:
            continue
        total += trust[n]
        for p in cache[label]:
            everywhere[p] += trust[n]  # pyright: ignore[reportArgumentType]
        if group >= 0:
            members[group].append(n)
    labels = []
    for some in members:
        seen: Counter[str] = Counter()
        weight: dict[str, float] = {}
        for n in some:
            for p in cache[label_N[n] or ""]:
                seen[p] += 1
                weight[p] = weight.get(p, 0.0) + trust[n]
        whole = sum(trust[n] for n in some)
        shared = [p for p in seen if seen[p] > 1] or list(seen)
        telling = {p: _log_odds(weight[p], whole, everywhere[p], total) for p in shared}
        # Among equals prefer the longer: a whole label rather than its words.
        ranked = sorted(shared, key=lambda p: (-round(telling[p], 9), -len(p), p))
        best: list[str] = []
        for p in [p for p in ranked if telling[p] > 0] or ranked[:1]:
            if len(best) < n_words and not any(p in b or b in p for b in best):
                best.append(p)
        labels.append(" · ".join(best) or "unlabelled")
    return labels


def _log_odds(inside: float, whole: float, everywhere: float, total: float) -> float:
    """Compute the log-odds of a phrase inside a group against outside, over its standard deviation."""
    prior = PRIOR * everywhere / total
    # All features may carry the phrase: add a little to keep the odds finite.
    rest = PRIOR + 1e-3 - prior
    outside = max(everywhere - inside, 0.0)
    odds = (inside + prior) / (max(whole - inside, 0.0) + rest)
    other = (outside + prior) / (max(total - whole - outside, 0.0) + rest)
    return (math.log(odds) - math.log(other)) / math.sqrt(1 / (inside + prior) + 1 / (outside + prior))


def _phrases(label: str) -> list[str]:
    """Return the whole label and its distinct words.

    Words are the texts in quotes, if any, else words of three or more letters or in other scripts.
    """
    words = re.findall("“[^”]+”", label) or [
        w for w in re.findall(r"[^\W\d_]+", label) if len(w) > 2 or not w.isascii()
    ]
    return list(dict.fromkeys([label, *words]))


def lineage(
    groups_N: Int[np.ndarray, " N"],
    layer_N: Int[np.ndarray, " N"],
    upstream_ids_NK: Int[np.ndarray, "N K"],
    upstream_weight_NK: Float[np.ndarray, "N K"],
    top: int = 5,
) -> Lineage:
    """Compute which groups of lower mean layer feed each group.

    The measure is the positive virtual weight from the members' strongest upstream features, summed by source group.
    Shares are of the group's whole positive upstream weight, including weight from itself, from features without a
    group, or from groups of higher layers.

    Args:
        upstream_ids_NK: -1 for none.
    """
    n_groups = int(groups_N.max()) + 1 if len(groups_N) else 0
    ids_GK, share_GK = np.full((n_groups, top), -1, np.int32), np.zeros((n_groups, top), np.float32)
    if not n_groups:
        return Lineage(ids_GK, share_GK)
    here = groups_N >= 0
    depth = np.bincount(groups_N[here], weights=layer_N[here]) / np.bincount(groups_N[here])
    target, source_id = np.repeat(groups_N, upstream_ids_NK.shape[1]), upstream_ids_NK.reshape(-1)
    weight = upstream_weight_NK.reshape(-1).astype(np.float64)
    inside = (target >= 0) & (source_id >= 0) & (weight > 0)
    target, source, weight = target[inside].astype(np.int64), groups_N[source_id[inside]], weight[inside]
    whole = np.bincount(target, weights=weight, minlength=n_groups)
    earlier = source >= 0
    earlier &= depth[np.maximum(source, 0)] < depth[target]
    pair, which = np.unique(target[earlier] * n_groups + source[earlier], return_inverse=True)
    total = np.bincount(which, weights=weight[earlier], minlength=len(pair))
    to, from_ = pair // n_groups, pair % n_groups
    order = np.lexsort((from_, -total, to))
    to, from_, total = to[order], from_[order], total[order]
    rank = np.arange(len(to)) - np.searchsorted(to, to)
    kept = rank < top
    ids_GK[to[kept], rank[kept]] = from_[kept]
    share_GK[to[kept], rank[kept]] = total[kept] / whole[to[kept]]
    return Lineage(ids_GK, share_GK)
