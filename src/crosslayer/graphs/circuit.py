"""From a graph to a circuit: which features may be drawn as one, and what changing some would do to the others. NumPy
and SciPy only.
"""

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
"""Cosine of two features' edges from which they are suggested as one."""
MOST_APART = 1
"""Positions that features of one suggestion may be apart."""


class Suggestion(NamedTuple):
    """Features that stand at the same tokens and are connected alike."""

    nodes: list[int]
    likeness: float
    """Mean cosine of their edges."""


def suggested(graph: Graph, nodes: Collection[int], likeness: float = LIKENESS) -> list[Suggestion]:
    """Supernodes to take or leave among some features, those of most influence first.

    Two features are alike if they stand at most one position apart and their edges, incoming and outgoing, each
    normalised, point the same way. Groups are what is left connected when all other pairs are cut, split again where
    two members are not alike.

    Args:
        nodes: features to choose from, as those that pruning keeps.
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
            # The member least like the others goes, until all are alike.
            inside = cosine[np.ix_(members, members)]
            if alike[np.ix_(members, members)].sum() == len(members) * (len(members) - 1):
                pairs = inside[np.triu_indices(len(members), 1)]
                found.append(Suggestion([chosen[m] for m in members], float(pairs.mean())))
                break
            members = np.delete(members, int(alike[np.ix_(members, members)].sum(1).argmin()))
    influence = graph.influence_N
    return sorted(found, key=lambda s: -float(influence[s.nodes].sum()))


def _unit(matrix: csr_array) -> csr_array:
    """Rows of length 1; those of zeros stay."""
    squares = np.asarray(matrix.multiply(matrix) @ np.ones(matrix.shape[1]))  # type: ignore[index]
    scale = 1 / np.sqrt(np.where(squares > 0, squares, 1.0))
    return csr_array(matrix.multiply(scale[:, None]))


def predicted_changes(graph: Graph, factors: Mapping[int, float]) -> Float[np.ndarray, " N"]:
    """What the edges say of scaling some features: the change of each row's value, all else linear.

    A feature that is changed by its inputs hands that on in proportion, as if it neither fell silent nor woke others.
    Those that are scaled keep their new value.

    Args:
        factors: by node of a feature, what its activation is multiplied by.
    """
    edges, a = graph.edges, graph.arrays
    change_N = np.zeros(graph.n_nodes)
    # By how much of itself each source has changed.
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
