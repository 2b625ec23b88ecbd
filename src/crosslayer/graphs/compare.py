"""Compare graphs of several prompts by feature: what they share, and where they differ. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array

from crosslayer.core.errors import ConfigError
from crosslayer.graphs.graph import Graph


class Merged(NamedTuple):
    """G graphs over the union of their features; positions of a feature are summed.

    Attributes:
        feature_F2: layer and index of each feature.
        influence_GF: share of each graph's influence on its targets.
        activation_GF: max activation.
        edges: per graph (F, F), rows are targets. Absolute edges as shares of the target's input, averaged over its
            positions by influence.
    """

    feature_F2: Int[np.ndarray, "F 2"]
    influence_GF: Float[np.ndarray, "G F"]
    activation_GF: Float[np.ndarray, "G F"]
    edges: list[csr_array]

    def shared(self) -> Bool[np.ndarray, " F"]:
        """Return the features with influence in every graph (the intersection)."""
        return np.all(self.influence_GF > 0, axis=0)

    def only(self, graph: int) -> Bool[np.ndarray, " F"]:
        """Return the features with influence in this graph and in no other."""
        has = self.influence_GF > 0
        return has[graph] & (has.sum(0) == 1)

    def difference(self, first: int = 0, second: int = 1) -> Float[np.ndarray, " F"]:
        """Return the share of influence in one graph minus that in another."""
        return self.influence_GF[first] - self.influence_GF[second]

    def mean_edges(self) -> csr_array:
        """Return the edges averaged over the graphs."""
        total = self.edges[0]
        for e in self.edges[1:]:
            total = total + e
        return csr_array(total / len(self.edges))


def merge(graphs: Sequence[Graph]) -> Merged:
    """Merge graphs of one transcoder over the union of their features.

    Raises:
        ConfigError: for no graph, or graphs of transcoders with different numbers of layers.
    """
    if not graphs:
        raise ConfigError("no graph was given; name at least one")
    if len({g.header.n_layers for g in graphs}) > 1:
        raise ConfigError(
            "the graphs are of transcoders with different numbers of layers; compare graphs of one transcoder"
        )
    scans = {g.header.scan for g in graphs if g.header.scan}
    if len(scans) > 1:
        raise ConfigError(
            f"the graphs are of different transcoders, {', '.join(sorted(scans))}; their features cannot be compared"
        )
    keys = [np.stack([g.arrays.layer_F, g.arrays.index_F], axis=1) for g in graphs]
    feature_F2, which = np.unique(np.concatenate(keys), axis=0, return_inverse=True)
    places = np.split(which.ravel(), np.cumsum([len(k) for k in keys])[:-1])
    n = len(feature_F2)
    influence_GF, activation_GF = np.zeros((len(graphs), n)), np.zeros((len(graphs), n))
    edges = []
    for i, (g, place_F) in enumerate(zip(graphs, places, strict=True)):
        share_F = g.influence_N[: g.n_features] / max(g.weight_N.sum(), 1e-30)
        np.add.at(influence_GF[i], place_F, share_F)
        np.maximum.at(activation_GF[i], place_F, g.arrays.activation_F)
        edges.append(_by_feature(g, place_F, share_F, n))
    return Merged(feature_F2, influence_GF, activation_GF, edges)


def _by_feature(graph: Graph, place_F: np.ndarray, share_F: np.ndarray, n: int) -> csr_array:
    W = graph.normalised().tocoo()
    inner = (W.row < graph.n_features) & (W.col < graph.n_features)
    row, column = W.row[inner], W.col[inner]
    total_F = np.bincount(place_F, weights=share_F, minlength=n)
    value = W.data[inner] * share_F[row] / np.maximum(total_F[place_F[row]], 1e-30)
    return csr_array(coo_array((value, (place_F[row], place_F[column])), shape=(n, n)))
