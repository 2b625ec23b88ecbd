"""One sweep from the top: choose which nodes get a row, and bound the influence of the others.

A feature's influence on the targets depends only on nodes of later layers. So when the sweep reaches a layer, the
influence of its nodes is final. The most influential nodes are expanded (get their row of incoming edges), and the
sweep moves down. Each expanded row is normalised to 1, so the targets' influence ends in tokens, in errors, or in
unexpanded features. The last share is the bound: the influence of any node, and the totals of tokens and errors, are
underestimated by at most this share.

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

from crosslayer.attribution.descent import Descent, Edges, Reads
from crosslayer.attribution.targets import Resolved, feature_reads, target_reads
from crosslayer.attribution.writes import Writes

BYTES_AT_ONCE = 1 << 29
"""Memory of gradients and attention intermediates for the rows that descend together."""


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


class _Sweep:
    """State of one sweep: the influence so far and the stored rows."""

    def __init__(self, descent: Descent, writes: Writes, resolved: Sequence[Resolved], delta: float) -> None:
        self.descent, self.local, self.delta = descent, descent.local, delta
        features = self.local.features
        n_layers, n_positions = self.local.n_layers, self.local.n_positions
        self.n_features = len(features.layer_N)
        self.first_error = self.n_features
        self.first_token = self.first_error + n_layers * n_positions
        self.first_target = self.first_token + n_positions
        device = features.layer_N.device
        self.influence_N = torch.zeros(self.first_target + len(resolved), dtype=torch.float64, device=device)
        self.by_place = torch.argsort(features.position_N * n_layers + features.layer_N, stable=True)
        self.rows: list[tuple[np.ndarray, ...]] = []

    def add(self, reads: Reads, node_N: Tensor, weight_N: Tensor) -> None:
        """Add rows for these targets in chunks that fit memory, and pass their weights on to their sources."""
        tall = self.local.n_positions * (3 * self.local.x_LTD.shape[2] + 2 * self.descent.folded[0].output_DX.shape[1])
        at_once = max(8, BYTES_AT_ONCE // (tall * self.local.x_LTD.element_size()))
        for part in torch.arange(len(node_N), device=node_N.device).split(at_once):
            some = Reads(reads.layer, *(x[part] for x in reads[1:]))  # type: ignore[arg-type]
            self._add(some, node_N[part], weight_N[part])

    def _add(self, reads: Reads, node_N: Tensor, weight_N: Tensor) -> None:
        edges = self.descent.edges(reads)
        features = self.local.features
        column_C = self.by_place[features.layer_N[self.by_place] < reads.layer]
        edges.feature_NC.mul_(features.activation_N[column_C])
        absolute_NX = edges.all_NX.abs()
        n, ends = len(column_C), len(column_C) + self.first_token - self.first_error
        mass_N3 = torch.stack([m.sum(1) for m in absolute_NX.tensor_split((n, ends), dim=1)], dim=1)
        whole_N = mass_N3.sum(1).double()
        # A node without incoming edges passes no influence on.
        flow_N = torch.where(whole_N > 0, weight_N / whole_N.where(whole_N > 0, 1.0), 0.0).to(absolute_NX.dtype)
        gained_X = (flow_N @ absolute_NX).double()
        self.influence_N.index_add_(0, column_C, gained_X[:n])
        self.influence_N[self.first_error : self.first_target] += gained_X[n:]
        others = torch.arange(self.first_error, self.first_target, device=column_C.device)
        self._store(reads, node_N, edges, absolute_NX, torch.cat([column_C, others]).int(), mass_N3)

    def _store(
        self, reads: Reads, node_N: Tensor, edges: Edges, absolute_NX: Tensor, source_X: Tensor, mass_N3: Tensor
    ) -> None:
        floor_N = _floor(absolute_NX, mass_N3.sum(1), self.delta)
        stored_NX = absolute_NX > floor_N[:, None]
        row, column = stored_NX.nonzero(as_tuple=True)
        rest_N, rest_mass_N = torch.zeros_like(floor_N), torch.zeros_like(floor_N)
        if self.delta > 0:
            rest_N = edges.all_NX.masked_fill(stored_NX, 0.0).sum(1)
            rest_mass_N = absolute_NX.masked_fill(stored_NX, 0.0).sum(1)
        sums = torch.cat([mass_N3, rest_mass_N[:, None]], dim=1)
        numpy = lambda t: t.cpu().numpy()  # noqa: E731
        self.rows.append(
            (
                numpy(node_N),
                numpy(stored_NX.sum(1)),
                numpy(source_X[column]),
                numpy(edges.all_NX[row, column]),
                numpy(reads.value_N),
                numpy(edges.constant_N),
                numpy(rest_N),
                numpy(sums),
            )
        )

    def result(self, unexpanded: float) -> Swept:
        node, count, source, weight, value, constant, rest, sums = (
            np.concatenate(c) for c in zip(*self.rows, strict=True)
        )
        indptr = np.concatenate([[0], np.cumsum(count)])
        return Swept(
            node, indptr, source, weight, value, constant, rest, sums, self.influence_N.cpu().numpy(), unexpanded
        )


def _floor(absolute_NX: Tensor, mass_N: Tensor, delta: float) -> Tensor:
    """Return a large cutoff per row such that smaller edges hold at most a share `delta` of the row's mass."""
    floor_N = delta * mass_N / max(absolute_NX.shape[1], 1)
    for _ in range(4 if delta else 0):
        under_N = absolute_NX.where(absolute_NX <= 2 * floor_N[:, None], 0.0).sum(1)
        floor_N = torch.where(under_N <= delta * mass_N, 2 * floor_N, floor_N)
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
    local = writes.local
    descent = Descent(local, writes, dtype)
    state = _Sweep(descent, writes, resolved, delta=tolerance / 10)
    total = sum(r.weight for r in resolved)
    unexpanded, expanded = 0.0, 0
    features, n_layers = local.features, local.n_layers
    for layer in range(n_layers, -1, -1):
        site = sorted((i for i, r in enumerate(resolved) if r.layer == layer), key=lambda i: resolved[i].position)
        if site:
            nodes = torch.tensor([state.first_target + i for i in site], device=features.layer_N.device)
            weights = torch.tensor([resolved[i].weight for i in site], dtype=torch.float64, device=nodes.device)
            state.add(target_reads([resolved[i] for i in site]), nodes, weights)
        if layer == n_layers:
            continue
        which_N = (features.layer_N == layer).nonzero().flatten()
        influence_N = state.influence_N[which_N]
        allowed = len(which_N)
        if max_nodes is not None:
            allowed = _allowed(state.influence_N[: state.n_features], features.layer_N, layer, max_nodes - expanded)
        budget = (tolerance * total - unexpanded) / (layer + 1)
        chosen = _choose(influence_N, budget, allowed, everything=tolerance == 0 and max_nodes is None)
        unexpanded += float(influence_N.sum() - influence_N[chosen].sum())
        expanded += len(chosen)
        if len(chosen):
            state.add(feature_reads(local, layer, which_N[chosen]), which_N[chosen], influence_N[chosen])
        on_progress((n_layers - layer) / n_layers, f"{expanded} nodes")
    return state.result(max(unexpanded, 0.0) / total)


def _allowed(influence_N: Tensor, layer_N: Tensor, layer: int, left: int) -> int:
    """Count the nodes of a layer among the `left` most influential of this and all lower layers."""
    competing_N = layer_N <= layer
    if left >= int(competing_N.sum()):
        return int((layer_N == layer).sum())
    order = influence_N[competing_N].argsort(descending=True, stable=True)[:left]
    return int((layer_N[competing_N][order] == layer).sum())


def _choose(influence_N: Tensor, budget: float, allowed: int, *, everything: bool) -> Tensor:
    """Select, in order, the fewest most influential features that keep the unexpanded rest within the budget."""
    if everything or not len(influence_N):
        return torch.arange(len(influence_N), device=influence_N.device)
    sorted_N, order = influence_N.sort(descending=True, stable=True)
    left_N = sorted_N.flip(0).cumsum(0).flip(0)
    n = int((left_N > max(budget, 0.0)).sum())
    return order[: min(n, allowed)].sort().values
