"""From the candidates that a pass kept of each feature to the examples that the bundle shows, and the tokens they peak
on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crosslayer.bundles.schema import PLACES
from crosslayer.bundles.settings import ScanSettings
from crosslayer.features.sketch import Candidates, window_start

N_COUNTED = 5


class Examples(NamedTuple):
    """Examples of one layer's features; those of feature f are `indptr[f]:indptr[f + 1]`, the top ones first.

    Bin 0 holds the top examples, bin q those drawn from the q-th quantile bin, from low to high activations.
    """

    indptr: NDArray
    start: NDArray
    """Of the window in the token file."""
    length: NDArray
    peak: NDArray
    """Of the example, from the window's start."""
    value: NDArray
    bin: NDArray
    n_active: NDArray
    offset: NDArray
    """Of active tokens from the window's start, example after example."""
    activation: NDArray
    """Of these, in 255ths of the feature's highest activation, rounded up."""
    edge_FQ: NDArray
    """Edges of the quantile bins; 0 for a feature that does not fire."""
    token: NDArray
    """(F, places, N_COUNTED) most frequent tokens, -1 where there are fewer."""
    token_count: NDArray


def in_eight_bits(activation: NDArray, highest: NDArray) -> NDArray:
    """Activations in 8 bits: 255ths of the feature's highest, rounded up, so that none becomes 0."""
    return np.clip(np.ceil(activation.astype(np.float64) / highest * 255), 1, 255).astype(np.uint8)


def examples_of(
    candidates: Candidates, n_features: int, tokens: NDArray, context: int, settings: ScanSettings
) -> Examples:
    """Choose and describe the examples of one layer.

    Args:
        candidates: by feature, and in each from the highest value down.
        tokens: the token file, flat.
    """
    c, s = candidates, settings
    begins = np.searchsorted(c.feature, np.arange(n_features + 1))
    rank = np.arange(len(c.feature)) - begins[c.feature]
    top = rank < s.n_top
    drawn = _lowest_hashes(c, begins, s.n_reservoir)
    size_F = np.bincount(c.feature[drawn], minlength=n_features)
    # Candidates are in order of value from the top, so bins count from the other end.
    up = size_F[c.feature] - 1 - _running_rank(drawn, begins, c.feature)
    bin_ = np.where(drawn, up * s.n_quantiles // np.maximum(size_F[c.feature], 1) + 1, 0)
    sampled = _sampled(c, bin_, drawn & ~top, s)
    edge_FQ = _edges(c, bin_, drawn, n_features, s)
    first, last = _runs(c, window_start(c.position, context, s))
    token, token_count = _frequent(c, drawn, first, last, tokens, context, n_features)

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
    """Which candidates are among the `n` of lowest hash of their feature."""
    order = np.lexsort((c.hash, c.feature))
    chosen = np.zeros(len(order), bool)
    chosen[order] = np.arange(len(order)) - begins[c.feature[order]] < n
    return chosen


def _running_rank(mask: NDArray, begins: NDArray, feature: NDArray) -> NDArray:
    """How many of the mask come before each candidate among its feature's."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[:-1] - before[begins[feature]]


def _sampled(c: Candidates, bin_: NDArray, eligible: NDArray, s: ScanSettings) -> NDArray:
    """The `per_quantile` of lowest hash in each bin of each feature."""
    at = eligible.nonzero()[0]
    at = at[np.lexsort((c.hash[at], bin_[at], c.feature[at]))]
    group = c.feature[at].astype(np.int64) * (s.n_quantiles + 1) + bin_[at]
    first = np.concatenate([[True], group[1:] != group[:-1]]) if len(at) else np.zeros(0, bool)
    rank = np.arange(len(at)) - np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    sampled = np.zeros(len(c.feature), bool)
    sampled[at[rank < s.per_quantile]] = True
    return sampled


def _edges(c: Candidates, bin_: NDArray, drawn: NDArray, n_features: int, s: ScanSettings) -> NDArray:
    """The lowest value of each bin, and the highest of the last; empty bins repeat the edge above them."""
    edge_FQ = np.full((n_features, s.n_quantiles + 1), np.inf, np.float32)
    at = drawn.nonzero()[0]
    np.minimum.at(edge_FQ, (c.feature[at], bin_[at] - 1), c.value[at])
    highest = np.zeros(n_features, np.float32)
    np.maximum.at(highest, c.feature[at], c.value[at])
    edge_FQ[:, -1] = highest
    return np.minimum.accumulate(edge_FQ[:, ::-1], axis=1)[:, ::-1]


def _runs(c: Candidates, start: NDArray) -> tuple[NDArray, NDArray]:
    """Positions of the first and the last token of the unbroken run, inside the window, that holds each peak."""
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
    c: Candidates, drawn: NDArray, first: NDArray, last: NDArray, tokens: NDArray, context: int, n_features: int
) -> tuple[NDArray, NDArray]:
    """The most frequent tokens at each of the places, over the candidates drawn; of equals the lower id comes first."""
    token = np.full((n_features, len(PLACES), N_COUNTED), -1, np.int32)
    count = np.zeros((n_features, len(PLACES), N_COUNTED), np.uint16)
    begins_row = c.position % context == 0
    for place, position in enumerate((c.position, c.position - 1, first, last)):
        # Before the first token of a row there is none.
        which = drawn & ~begins_row if place == 1 else drawn
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
