"""An attribution graph: nodes, sparse edges and error bounds. NumPy and SciPy only.

Nodes are numbered in this order: active features by layer, position and index; errors by layer and position; tokens;
targets. Edges are stored as rows, the incoming edges of each expanded node: `edge[s -> t] = a_s * d value_t / d a_s` in
the local replacement model. Two numbers per row account for edges that are not stored, so that sums stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from crosslayer.core.errors import ConfigError, ResourceError
from crosslayer.graphs import files
from crosslayer.graphs.arrays import GraphArrays
from crosslayer.graphs.influence import Pruned, Scores, normalised, prune, scores, subgraph_scores, unpruned
from crosslayer.schemas.graph import GraphHeader

DENSE_NODES = 30_000
"""Max number of nodes of a dense matrix."""


class Graph:
    """The attribution graph of one prompt.

    Attributes:
        header: prompt, targets, settings, bound and provenance.
        arrays: nodes and rows.
        present_N: nodes of an imported file; None for a graph traced by crosslayer, which has all nodes.
    """

    def __init__(
        self, header: GraphHeader, arrays: GraphArrays, present_N: Bool[np.ndarray, " N"] | None = None
    ) -> None:
        self.header, self.arrays, self.present_N = header, arrays, present_N

    def __repr__(self) -> str:
        known = "imported, pruned" if self.imported else f"{1 - self.unexpanded:.1%} of influence accounted for"
        return (
            f"Graph({self.header.prompt!r}, {self.n_features} features, {len(self.arrays.row_R)} rows, "
            f"{len(self.arrays.weight_E)} edges, {known})"
        )

    @property
    def n_features(self) -> int:
        return len(self.arrays.layer_F)

    @property
    def n_positions(self) -> int:
        return len(self.header.tokens)

    @property
    def first_error(self) -> int:
        return self.n_features

    @property
    def first_token(self) -> int:
        return self.first_error + self.header.n_layers * self.n_positions

    @property
    def first_target(self) -> int:
        return self.first_token + self.n_positions

    @property
    def n_nodes(self) -> int:
        return self.first_target + len(self.header.targets)

    @property
    def imported(self) -> bool:
        """Whether the graph was imported from a viewer's file, already pruned, so that rows are incomplete."""
        return self.header.unexpanded is None

    @property
    def unexpanded(self) -> float:
        """The bound: max underestimate of the influence share of a node, of all tokens or of all errors."""
        return math.nan if self.header.unexpanded is None else self.header.unexpanded

    @property
    def weight_N(self) -> Float[np.ndarray, " N"]:
        """Weights of the targets, zero for other nodes."""
        weight_N = np.zeros(self.n_nodes)
        weight_N[self.first_target :] = [t.weight for t in self.header.targets]
        return weight_N

    @property
    def influence_N(self) -> Float[np.ndarray, " N"]:
        """Influence of each node on the targets, weighted by the targets' probabilities."""
        return self.arrays.influence_N

    @cached_property
    def edges(self) -> csr_array:
        """Signed edges (N, N); rows are targets, empty for nodes that were not expanded."""
        a = self.arrays
        count_N = np.zeros(self.n_nodes, dtype=np.int64)
        count_N[a.row_R] = np.diff(a.start_R1)
        order = np.argsort(a.row_R, kind="stable")
        if (order == np.arange(len(order))).all():
            source_E, weight_E = a.source_E, a.weight_E
        else:
            pieces = [slice(a.start_R1[r], a.start_R1[r + 1]) for r in order]
            source_E = np.concatenate([a.source_E[p] for p in pieces])
            weight_E = np.concatenate([a.weight_E[p] for p in pieces])
        return csr_array((weight_E, source_E, np.concatenate([[0], np.cumsum(count_N)])), (self.n_nodes, self.n_nodes))

    def row(self, node: int) -> int | None:
        """Return the row of a node; None if it was not expanded."""
        found = np.flatnonzero(self.arrays.row_R == node)
        return int(found[0]) if len(found) else None

    def incoming_R(self) -> Float[np.ndarray, " R"]:
        """Sum of each row's incoming edges, including the edge of the constant node."""
        a = self.arrays
        kept_R = np.bincount(_row_of_edge(a), weights=a.weight_E, minlength=len(a.row_R))
        return kept_R + a.rest_R + a.constant_R

    def preactivation_R(self) -> Float[np.ndarray, " R"]:
        """Pre-activation of each row's node, which the incoming edges sum to."""
        return self.arrays.value_R

    def sum_error(self) -> float:
        """Return the max difference of edge sum and pre-activation, relative to the row's sum of absolute edges."""
        a = self.arrays
        scale_R = a.mass_R4[:, :3].sum(1) + np.abs(a.constant_R)
        wrong_R = np.abs(self.incoming_R() - a.value_R)
        return float((wrong_R / np.maximum(scale_R, 1e-30)).max()) if len(wrong_R) else 0.0

    def to_dense(self) -> Float[np.ndarray, "N N"]:
        """Return signed edges as a dense matrix; rows are targets.

        Raises:
            ResourceError: for more nodes than `DENSE_NODES`.
        """
        if self.n_nodes > DENSE_NODES:
            raise ResourceError(
                f"a dense matrix of {self.n_nodes} nodes would take {4 * self.n_nodes**2 / 2**30:.1f} GiB; use"
                " graph.edges, which is sparse"
            )
        return self.edges.toarray()

    def scores(self) -> Scores:
        """Compute replacement and completeness scores, with the intervals left by unexpanded nodes.

        Raises:
            ConfigError: for an imported graph, which was pruned and has no scores.
        """
        self._check_rows()
        a = self.arrays
        total_R = a.mass_R4[:, :3].sum(1)
        error_R = np.divide(a.mass_R4[:, 1], total_R, out=np.zeros_like(total_R), where=total_R > 0)
        return scores(
            self.influence_N,
            self.weight_N,
            a.layer_F,
            a.row_R,
            error_R,
            first_token=self.first_token,
            n_layers=self.header.n_layers,
        )

    def subgraph_scores(self, features: Collection[int]) -> Scores:
        """Compute scores with the given features only; all other features count as errors.

        The intervals are what unexpanded features and edges that are not stored leave open.

        Raises:
            ConfigError: for a node that is not a feature, or an imported graph.
        """
        self._check_rows()
        if wrong := [n for n in features if not 0 <= n < self.n_features]:
            raise ConfigError(
                f"node {wrong[0]} is no feature of the graph, which has {self.n_features}; give numbers below that"
            )
        a = self.arrays
        mass_N, layer_N = np.zeros(self.n_nodes), np.full(self.n_nodes, -1)
        mass_N[a.row_R] = a.mass_R4[:, :3].sum(1, dtype=np.float64)
        layer_N[: self.n_features] = a.layer_F
        layer_N[self.first_target :] = [
            self.header.n_layers if t.layer is None else t.layer for t in self.header.targets
        ]
        return subgraph_scores(
            self.edges,
            mass_N,
            self.weight_N,
            layer_N,
            sorted(features),
            n_features=self.n_features,
            first_token=self.first_token,
        )

    def _check_rows(self) -> None:
        if self.imported:
            raise ConfigError(
                "the graph was imported from a pruned file, whose rows are incomplete; trace the prompt for scores"
            )

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, wanted: Collection[int] = ()) -> Pruned:
        """Keep the fewest nodes that hold `node_threshold` of the influence, and likewise the fewest of their edges.

        An imported graph, which is pruned already, stays unchanged if both thresholds are 1.

        Args:
            node_threshold, edge_threshold: shares of influence and of edge scores to keep.
            wanted: nodes that stay with their edges, whatever their influence.

        Raises:
            ConfigError: for a threshold outside 0 to 1.
        """
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} must be between 0 and 1")
        if self.present_N is not None and node_threshold == edge_threshold == 1:
            return unpruned(self.edges, self.influence_N, self.present_N)
        return prune(
            self.edges,
            self.weight_N,
            n_features=self.n_features,
            first_token=self.first_token,
            influence_N=self.influence_N,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            wanted=wanted,
        )

    def normalised(self) -> csr_array:
        """Absolute edges, each row divided by its sum."""
        return normalised(self.edges)

    def name(self, node: int) -> str:
        """Return the display name of a node: `L3/1204 @5`, `error L3 @5`, `" self" @2`, or a target's name."""
        a, n_positions = self.arrays, self.n_positions
        if node < self.first_error:
            return f"L{a.layer_F[node]}/{a.index_F[node]} @{a.position_F[node]}"
        if node < self.first_token:
            layer, position = divmod(node - self.first_error, n_positions)
            return f"error L{layer} @{position}"
        if node < self.first_target:
            position = node - self.first_token
            return f"{self.header.token_strings[position]!r} @{position}"
        return repr(self.header.targets[node - self.first_target].name)

    def position(self, node: int) -> int:
        """Return the position of a node."""
        if node < self.first_error:
            return int(self.arrays.position_F[node])
        if node < self.first_target:
            return (node - self.first_error) % self.n_positions
        return self.header.targets[node - self.first_target].position

    def save(self, path: str | Path) -> Path:
        """Write `PATH.safetensors` and `PATH.json` atomically and return the path of the second.

        Raises:
            ConfigError: for a path that cannot be written.
        """
        return files.write(self.header, self.arrays, path)

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Load a saved graph by the name of either file, or without the suffix.

        Raises:
            FormatError: for files that are missing, truncated, of a newer version, or inconsistent.
        """
        return cls(*files.read(path))


def _row_of_edge(a: GraphArrays) -> Int[np.ndarray, " E"]:
    return np.repeat(np.arange(len(a.row_R)), np.diff(a.start_R1))
