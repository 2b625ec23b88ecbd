"""Choose the examples of a bundle from the candidates of a pass, and count the tokens at their peaks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crosslayer.bundles.schema import PLACES
from crosslayer.bundles.settings import ScanSettings
from crosslayer.features.sketch import Candidates, window_start

N_COUNTED = 5


class Examples(NamedTuple):
    """Examples of one layer's features; `indptr[f]:indptr[f + 1]` are those of feature f, top activations first.

    Bin 0 holds the top activations, bin q examples from the q-th quantile bin, from low to high activations.
    """

    indptr: NDArray
    start: NDArray
    """Start of the window in the token file."""
    length: NDArray
    peak: NDArray
    """Peak of the example, from the window's start."""
    value: NDArray
    bin: NDArray
    n_active: NDArray
    offset: NDArray
    """Offsets of active tokens from the window's start, example after example."""
    activation: NDArray
    """Their activations in 255ths of the feature's max activation, rounded up."""
    edge_FQ: NDArray
    """Edges of the quantile bins; 0 for a feature that does not fire."""
    token: NDArray
    """(F, places, N_COUNTED) most frequent tokens, -1 where there are fewer."""
    token_count: NDArray


def in_eight_bits(activation: NDArray, max_activation: NDArray) -> NDArray:
    """Quantise activations to 8 bits: 255ths of the feature's max, rounded up, so that none becomes 0."""
    return np.clip(np.ceil(activation.astype(np.float64) / max_activation * 255), 1, 255).astype(np.uint8)


