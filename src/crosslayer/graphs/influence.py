"""Influence, pruning and scores of a graph: pure functions over a sparse matrix, with NumPy and SciPy only.

W is the matrix of absolute edges, each target's incoming row normalised to sum 1; p holds the targets' weights.
Influence is p W + p W^2 + ...; the graph is acyclic, so the sum is finite. The results equal circuit-tracer's on the
same graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from crosslayer.core.errors import FormatError


class Interval(NamedTuple):
    """A score, and its minimum and maximum if every node had been expanded."""

    value: float
    low: float
    high: float


class Scores(NamedTuple):
    """How much of a computation a graph explains.

    Attributes:
        replacement: share of the influence that ends in tokens rather than in errors.
        completeness: share of inputs that come from features or tokens rather than errors, nodes weighted by influence.
            As in circuit-tracer, tokens and errors, which have no inputs, count as complete.
        completeness_strict: the same over features and targets only.
    """

    replacement: Interval
    completeness: Interval
    completeness_strict: Interval


class Pruned(NamedTuple):
    """Result of pruning.

    Attributes:
        node_N: remaining nodes.
        target_E, source_E, weight_E, score_E: remaining edges between them.
        cumulative_N: per node, the share of influence held by it and all nodes ranked above it.
        influence_N: the influence by which nodes were ranked.
    """

    node_N: Bool[np.ndarray, " N"]
    target_E: Int[np.ndarray, " E"]
    source_E: Int[np.ndarray, " E"]
    weight_E: Float[np.ndarray, " E"]
    score_E: Float[np.ndarray, " E"]
    cumulative_N: Float[np.ndarray, " N"]
    influence_N: Float[np.ndarray, " N"]


def normalised(weight_NN: csr_array) -> csr_array:
    """Take absolute values and divide each row by its sum."""
    absolute = csr_array(
        (np.abs(weight_NN.data).astype(np.float64), weight_NN.indices, weight_NN.indptr), _shape(weight_NN)
    )
    total_N = row_sums(absolute)
    absolute.data /= np.repeat(np.where(total_N > 0, total_N, 1.0), np.diff(absolute.indptr))
    return absolute


def _shape(matrix: csr_array) -> tuple[int, int]:
    assert matrix.shape is not None
    return matrix.shape[0], matrix.shape[1]


def row_sums(matrix: csr_array) -> Float[np.ndarray, " N"]:
    """Sum each row."""
    return np.asarray(matrix @ np.ones(_shape(matrix)[1]))


def influence(W_NN: csr_array, weight_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Sum over all paths to the targets, p W + p W^2 + ...

    Args:
        W_NN: normalised; rows are targets, columns are sources.
        weight_N: p, zero except at the targets.

    Raises:
        FormatError: for edges that form a cycle.
    """
    W_T = W_NN.T.tocsr()
    total_N, flow_N = np.zeros(len(weight_N)), weight_N
    for _ in range(len(weight_N) + 1):
        flow_N = W_T @ flow_N
        if not flow_N.any():
            return total_N
        total_N += flow_N
    raise FormatError("the graph's edges form a cycle; make the file again")


def cutoff(score_X: Float[np.ndarray, " X"], share: float) -> float:
    """Return the smallest score among the fewest largest scores that together hold this share."""
    sorted_X = np.sort(score_X)[::-1]
    cumulative_X = np.cumsum(sorted_X)
    if not len(sorted_X) or cumulative_X[-1] <= 0:
        return 0.0
    at = int(np.searchsorted(cumulative_X / cumulative_X[-1], share))
    return float(sorted_X[min(at, len(sorted_X) - 1)])


