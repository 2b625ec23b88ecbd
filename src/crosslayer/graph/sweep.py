"""One sweep from the top: which nodes get a row, and a proof of what the others could hold.

A feature's influence on the targets depends on nodes of later layers only. So when the sweep reaches a layer, the influence of
its nodes is final: the most influential are expanded (get their row of incoming edges), the rest is left, and the sweep goes
down. Each expanded row is normalised to one, so the targets' influence ends in tokens, in errors, or in features left
unexpanded; the last share is the bound: no node's influence, nor the totals of tokens and errors, is short by more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.graph.descent import Descent, Edges, Reads
from crosslayer.graph.targets import Resolved, feature_reads, target_reads
from crosslayer.graph.writes import Writes

BYTES_AT_ONCE = 1 << 29
"""Of gradients and what attention makes of them, for the rows that go down together."""


class Swept(NamedTuple):
    """Rows of a graph. Nodes are features, then errors, then tokens, then targets."""

    row_node_R: Int[np.ndarray, " R"]
    indptr_R1: Int[np.ndarray, " R1"]
    source_E: Int[np.ndarray, " E"]
    weight_E: Float[np.ndarray, " E"]
    value_R: Float[np.ndarray, " R"]
    """What incoming edges sum to: pre-activations."""
    constant_R: Float[np.ndarray, " R"]
    rest_R: Float[np.ndarray, " R"]
    """Sum of the edges that were not kept."""
    sums_R4: Float[np.ndarray, "R 4"]
    """Sums of absolute values of the edges from features, errors and tokens, and of those that were not kept."""
    influence_N: Float[np.ndarray, " N"]
    unexpanded: float
    """Share of the targets' influence in features that have no row."""


class _Sweep:
    """State of one sweep: influence so far, and the rows kept."""

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
        """Rows of these targets, in parts that fit; their weights flow on to their sources."""
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
        mass_N3 = torch.stack(
            [_mass(edges.feature_NC), _mass(edges.error_NLT.flatten(1)), _mass(edges.token_NT)], dim=1
        )
        total_N = mass_N3.sum(1)
        flow_N = (weight_N / total_N.double().clamp(min=torch.finfo(torch.float64).tiny)).to(edges.feature_NC.dtype)
        part = lambda m: (flow_N @ m.flatten(1).abs()).double()  # noqa: E731
        self.influence_N.index_add_(0, column_C, part(edges.feature_NC))
        self.influence_N[self.first_error : self.first_token] += part(edges.error_NLT)
        self.influence_N[self.first_token : self.first_target] += part(edges.token_NT)
        self._keep(reads, node_N, edges, column_C, mass_N3)

    def _keep(self, reads: Reads, node_N: Tensor, edges: Edges, column_C: Tensor, mass_N3: Tensor) -> None:
        floor_N = _floor(edges, mass_N3.sum(1), self.delta)
        device = column_C.device
        error_columns = torch.arange(self.first_error, self.first_token, device=device)
        token_columns = torch.arange(self.first_token, self.first_target, device=device)
        pieces = [
            (edges.feature_NC, column_C),
            (edges.error_NLT.flatten(1), error_columns),
            (edges.token_NT, token_columns),
        ]
        floors = [floor_N, floor_N, torch.zeros_like(floor_N)]
        kept = [_above(*piece, floor) for piece, floor in zip(pieces, floors, strict=True)]
        row = torch.cat([k[0] for k in kept])
        order = torch.argsort(row, stable=True)
        row, source, weight = row[order], torch.cat([k[1] for k in kept])[order], torch.cat([k[2] for k in kept])[order]
        n = len(node_N)
        count_N = torch.bincount(row, minlength=n)
        kept_N, kept_mass_N = weight.new_zeros(n), weight.new_zeros(n)
        kept_N.index_add_(0, row, weight)
        kept_mass_N.index_add_(0, row, weight.abs())
        all_N = edges.feature_NC.sum(1) + edges.error_NLT.sum((1, 2)) + edges.token_NT.sum(1)
        if self.delta == 0:
            rest_N, rest_mass_N = torch.zeros_like(all_N), torch.zeros_like(all_N)
        else:
            rest_N, rest_mass_N = all_N - kept_N, (mass_N3.sum(1) - kept_mass_N).clamp(min=0)
        sums = torch.cat([mass_N3, rest_mass_N[:, None]], dim=1)
        numpy = lambda t: t.cpu().numpy()  # noqa: E731
        self.rows.append((
            numpy(node_N), numpy(count_N), numpy(source.int()), numpy(weight), numpy(reads.value_N),
            numpy(edges.constant_N), numpy(rest_N), numpy(sums),
        ))  # fmt: skip

    def result(self, unexpanded: float) -> Swept:
        node, count, source, weight, value, constant, rest, sums = (
            np.concatenate(c) for c in zip(*self.rows, strict=True)
        )
        indptr = np.concatenate([[0], np.cumsum(count)])
        return Swept(
            node, indptr, source, weight, value, constant, rest, sums, self.influence_N.cpu().numpy(), unexpanded
        )


def _mass(values_NX: Tensor) -> Tensor:
    return values_NX.abs().sum(1)


def _above(values_NC: Tensor, column_C: Tensor, floor_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the entries above a floor for each row."""
    row, column = (values_NC.abs() > floor_N[:, None]).nonzero(as_tuple=True)
    return row, column_C[column], values_NC[row, column]


def _floor(edges: Edges, mass_N: Tensor, delta: float) -> Tensor:
    """For each row, a value such that edges under it hold at most this share of its mass, near the largest such."""
    parts = [edges.feature_NC.abs(), edges.error_NLT.flatten(1).abs()]
    floor_N = delta * mass_N / max(sum(p.shape[1] for p in parts), 1)
    for _ in range(4 if delta else 0):
        under_N = sum(p.where(p <= 2 * floor_N[:, None], 0.0).sum(1) for p in parts)
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
    on_progress: Callable[[float, str], None] = lambda done, figures: None,
) -> Swept:
    """Expand from the top until what is left unexpanded holds at most `tolerance` of the targets' influence.

    Args:
        tolerance: share of influence that may be left; 0 expands every active feature.
        max_nodes: features expanded at most; each layer may use what remains divided by the layers left.
        dtype: of the matrix products.
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
        allowed = len(which_N) if max_nodes is None else (max_nodes - expanded) // (layer + 1)
        budget = (tolerance * total - unexpanded) / (layer + 1)
        chosen = _choose(influence_N, budget, allowed, everything=tolerance == 0 and max_nodes is None)
        unexpanded += float(influence_N.sum() - influence_N[chosen].sum())
        expanded += len(chosen)
        if len(chosen):
            state.add(feature_reads(local, layer, which_N[chosen]), which_N[chosen], influence_N[chosen])
        on_progress((n_layers - layer) / n_layers, f"{expanded} nodes")
    return state.result(max(unexpanded, 0.0) / total)


def _choose(influence_N: Tensor, budget: float, allowed: int, *, everything: bool) -> Tensor:
    """Places, in order, of the fewest most influential whose absence leaves more than the budget."""
    if everything or not len(influence_N):
        return torch.arange(len(influence_N), device=influence_N.device)
    sorted_N, order = influence_N.sort(descending=True, stable=True)
    left_N = sorted_N.flip(0).cumsum(0).flip(0)
    n = int((left_N > max(budget, 0.0)).sum())
    return order[: min(n, allowed)].sort().values
