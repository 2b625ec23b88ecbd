"""From a graph to a circuit: suggest supernodes and predict the effect of changes. NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from crosslayer.graphs.graph import Graph
from crosslayer.graphs.influence import normalised

LIKENESS = 0.5
"""Cosine of two features' edges above which they are suggested as one supernode."""
MOST_APART = 1
"""Max distance in positions between features of one supernode."""


class Suggestion(NamedTuple):
    """A suggested supernode: features at the same tokens with similar edges."""

    nodes: list[int]
    likeness: float
    """Mean cosine of the members' edges."""


def suggested(graph: Graph, nodes: Collection[int], likeness: float = LIKENESS) -> list[Suggestion]:
    """Suggest supernodes among the given features, the most influential first.

    Two features are similar if they are at most one position apart and their normalised edges, incoming and outgoing,
    point the same way. Supernodes are the connected components of similar pairs, split again where two members are
    not similar.

    Args:
        nodes: features to choose from, for example those that pruning keeps.
    """
    chosen = sorted(n for n in nodes if n < graph.n_features)
    if len(chosen) < 2:
        return []
    W = normalised(graph.edges)
    signed = graph.edges.copy()
    signed.data = np.sign(signed.data) * W.data
    incoming, outgoing = signed[chosen], signed.T.tocsr()[chosen]
    into, out_of = _unit(csr_array(incoming)), _unit(csr_array(outgoing))
    cosine = ((into @ into.T).toarray() + (out_of @ out_of.T).toarray()) / 2
    position = graph.arrays.position_F[chosen]
    near = np.abs(position[:, None] - position[None]) <= MOST_APART
    alike = (cosine >= likeness) & near
    np.fill_diagonal(alike, False)
    _, group = connected_components(csr_array(alike), directed=False)
    found = []
    for g in range(int(group.max()) + 1):
        members = np.flatnonzero(group == g)
        while len(members) > 1:
            # Remove the least similar member until all are similar.
            inside = cosine[np.ix_(members, members)]
            if alike[np.ix_(members, members)].sum() == len(members) * (len(members) - 1):
                pairs = inside[np.triu_indices(len(members), 1)]
                found.append(Suggestion([chosen[m] for m in members], float(pairs.mean())))
                break
            members = np.delete(members, int(alike[np.ix_(members, members)].sum(1).argmin()))
    influence = graph.influence_N
    return sorted(found, key=lambda s: -float(influence[s.nodes].sum()))


def _unit(matrix: csr_array) -> csr_array:
    """Normalise rows to length 1; zero rows stay zero."""
    squares = np.asarray(matrix.multiply(matrix) @ np.ones(matrix.shape[1]))  # type: ignore[index]
    scale = 1 / np.sqrt(np.where(squares > 0, squares, 1.0))
    return csr_array(matrix.multiply(scale[:, None]))


def predicted_changes(graph: Graph, factors: Mapping[int, float]) -> Float[np.ndarray, " N"]:
    """Predict the change of each row's value when features are scaled, to first order.

    A feature whose inputs change passes the change on in proportion. The prediction ignores features that become active
    or inactive. Scaled features keep their new value.

    Args:
        factors: factor on the activation, by node of a feature.
    """
    edges, a = graph.edges, graph.arrays
    change_N = np.zeros(graph.n_nodes)
    # Relative change of each source.
    share_N = np.zeros(graph.n_nodes)
    for node, factor in factors.items():
        share_N[node] = factor - 1
        change_N[node] = (factor - 1) * float(a.activation_F[node])
    # Features are numbered by layer, so each row's sources come before it; targets last.
    rows = sorted(int(n) for n in a.row_R if int(n) not in factors)
    for node in rows:
        at = slice(edges.indptr[node], edges.indptr[node + 1])
        change = float(edges.data[at] @ share_N[edges.indices[at]])
        change_N[node] = change
        if node < graph.n_features and a.activation_F[node] > 0:
            share_N[node] = change / float(a.activation_F[node])
    return change_N
