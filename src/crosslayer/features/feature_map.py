"""The feature map: t-SNE (from `openTSNE`) of the neighbour graph, initialised from a map of the finest clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from crosslayer.features.neighbour_graph import contracted, size_of, without_loops

EPOCHS, GROUP_EPOCHS = 120, 250
"""Steps for the map of features, and for the map of groups.

The map of groups starts at random and begins with early exaggeration.
"""
EXAGGERATION = 12.0
JITTER = 0.1
RIM = 2.5
"""Radius of the map in units of the root mean square radius."""


def layout(graph: csr_array, groups_N: Int[np.ndarray, " N"], seed: int = 0) -> Float[np.ndarray, "N 2"]:
    """Compute positions on the map, float32 and centred; NaN for features without edges.

    Args:
        groups_N: the finest level of `groups`; its map initialises the map of features.
    """
    xy_N2 = np.full((size_of(graph), 2), np.nan, np.float32)
    here = np.flatnonzero(np.diff(graph.indptr))
    if not len(here):
        return xy_N2
    chance, part = np.random.default_rng(seed), groups_N[here].astype(np.int64)
    inner = graph[here][:, here]
    between, size = without_loops(contracted(inner, part)), np.bincount(part)
    row = np.repeat(np.arange(len(size)), np.diff(between.indptr))
    # Normalise, so that a large group with more edges is not drawn to all others.
    between.data = between.data / np.sqrt(size[row] * size[between.indices])
    centres_N2 = _embedded(between, chance.normal(size=(len(size), 2)), GROUP_EPOCHS, EXAGGERATION)
    spread = max(float(centres_N2.std()), 1e-9)
    start_N2 = centres_N2[part] / spread + JITTER * chance.normal(size=(len(here), 2))
    found_N2 = _embedded(inner, start_N2, EPOCHS, None)
    found_N2 = found_N2 - found_N2.mean(0)
    radius = np.linalg.norm(found_N2, axis=1, keepdims=True)
    # Points without strong edges drift away; move them back to the rim.
    rim = RIM * max(float(np.sqrt(np.mean(radius**2))), 1e-9)
    xy_N2[here] = found_N2 * np.minimum(1, rim / np.maximum(radius, 1e-9))
    return xy_N2


def _embedded(
    graph: csr_array, start_N2: Float[np.ndarray, "N 2"], epochs: int, exaggeration: float | None
) -> Float[np.ndarray, "N 2"]:
    """Run t-SNE on a graph from an initialisation of any scale."""
    if size_of(graph) < 4 or not graph.nnz:
        return start_N2
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PrecomputedAffinities
    from scipy.sparse import csr_matrix

    # Relative to the strongest edge at either end, so that isolated features are attracted by their neighbours like
    # all others.
    top_N = graph.max(axis=1).toarray().reshape(-1).astype(np.float64)
    row = np.repeat(np.arange(size_of(graph)), np.diff(graph.indptr))
    weight_E = graph.data / top_N[row] + graph.data / top_N[graph.indices]
    affinity = csr_matrix(
        (weight_E / weight_E.sum(), graph.indices, graph.indptr), shape=(size_of(graph), size_of(graph))
    )
    start_N2 = np.ascontiguousarray(start_N2 * (1e-4 / max(float(start_N2[:, 0].std()), 1e-12)), dtype=np.float64)
    # FFT-accelerated interpolation (Linderman et al. 2019); one thread makes the sums deterministic.
    embedding: Any = TSNEEmbedding(
        start_N2, PrecomputedAffinities(affinity, normalize=False), negative_gradient_method="fft", n_jobs=1
    )
    first = epochs // 3
    embedding = embedding.optimize(n_iter=first, exaggeration=exaggeration, momentum=0.5)
    return np.asarray(embedding.optimize(n_iter=epochs - first, momentum=0.8), dtype=np.float64)
