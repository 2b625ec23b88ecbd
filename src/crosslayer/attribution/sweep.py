"""One sweep from the top: choose which nodes get a row, and bound the influence of the others.

A feature's influence on the targets depends only on nodes of later layers. So when the sweep reaches a layer, the
influence of its nodes is final. The most influential nodes are expanded (get their row of incoming edges), and the
sweep moves down. Each expanded row is normalised to 1, so the targets' influence ends in tokens, in errors, or in
unexpanded features. The last share is the bound: the influence of any node, and the totals of tokens and errors, are
underestimated by at most this share.

Where a layer has few rows, lower layers join its descent: their nodes are chosen by their influence so far, which later
rows can only raise. What becomes influential only by rows of the same descent is expanded after it.

With a max number of nodes, a layer's nodes compete with those of lower layers, whose influence so far is an estimate
from below: the nodes of the layer are expanded that are among the most influential of all, as many as are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.descent import Descent, Reads
from crosslayer.attribution.targets import Resolved, feature_reads, target_reads
from crosslayer.attribution.writes import Writes, rank_at_position
from crosslayer.host.memory import fetch

BYTES_AT_ONCE = 1 << 29
"""Memory of gradients and attention intermediates for the rows that descend together."""
JOINED_BUDGET = 0.25
"""Share of a lower layer's budget to which it is expanded if it joins the descent of a higher one."""
MAX_JOINED = 4
"""Max number of layers that descend together while influence is still being estimated."""


class Swept(NamedTuple):
    """Rows of a graph. Nodes are features, then errors, then tokens, then targets."""

    row_node_R: Int[np.ndarray, " R"]
    indptr_R1: Int[np.ndarray, " R1"]
    source_E: Int[np.ndarray, " E"]
    weight_E: Float[np.ndarray, " E"]
    value_R: Float[np.ndarray, " R"]
    """Pre-activations: the sum of all incoming edges."""
    constant_R: Float[np.ndarray, " R"]
    rest_R: Float[np.ndarray, " R"]
    """Sum of the edges that are not stored."""
    sums_R4: Float[np.ndarray, "R 4"]
    """Sums of absolute values of the edges from features, errors and tokens, and of those that are not stored."""
    influence_N: Float[np.ndarray, " N"]
    unexpanded: float
    """Share of the targets' influence in features without a row."""


class _Site(NamedTuple):
    """Nodes of one layer that get rows."""

    layer: int
    node_N: Int[np.ndarray, " N"]


class _Batch(NamedTuple):
    """Rows that descended together, one per node; each column is a node, or none."""

    node_N: Int[np.ndarray, " N"]
    layer_N: Int[np.ndarray, " N"]
    source_X: Int[np.ndarray, " X"]
    all_NX: Float[Tensor, "N X"]
    absolute_NX: Float[Tensor, "N X"]
    mass_N3: Float[Tensor, "N 3"]
    inverse_N: Float[Tensor, " N"]
    """Inverse of a row's mass."""
    value_N: Float[Tensor, " N"]
    constant_N: Float[Tensor, " N"]

    def gained(self, layer: int, weight_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " X"]:
        """Return what the rows of one layer pass on to their sources."""
        own_N = torch.from_numpy(np.where(self.layer_N == layer, weight_N, 0.0)).to(self.inverse_N)
        return fetch((own_N * self.inverse_N) @ self.absolute_NX)[0]

    def stored(self, delta: float) -> tuple[np.ndarray, ...]:
        """Return the rows without their smallest edges, which hold at most a share `delta` of a row's mass."""
        floor_N = _floor(self.absolute_NX, self.mass_N3.sum(1), delta)
        stored_NX = self.absolute_NX > floor_N[:, None]
        row_E, column_E = stored_NX.nonzero(as_tuple=True)
        rest_N, rest_mass_N = torch.zeros_like(floor_N), torch.zeros_like(floor_N)
        if delta > 0:
            rest_N = self.all_NX.masked_fill(stored_NX, 0.0).sum(1)
            rest_mass_N = self.absolute_NX.masked_fill(stored_NX, 0.0).sum(1)
        sums_N4 = torch.cat([self.mass_N3, rest_mass_N[:, None]], dim=1)
        weight_E = self.all_NX[row_E, column_E]
        count_N, column_E, *others = fetch(
            stored_NX.sum(1), column_E, weight_E, self.value_N, self.constant_N, rest_N, sums_N4
        )
        return self.node_N, count_N, self.source_X[column_E], *others