def examples_of(
    candidates: Candidates, n_features: int, tokens: NDArray, context: int, settings: ScanSettings
) -> Examples:
    """Choose the examples of one layer and compute their data.

    Args:
        candidates: sorted by feature, then from high to low value.
        tokens: the token file, flat.
    """
    c, s = candidates, settings
    begins = np.searchsorted(c.feature, np.arange(n_features + 1))
    rank = np.arange(len(c.feature)) - begins[c.feature]
    top = rank < s.n_top
    reservoir = _lowest_hashes(c, begins, s.n_reservoir)
    size_F = np.bincount(c.feature[reservoir], minlength=n_features)
    # Candidates are sorted from high to low value, so bins are counted in reverse.
    up = size_F[c.feature] - 1 - _running_rank(reservoir, begins, c.feature)
    bin_ = np.where(reservoir, up * s.n_quantiles // np.maximum(size_F[c.feature], 1) + 1, 0)
    sampled = _sampled(c, bin_, reservoir & ~top, s)
    edge_FQ = _edges(c, bin_, reservoir, n_features, s)
    first, last = _runs(c, window_start(c.position, context, s))
    token, token_count = _frequent(c, reservoir, first, last, tokens, context, n_features)

    bin_[top] = 0
    chosen = (top | sampled).nonzero()[0]
    chosen = chosen[np.lexsort((chosen, -bin_[chosen], bin_[chosen] > 0, c.feature[chosen]))]
    taken = c.take(chosen)
    start = window_start(taken.position, context, s)
    highest_F = np.zeros(n_features, np.float64)
    highest_F[c.feature[rank == 0]] = c.value[rank == 0]
    entry_feature = np.repeat(taken.feature, np.diff(taken.indptr))
    return Examples(
        indptr=np.searchsorted(taken.feature, np.arange(n_features + 1)),
        start=start.astype(np.uint32),
        length=np.full(len(chosen), min(s.window, context), np.uint8),
        peak=(taken.position - start).astype(np.uint8),
        value=taken.value,
        bin=bin_[chosen].astype(np.uint8),
        n_active=np.diff(taken.indptr).astype(np.uint8),
        offset=taken.offset,
        activation=(
            in_eight_bits(taken.activation, highest_F[entry_feature]) if len(entry_feature) else np.zeros(0, np.uint8)
        ),
        edge_FQ=edge_FQ,
        token=token,
        token_count=token_count,
    )


def _lowest_hashes(c: Candidates, begins: NDArray, n: int) -> NDArray:
    """Select the `n` candidates of lowest hash per feature."""
    order = np.lexsort((c.hash, c.feature))
    chosen = np.zeros(len(order), bool)
    chosen[order] = np.arange(len(order)) - begins[c.feature[order]] < n
    return chosen


def _running_rank(mask: NDArray, begins: NDArray, feature: NDArray) -> NDArray:
    """Count the masked candidates before each candidate of the same feature."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[:-1] - before[begins[feature]]


def _sampled(c: Candidates, bin_: NDArray, eligible: NDArray, s: ScanSettings) -> NDArray:
    """Select the `per_quantile` candidates of lowest hash in each bin of each feature."""
    at = eligible.nonzero()[0]
    at = at[np.lexsort((c.hash[at], bin_[at], c.feature[at]))]
    group = c.feature[at].astype(np.int64) * (s.n_quantiles + 1) + bin_[at]
    first = np.concatenate([[True], group[1:] != group[:-1]]) if len(at) else np.zeros(0, bool)
    rank = np.arange(len(at)) - np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    sampled = np.zeros(len(c.feature), bool)
    sampled[at[rank < s.per_quantile]] = True
    return sampled


def _edges(c: Candidates, bin_: NDArray, reservoir: NDArray, n_features: int, s: ScanSettings) -> NDArray:
    """Return the min value of each bin and the max of the last; empty bins repeat the edge above them."""
    edge_FQ = np.full((n_features, s.n_quantiles + 1), np.inf, np.float32)
    at = reservoir.nonzero()[0]
    np.minimum.at(edge_FQ, (c.feature[at], bin_[at] - 1), c.value[at])
    max_F = np.zeros(n_features, np.float32)
    np.maximum.at(max_F, c.feature[at], c.value[at])
    edge_FQ[:, -1] = max_F
    return np.minimum.accumulate(edge_FQ[:, ::-1], axis=1)[:, ::-1]


def _runs(c: Candidates, start: NDArray) -> tuple[NDArray, NDArray]:
    """Return the first and last position of the run of active tokens around each peak, inside the window."""
    n = len(c.feature)
    if not n:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lengths = np.diff(c.indptr)
    owner = np.repeat(np.arange(n), lengths)
    offset = c.offset.astype(np.int64)
    breaks = np.ones(len(offset), bool)
    breaks[1:] = (owner[1:] != owner[:-1]) | (offset[1:] != offset[:-1] + 1)
    run = np.cumsum(breaks) - 1
    run_first = offset[breaks]
    run_last = offset[np.concatenate([breaks[1:], [True]])]
    is_peak = offset == (c.position - start)[owner]
    run_of = np.zeros(n, np.int64)
    run_of[owner[is_peak]] = run[is_peak]
    return start + run_first[run_of], start + run_last[run_of]


def _frequent(
    c: Candidates, reservoir: NDArray, first: NDArray, last: NDArray, tokens: NDArray, context: int, n_features: int
) -> tuple[NDArray, NDArray]:
    """Count the most frequent tokens at each place over the sampled candidates; ties are ordered by id."""
    token = np.full((n_features, len(PLACES), N_COUNTED), -1, np.int32)
    count = np.zeros((n_features, len(PLACES), N_COUNTED), np.uint16)
    begins_row = c.position % context == 0
    for place, position in enumerate((c.position, c.position - 1, first, last)):
        # The first token of a row has no token before it.
        which = reservoir & ~begins_row if place == 1 else reservoir
        ids = tokens[position[which]].astype(np.int64)
        pairs, counts = np.unique(c.feature[which].astype(np.int64) << 32 | ids, return_counts=True)
        owner, ids = pairs >> 32, pairs & 0xFFFF_FFFF
        order = np.lexsort((ids, -counts, owner))
        owner, ids, counts = owner[order], ids[order], counts[order]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        keep = rank < N_COUNTED
        token[owner[keep], place, rank[keep]] = ids[keep]
        count[owner[keep], place, rank[keep]] = counts[keep]
    return token, count