def cumulative(score_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return, per node, the share held by it and all nodes with a larger score."""
    order = np.argsort(-score_N, kind="stable")
    shares = np.empty(len(score_N))
    sums = np.cumsum(score_N[order])
    shares[order] = sums / sums[-1] if len(sums) and sums[-1] > 0 else 1.0
    return shares


def unpruned(weight_NN: csr_array, influence_N: Float[np.ndarray, " N"], present_N: Bool[np.ndarray, " N"]) -> Pruned:
    """Return the given nodes and all edges without pruning."""
    coo = weight_NN.tocoo()
    score_E = normalised(weight_NN).tocoo().data * influence_N[coo.row]
    return Pruned(present_N, coo.row, coo.col, coo.data, score_E, cumulative(influence_N), influence_N)


def prune(
    weight_NN: csr_array,
    weight_N: Float[np.ndarray, " N"],
    *,
    n_features: int,
    first_token: int,
    influence_N: Float[np.ndarray, " N"],
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    wanted: Collection[int] = (),
) -> Pruned:
    """Keep the fewest nodes that hold `node_threshold` of the influence, then the fewest edges likewise.

    Tokens and targets always stay.

    Args:
        weight_NN: signed edges. Nodes are features, errors, tokens, targets.
        weight_N: p, zero except at the targets.
        influence_N: the influence by which nodes are ranked.
        wanted: nodes that stay whatever their influence, with all edges between them and other remaining nodes.
    """
    wanted_N = np.zeros(len(influence_N), dtype=bool)
    wanted_N[list(wanted)] = True
    keep_N = influence_N >= cutoff(influence_N, node_threshold)
    keep_N[first_token:] = True
    keep_N |= wanted_N
    coo = weight_NN.tocoo()
    among = keep_N[coo.row] & keep_N[coo.col] & (coo.data != 0)
    target_E, source_E, weight_E = coo.row[among], coo.col[among], coo.data[among]
    kept = csr_array((weight_E, (target_E, source_E)), shape=_shape(weight_NN))
    W = normalised(kept)
    reach_N = influence(W, weight_N) + weight_N
    coo = W.tocoo()
    score_E = coo.data * reach_N[coo.row]
    weight_E = kept.tocoo().data
    target_E, source_E = coo.row, coo.col
    strong = (score_E >= cutoff(score_E, edge_threshold)) | wanted_N[target_E] | wanted_N[source_E]
    while True:
        has_output, has_input = np.zeros_like(keep_N), np.zeros_like(keep_N)
        has_output[source_E[strong]] = True
        has_input[target_E[strong]] = True
        still_N = keep_N.copy()
        still_N[:first_token] &= has_output[:first_token]
        still_N[:n_features] &= has_input[:n_features]
        still_N |= wanted_N
        if (still_N == keep_N).all():
            break
        keep_N = still_N
        strong &= keep_N[target_E] & keep_N[source_E]
    chosen = np.flatnonzero(strong)
    return Pruned(
        keep_N,
        target_E[chosen],
        source_E[chosen],
        weight_E[chosen],
        score_E[chosen],
        cumulative(influence_N),
        influence_N,
    )


def scores(
    influence_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    layer_N: Int[np.ndarray, " F"],
    row_R: Int[np.ndarray, " R"],
    error_share_R: Float[np.ndarray, " R"],
    *,
    first_token: int,
    n_layers: int,
) -> Scores:
    """Compute scores, with the intervals left by nodes without a row.

    Args:
        influence_N: from complete rows.
        layer_N: layers of the features, which are the first nodes.
        row_R, error_share_R: nodes with a row, and the share of errors in it.
    """
    n_features = len(layer_N)
    total = weight_N.sum()
    reach_N = (influence_N + weight_N) / total
    error, token = reach_N[n_features:first_token].sum(), reach_N[first_token:].sum() - 1.0
    open_N = np.ones(n_features, dtype=bool)
    open_N[row_R[row_R < n_features]] = False
    left_L = np.bincount(layer_N[open_N], weights=reach_N[:n_features][open_N], minlength=n_layers)
    unexpanded = left_L.sum()
    ends = token + error
    value = token / ends if ends > 0 else 0.0
    replacement = _interval(value, token, token + unexpanded)
    known, complete = reach_N[row_R].sum(), (reach_N[row_R] * (1 - error_share_R)).sum()
    # Max influence that unexpanded nodes could add to features of lower layers.
    below = (np.cumsum(left_L[::-1])[:-1]).sum() if n_layers > 1 else 0.0
    strict = _interval(
        complete / known,
        complete / (known + unexpanded + below),
        (complete + unexpanded + below) / (known + unexpanded + below),
    )
    all_, whole = known + ends, complete + ends
    wide = unexpanded + below
    full = known + ends + unexpanded + wide
    loose = _interval(whole / all_, (whole + unexpanded) / full, (whole + unexpanded + wide) / full)
    return Scores(replacement, loose, strict)


def _interval(value: float, low: float, high: float) -> Interval:
    low, high = min(low, 1.0), min(high, 1.0)
    return Interval(float(np.clip(value, low, high)), float(low), float(high))


def subgraph_scores(
    weight_NN: csr_array,
    mass_N: Float[np.ndarray, " N"],
    weight_N: Float[np.ndarray, " N"],
    layer_N: Int[np.ndarray, " N"],
    keep: Sequence[int],
    *,
    n_features: int,
    first_token: int,
) -> Scores:
    """Compute scores with some features only, all others counting as errors, with the intervals left by what is open.

    Open is what flows into kept features without a row, and into edges that are not stored.

    Args:
        weight_NN: signed edges.
        mass_N: sum of the absolute values of each node's incoming edges, stored or not; 0 without a row.
        layer_N: layer of each feature and target; any number for other nodes.
        keep: features of the subgraph.
    """
    kept_N = np.zeros(len(weight_N), dtype=bool)
    kept_N[list(keep)] = True
    kept_N[n_features:] = True
    lost_N = (~kept_N).astype(float)
    lost_N[n_features:first_token] = 1.0
    has_row = (mass_N > 0) & kept_N
    scale_N = np.divide(1.0, mass_N, out=np.zeros(len(mass_N)), where=has_row)
    W = csr_array(
        (np.abs(weight_NN.data) * np.repeat(scale_N, np.diff(weight_NN.indptr)), weight_NN.indices, weight_NN.indptr),
        _shape(weight_NN),
    )
    stored_N = row_sums(W)
    rest_N = np.where(has_row, np.maximum(1 - stored_N, 0.0), 0.0)
    total = weight_N.sum()
    reach_N = (influence(W, weight_N) + weight_N) / total
    token, error = reach_N[first_token:].sum() - 1.0, reach_N @ lost_N
    lost_share_N = W @ lost_N
    error_share_N = np.divide(lost_share_N, stored_N, out=np.zeros(len(stored_N)), where=stored_N > 0)
    known, complete = (reach_N[has_row] @ x for x in (np.ones(has_row.sum()), 1 - error_share_N[has_row]))
    most, least = (reach_N[has_row] @ (1 - x[has_row]) for x in (lost_share_N, lost_share_N + rest_N))
    # Influence of kept features without a row, and the most that open flow could add to features of lower layers.
    no_row = reach_N[:n_features] @ (kept_N & ~has_row)[:n_features]
    open_N = np.where(kept_N & ~has_row, reach_N, reach_N * rest_N)
    open_N[n_features:first_token] = 0.0
    open_N[(layer_N < 0)] = 0.0
    flow, below = open_N.sum(), open_N @ layer_N
    ends = token + error
    replacement = _interval(token / ends if ends > 0 else 0.0, token, token + flow)
    wide, count = no_row + below, known + no_row + below
    strict = _interval(complete / known, least / count, (most + wide) / count)
    loose = _interval(
        (complete + ends) / (known + ends),
        (least + ends + flow) / (count + ends + flow),
        (most + ends + flow + wide) / (count + ends + flow),
    )
    return Scores(replacement, loose, strict)