class _Sweep:
    """State of one sweep: the influence so far, the expanded nodes and their rows.

    The nodes are followed by one that stands for no node.
    """

    def __init__(
        self,
        descent: Descent,
        resolved: Sequence[Resolved],
        *,
        tolerance: float,
        max_nodes: int | None,
    ) -> None:
        self.descent, self.local, self.resolved = descent, descent.local, resolved
        self.tolerance, self.max_nodes = tolerance, max_nodes
        self.everything = tolerance == 0 and max_nodes is None
        local = self.local
        self.n_features = len(local.layers)
        self.first_error = self.n_features
        self.first_token = self.first_error + local.n_layers * local.n_positions
        self.first_target = self.first_token + local.n_positions
        self.n_nodes = self.first_target + len(resolved)
        self.weight_R = np.array([r.weight for r in resolved])
        self.influence_N = np.zeros(self.n_nodes + 1)
        self.expanded_N = np.zeros(self.n_features, bool)
        self.unexpanded = 0.0
        self.rows: list[tuple[np.ndarray, ...]] = []
        self._lay_out()
        per_row = local.n_positions * (3 * local.x_LTD.shape[2] + 2 * descent.folded[0].output_DX.shape[1])
        self.at_once = max(8, BYTES_AT_ONCE // (per_row * local.x_LTD.element_size()))

    def _lay_out(self) -> None:
        """Lay out nodes and activations like the columns of edges: features by position, then layer; others."""
        local, below_TL = self.local, self.descent.writes.below
        by_place = np.lexsort((local.layers, local.positions))
        position_N, counts_T = local.positions[by_place] - local.n_skip, below_TL[:, -1]
        rank_N = rank_at_position(position_N, counts_T)
        self.node_TK = np.full((len(counts_T), int(counts_T.max(initial=0))), self.n_nodes)
        self.node_TK[position_N, rank_N] = by_place
        activation_N = torch.cat([local.features.activation_N, local.features.activation_N.new_zeros(1)])
        self.activation_TK = activation_N[torch.from_numpy(self.node_TK.clip(max=self.n_features)).to(local.device)]
        others_LTJ = np.full((local.n_layers + 1, local.n_positions, 2), self.n_nodes)
        others_LTJ[..., 0] = np.arange(self.first_error, self.first_target).reshape(-1, local.n_positions)
        self.other_X = others_LTJ.flatten()

    def band(self, layer: int) -> list[_Site]:
        """Choose nodes of a layer, and of lower ones as long as there are few rows."""
        local, size, n_rows, sites = self.local, 0, 0, list[_Site]()
        for lower in range(layer, -1, -1):
            features = self._choose(lower, joins=lower < layer) if lower < local.n_layers else np.zeros(0, np.int64)
            targets = [i for i, r in enumerate(self.resolved) if r.layer == lower]
            positions = np.concatenate([local.positions[features], [self.resolved[i].position for i in targets]])
            size, n_rows = size + int((positions + 1).sum()), n_rows + len(positions)
            if lower < layer and (size > self.descent.plan.together or n_rows > self.at_once):
                break
            sites.append(_Site(lower, np.concatenate([features, self.first_target + np.array(targets, np.int64)])))
            self.expanded_N[features] = True
            if not self.everything and (layer == local.n_layers or len(sites) == MAX_JOINED):
                break
        return sites

    def run(self, sites: list[_Site]) -> None:
        """Compute the rows of nodes that were chosen, and of those that turn out to be missing."""
        joined = self._batch(sites) if len(sites) > 1 else None
        for i, (layer, node_N) in enumerate(sites):
            if joined is not None:
                self._gain(joined, layer)
                node_N = self._choose(layer, joins=False) if i else node_N[:0]
                self.expanded_N[node_N] = True
            for begin in range(0, len(node_N), self.at_once):
                batch = self._batch([_Site(layer, node_N[begin : begin + self.at_once])])
                assert batch is not None
                self._gain(batch, layer)
                self.rows.append(batch.stored(self.tolerance / 10))
            if layer < self.local.n_layers:
                left_N = (self.local.layers == layer) & ~self.expanded_N
                self.unexpanded += float(self.influence_N[: self.n_features][left_N].sum())
        if joined is not None:
            self.rows.append(joined.stored(self.tolerance / 10))

    def _batch(self, sites: list[_Site]) -> _Batch | None:
        """Compute the rows of nodes; None if there are none."""
        reads = [r for layer, node_N in sites for r in self._reads(layer, node_N)]
        if not reads:
            return None
        top = reads[0].layer
        edges, tall = self.descent.edges(reads), self.descent.tall(top)
        order_N = torch.from_numpy(edges.order).to(self.local.device)
        n = edges.n_columns
        edges.all_NX[:, :n].mul_(self.activation_TK[:, :tall].flatten())
        absolute_NX = edges.all_NX.abs()
        ends = (n, absolute_NX.shape[1] - 2 * self.local.n_positions)
        mass_N3 = torch.stack([m.sum(1) for m in absolute_NX.tensor_split(ends, dim=1)], dim=1)
        return _Batch(
            np.concatenate([s.node_N for s in sites])[edges.order],
            np.concatenate([np.full(len(s.node_N), s.layer) for s in sites])[edges.order],
            np.concatenate([self.node_TK[:, :tall].flatten(), self.other_X]),
            edges.all_NX,
            absolute_NX,
            mass_N3,
            # A node without incoming edges passes no influence on.
            torch.where(mass_N3.sum(1) > 0, mass_N3.sum(1).reciprocal(), 0.0),
            torch.cat([r.value_N for r in reads])[order_N],
            edges.constant_N,
        )

    def _reads(self, layer: int, node_N: Int[np.ndarray, " N"]) -> list[Reads]:
        feature = node_N < self.n_features
        targets = [self.resolved[i - self.first_target] for i in node_N[~feature].tolist()]
        reads = [feature_reads(self.local, layer, node_N[feature])] if feature.any() else []
        return reads + ([target_reads(targets)] if targets else [])

    def _gain(self, batch: _Batch, layer: int) -> None:
        """Pass the influence of a layer's nodes on to the sources of their rows."""
        own_N = np.concatenate([self.influence_N[: self.first_target], self.weight_R])[batch.node_N]
        # Distinct columns are distinct nodes, but for those that are no node.
        self.influence_N[batch.source_X] += batch.gained(layer, own_N)

    def _choose(self, layer: int, *, joins: bool) -> Int[np.ndarray, " N"]:
        """Select the fewest most influential features of a layer that keep the unexpanded rest within the budget.

        Args:
            joins: influence is an estimate from below.
        """
        here_N = ((self.local.layers == layer) & ~self.expanded_N).nonzero()[0]
        if self.everything:
            return here_N
        budget = (self.tolerance * self.weight_R.sum() - self.unexpanded) / (layer + 1)
        order = np.argsort(-self.influence_N[here_N], kind="stable")
        left_N = self.influence_N[here_N][order][::-1].cumsum()[::-1]
        n = int((left_N > max(budget, 0.0) * (JOINED_BUDGET if joins else 1.0)).sum())
        return np.sort(here_N[order[: min(n, self._allowed(layer))]])

    def _allowed(self, layer: int) -> int:
        """Count a layer's nodes among the most influential of this and all lower layers, as many as are left."""
        left = self.n_features if self.max_nodes is None else self.max_nodes - int(self.expanded_N.sum())
        competing_N = ((self.local.layers <= layer) & ~self.expanded_N).nonzero()[0]
        if left >= len(competing_N):
            return int((self.local.layers[competing_N] == layer).sum())
        order = np.argsort(-self.influence_N[competing_N], kind="stable")[: max(left, 0)]
        return int((self.local.layers[competing_N[order]] == layer).sum())

    def result(self) -> Swept:
        node, count, source, weight, value, constant, rest, sums = (
            np.concatenate(c) for c in zip(*self.rows, strict=True)
        )
        indptr = np.concatenate([[0], np.cumsum(count)])
        unexpanded = self.unexpanded / self.weight_R.sum()
        return Swept(
            node,
            indptr,
            source.astype(np.int32),
            weight,
            value,
            constant,
            rest,
            sums,
            self.influence_N[:-1],
            unexpanded,
        )


def _floor(absolute_NX: Tensor, mass_N: Tensor, delta: float) -> Tensor:
    """Return a large cutoff per row such that smaller edges hold at most a share `delta` of the row's mass."""
    most_N = delta * mass_N
    floor_N = most_N / max(absolute_NX.shape[1], 1)
    for _ in range(2 if delta else 0):
        higher_N = 4 * floor_N
        under_N = absolute_NX.masked_fill(absolute_NX > higher_N[:, None], 0.0).sum(1)
        floor_N = torch.where(under_N <= most_N, higher_N, floor_N)
    return floor_N


@torch.no_grad()
def sweep(
    writes: Writes,
    resolved: Sequence[Resolved],
    *,
    tolerance: float,
    max_nodes: int | None,
    dtype: torch.dtype,
    on_progress: Callable[[float, str], None] = lambda done, metrics: None,
) -> Swept:
    """Expand nodes from the top until unexpanded nodes hold at most `tolerance` of the targets' influence.

    Args:
        tolerance: share of influence that may stay unexpanded; 0 expands every active feature.
        max_nodes: max number of expanded features, of all layers together.
        dtype: dtype of the matrix products.
    """
    n_layers = writes.local.n_layers
    state = _Sweep(Descent(writes, dtype), resolved, tolerance=tolerance, max_nodes=max_nodes)
    layer = n_layers
    while layer >= 0:
        sites = state.band(layer)
        state.run(sites)
        layer = sites[-1].layer - 1
        on_progress((n_layers - layer) / (n_layers + 1), f"{int(state.expanded_N.sum())} nodes")
    return state.result()
