"""The neighbour graph of features: a weighted sum over the bundle's lists of neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array

from crosslayer.core.errors import ConfigError

KINDS = ("coactivation", "encoder", "decoder")


def check_weights(weights: Mapping[str, float]) -> None:
    """Check the weights of the kinds of neighbours.

    Raises:
        ConfigError: for an unknown kind, a weight that is negative or not finite, or no weight above 0.
    """
    for kind, weight in weights.items():
        _check_kind(kind)
        if not 0 <= weight < math.inf:
            raise ConfigError(
                f"the cluster weight {kind}={weight} must be a finite number >= 0; give 0 to leave that kind out"
            )
    if not any(weights.values()):
        raise ConfigError("all cluster weights are 0; give one of them a positive number")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"there are no neighbours by {kind!r}; give weights to {', '.join(KINDS)}")


def neighbour_graph(
    lists: Mapping[str, tuple[Int[np.ndarray, "N K"], Float[np.ndarray, "N K"]]],
    weights: Mapping[str, float],
    live_N: Bool[np.ndarray, " N"],
) -> csr_array:
    """Build a symmetric, non-negative (N, N) graph without loops.

    The larger of the two directions of a kind is used. So a pair that only one feature lists counts in full (a rare
    feature may list a common one whose own list is full), and a pair that both list does not count twice.

    Args:
        lists: ids, -1 for none, and similarities of each kind; negative similarities count as 0.
        weights: weight of each kind; missing kinds count 0.
        live_N: features that may have edges.

    Raises:
        ConfigError: as `check_weights`, and for a list of an unknown kind.
    """
    check_weights(weights)
    n = len(live_N)
    total = csr_array((n, n), dtype=np.float32)
    for kind, (ids_NK, similarity_NK) in lists.items():
        _check_kind(kind)
        weight = weights.get(kind, 0.0)
        if not weight:
            continue
        source = np.repeat(np.arange(n, dtype=np.int32), ids_NK.shape[1])
        target, value = ids_NK.reshape(-1).astype(np.int32), similarity_NK.reshape(-1).astype(np.float32) * weight
        keep = (target >= 0) & (value > 0) & np.isfinite(value) & (target != source)
        keep &= live_N[source] & live_N[np.maximum(target, 0)]
        directed = coo_array((value[keep], (source[keep], target[keep])), shape=(n, n)).tocsr()
        total = csr_array(total + directed.maximum(directed.T))
    total.sort_indices()
    return total


def size_of(graph: csr_array) -> int:
    return len(graph.indptr) - 1


def contracted(graph: csr_array, part: Int[np.ndarray, " N"]) -> csr_array:
    """Contract the graph to groups and sum edges; the diagonal holds edges inside a group, counted from both ends."""
    n = len(part)
    of = csr_array((np.ones(n, np.float32), (part, np.arange(n))), shape=(int(part.max()) + 1, n))
    return csr_array(of @ graph @ of.T)


def without_loops(graph: csr_array) -> csr_array:
    coo = graph.tocoo()
    keep = coo.row != coo.col
    return csr_array((coo.data[keep], (coo.row[keep], coo.col[keep])), shape=(size_of(graph), size_of(graph)))
