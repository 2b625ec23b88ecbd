"""Choose the features to label, and their order.

The order is random, so that a run that ends early has labelled a uniform sample; features of a graph are in order of
influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosslayer.autointerp.documents import in_drawn_order
from crosslayer.bundles.annotations import PERSON
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.core.errors import ConfigError
from crosslayer.graphs.interchange import open_graph

NAMELESS = ("dense", "dead")
"""Rules that state how often a feature fires, not on what."""


def of_all(bundle: FeatureBundle, seed: int = 0) -> list[int]:
    """Return all features with examples."""
    return in_drawn_order((int(f) for f in np.flatnonzero(_has_examples(bundle))), seed)


def of_graph(bundle: FeatureBundle, path: Path, node_threshold: float = 0.8) -> list[int]:
    """Return the features of a pruned graph, the most influential first.

    Raises:
        FormatError, ConfigError: for a file that is not a graph, and a graph of another transcoder.
    """
    graph = open_graph(path)
    a = graph.arrays
    if graph.header.n_layers != bundle.n_layers or (graph.n_features and int(a.index_F.max()) >= bundle.n_features):
        raise ConfigError(
            f"{path} is of a transcoder of another shape than the bundle {bundle.path}; give the"
            " bundle of the graph's transcoder"
        )
    remaining = np.ones(graph.n_nodes, bool) if graph.imported else graph.prune(node_threshold).node_N
    total: dict[int, float] = {}
    for node in np.flatnonzero(remaining[: graph.n_features]).tolist():
        f = bundle.id(int(a.layer_F[node]), int(a.index_F[node]))
        total[f] = total.get(f, 0.0) + float(a.influence_N[node])
    has = _has_examples(bundle)
    return [f for f in sorted(total, key=lambda f: (-total[f], f)) if has[f]]


def of_group(bundle: FeatureBundle, level: int, number: int, seed: int = 0) -> list[int]:
    """Return the features of a cluster.

    Raises:
        ConfigError: for a cluster that does not exist.
    """
    levels = bundle.array("group").shape[1] if bundle.has("group") else 0
    if not 0 <= level < levels:
        available = f"levels 0 to {levels - 1}" if levels else "no groups"
        raise ConfigError(f"there is no group {level}/{number}: the bundle has {available}")
    members = np.flatnonzero((np.asarray(bundle.array("group")[:, level]) == number) & _has_examples(bundle))
    if not len(members):
        raise ConfigError(
            f"there is no group {level}/{number}, or none of its features fires; level {level} has groups 0 to"
            f" {len(bundle.groups(level)) - 1}"
        )
    return in_drawn_order((int(f) for f in members), seed)


def sample(bundle: FeatureBundle, features: Sequence[int], n: int, seed: int = 0) -> list[int]:
    """Sample features evenly over layers and, in each layer, over densities."""
    if len(features) <= n:
        return list(features)
    counts = np.asarray(bundle.array("count")).sum(axis=1)
    ranked = sorted(features, key=lambda f: (f // bundle.n_features, int(counts[f]), f))
    picked = {ranked[int((i + 0.5) * len(ranked) / n)] for i in range(n)}
    return in_drawn_order(picked, seed)


def unnamed(bundle: FeatureBundle, features: Sequence[int]) -> list[int]:
    """Return the features without a label by a rule or a person."""
    added = bundle.user.labels(features)
    by_person = {f for f, labels in added.items() if labels[0].source == PERSON}
    rows = {f: bundle.index.row(f) for f in features}
    return [f for f, row in rows.items() if f not in by_person and (row.label is None or row.rule in NAMELESS)]


def _has_examples(bundle: FeatureBundle) -> np.ndarray:
    return np.diff(np.asarray(bundle.array("example"))) > 0
