"""Statistics and example candidates of one layer's features over text, in bounded memory, and mergeable.

A `LayerSketch` is a commutative monoid: batches in any order, on any number of ranks, with any interruptions, merge to
a bitwise identical result. To that end sums are in fixed point, the bins of histograms are powers of two, and random
numbers are hashes of feature and position.

An *example candidate* of a feature is its peak in one row of text: the max activation there, the first of several. The
sketch stores the `n_top` top candidates and the `n_reservoir` of lowest hash, which are a uniform sample of all, each
with the feature's activations in a window around it. No two candidates share a row, so no two windows overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from crosslayer.bundles.settings import LINEAR_BINS, LOG_BINS, LOG_FIRST_EXPONENT, ScanSettings
from crosslayer.clt.sparse import Active

FIXED_POINT = 2.0**20
"""Activations are summed in units of 2^-20."""
COMPACT_AT_LEAST = 200_000
"""Min number of candidates that accumulate before they are ranked with the stored ones."""
NO_EXPONENT = -126
"""Exponent of a feature that has not fired: the minimum, as 2^-126 is the smallest normal float32."""


def mix(key: Tensor) -> Tensor:
    """Mix each 64-bit key to 63 pseudo-random bits (the finaliser of SplitMix64)."""

    def shifted(x: Tensor, n: int) -> Tensor:
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = key * -7046029254386353131
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return (x ^ shifted(x, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def hash_of(feature: Tensor, position: Tensor) -> Tensor:
    """Hash a candidate by feature (flat id) and position."""
    return mix(mix(position.long()) + feature.long())


def window_start(position: NDArray, context: int, settings: ScanSettings) -> NDArray:
    """Return the start of the window around a position: `before` tokens earlier, moved to lie within the row."""
    row_start = position - position % context
    last = row_start + max(context - settings.window, 0)
    return np.clip(position - settings.before, row_start, last)


class Candidates(NamedTuple):
    """Example candidates of one layer.

    The activations of candidate i are entries `indptr[i]:indptr[i + 1]` of `offset` and `activation`.
    """

    feature: NDArray
    """Index in the layer, int32."""
    position: NDArray
    """Position of the peak in the token file, int64."""
    value: NDArray
    """Activation at the peak, float32."""
    hash: NDArray
    indptr: NDArray
    offset: NDArray
    """Offset from the window's start, uint8."""
    activation: NDArray
    """float32."""

    @classmethod
    def none(cls) -> Candidates:
        empty = lambda kind: np.zeros(0, kind)  # noqa: E731
        return cls(
            empty(np.int32),
            empty(np.int64),
            empty(np.float32),
            empty(np.int64),
            np.zeros(1, np.int64),
            empty(np.uint8),
            empty(np.float32),
        )

    def take(self, which: NDArray) -> Candidates:
        """Select these candidates, in this order."""
        lengths = np.diff(self.indptr)[which]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        entry = np.arange(indptr[-1]) + np.repeat(self.indptr[:-1][which] - indptr[:-1], lengths)
        feature, position, value, chance = (a[which] for a in self[:4])
        return Candidates(feature, position, value, chance, indptr, self.offset[entry], self.activation[entry])

    @staticmethod
    def joined(parts: list[Candidates]) -> Candidates:
        feature, position, value, chance, offset, activation = (
            np.concatenate([p[i] for p in parts]) for i in (0, 1, 2, 3, 5, 6)
        )
        lengths = np.concatenate([np.diff(p.indptr) for p in parts])
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return Candidates(feature, position, value, chance, indptr, offset, activation)


class LayerSketch:
    """Statistics and example candidates of one layer's features.

    Attributes:
        count_SF: tokens on which each feature fires, per stream of text.
        sum_F: sums of activations, in units of `1 / FIXED_POINT`.
        max_F, min_F: max and min activation; 0 and infinity for a feature that has not fired.
        log_FX, linear_FX: histograms of activations; see `settings`.
        exponent_F: exponents of the linear histogram's range.
    """

    def __init__(
        self, layer: int, n_features: int, n_streams: int, context: int, settings: ScanSettings, device: torch.device
    ) -> None:
        self.layer, self.n_features, self.context, self.settings = layer, n_features, context, settings
        counts = lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=device)  # noqa: E731
        self.count_SF, self.sum_F = counts(n_streams, n_features), counts(n_features)
        self.log_FX, self.linear_FX = counts(n_features, LOG_BINS), counts(n_features, LINEAR_BINS)
        self.exponent_F = torch.full((n_features,), NO_EXPONENT, dtype=torch.int64, device=device)
        self.max_F = torch.zeros(n_features, device=device)
        self.min_F = torch.full((n_features,), torch.inf, device=device)
        self._stored, self._waiting, self._n_waiting = Candidates.none(), list[Candidates](), 0
        # A candidate below the first and above the second can no longer be selected.
        self._value_floor_F = torch.zeros(n_features, device=device)
        self._hash_ceiling_F = torch.full((n_features,), torch.iinfo(torch.int64).max, device=device)

    @torch.no_grad()
    def add(self, active: Active, stream: int, first_row: int, n_skip: int) -> None:
        """Add the active entries of some rows.

        Args:
            active: entries of whole rows without their first `n_skip` positions, row by row.
            stream: stream of the text.
            first_row: number of the first row in the token file.
        """
        keep_K = active.value_K > 0
        token_K, feature_K, value_K = active.token_K, active.feature_K, active.value_K
        if not bool(keep_K.all()):
            token_K, feature_K, value_K = token_K[keep_K], feature_K[keep_K], value_K[keep_K]
        value_K = value_K.float()
        body = self.context - n_skip
        row_K = token_K.div(body, rounding_mode="floor")
        position_K = token_K - row_K * body + n_skip
        self._count(feature_K, value_K, stream)
        n_rows = -(-active.shape[0] // body)
        self._propose(row_K * self.n_features + feature_K, position_K, value_K, n_rows, first_row)

    def _count(self, feature_K: Int[Tensor, " K"], value_K: Float[Tensor, " K"], stream: int) -> None:
        one_K = torch.ones_like(feature_K)
        bits_K = value_K.view(torch.int32).long()
        self.count_SF[stream].index_add_(0, feature_K, one_K)
        self.sum_F.index_add_(0, feature_K, (value_K * FIXED_POINT).round().long())
        self.min_F.scatter_reduce_(0, feature_K, value_K, "amin")
        self.max_F.scatter_reduce_(0, feature_K, value_K, "amax")
        bin_K = ((bits_K >> 22) - 2 * (127 + LOG_FIRST_EXPONENT)).clamp_(0, LOG_BINS - 1)
        self.log_FX.view(-1).index_add_(0, feature_K * LOG_BINS + bin_K, one_K)
        self._widen((self.max_F.view(torch.int32).long() >> 23) - 126)
        bin_K = torch.ldexp(value_K, 5 - self.exponent_F[feature_K]).long()
        self.linear_FX.view(-1).index_add_(0, feature_K * LINEAR_BINS + bin_K, one_K)

    def _widen(self, exponent_F: Int[Tensor, " F"]) -> None:
        """Widen linear histograms to a larger range; each doubling merges pairs of bins."""
        left_F = exponent_F - self.exponent_F
        fresh_F = self.exponent_F == NO_EXPONENT
        self.exponent_F = torch.maximum(self.exponent_F, exponent_F)
        left_F = torch.where(fresh_F, 0, left_F).clamp_(0, 6)
        while bool((left_F > 0).any()):
            at = (left_F > 0).nonzero()[:, 0]
            halved = self.linear_FX[at].unflatten(1, (-1, 2)).sum(2)
            self.linear_FX[at] = torch.cat([halved, torch.zeros_like(halved)], dim=1)
            left_F[at] -= 1

    def _propose(
        self,
        cell_K: Int[Tensor, " K"],
        position_K: Int[Tensor, " K"],
        value_K: Float[Tensor, " K"],
        n_rows: int,
        first_row: int,
    ) -> None:
        """Find the peak of each feature in each row, and its window, if it may be selected."""
        # Value and position in one number, so that the max is the first of the highest values.
        key_K = (value_K.view(torch.int32).long() << 32) | (self.context - position_K)
        best = torch.zeros(n_rows * self.n_features, dtype=torch.int64, device=cell_K.device)
        best.scatter_reduce_(0, cell_K, key_K, "amax")
        cell_X = best.nonzero()[:, 0]
        key_X = best[cell_X]
        row_X = cell_X.div(self.n_features, rounding_mode="floor")
        feature_X = cell_X - row_X * self.n_features
        place_X = self.context - (key_X & 0xFFFF_FFFF)
        value_X = (key_X >> 32).int().view(torch.float32)
        position_X = (row_X + first_row) * self.context + place_X
        hash_X = hash_of(feature_X + self.layer * self.n_features, position_X)
        wanted_X = (value_X >= self._value_floor_F[feature_X]) | (hash_X <= self._hash_ceiling_F[feature_X])
        if not bool(wanted_X.any()):
            return
        chosen = wanted_X.nonzero()[:, 0]
        place_X, cell_X = place_X[chosen], cell_X[chosen]
        start_X = (place_X - self.settings.before).clamp(0, max(self.context - self.settings.window, 0))
        number = torch.full_like(best, -1)
        number[cell_X] = torch.arange(len(cell_X), device=best.device)
        number_K = number[cell_K]
        inside = (number_K >= 0).nonzero()[:, 0]
        number_K, position_K, value_K = number_K[inside], position_K[inside], value_K[inside]
        offset_K = position_K - start_X[number_K]
        inside = ((offset_K >= 0) & (offset_K < self.settings.window)).nonzero()[:, 0]
        number_K, offset_K, value_K = number_K[inside], offset_K[inside], value_K[inside]
        order = number_K.argsort(stable=True)
        lengths = torch.bincount(number_K, minlength=len(cell_X))
        numpy = lambda t: t.cpu().numpy()  # noqa: E731
        self._waiting.append(
            Candidates(
                numpy(feature_X[chosen].int()),
                numpy(position_X[chosen]),
                numpy(value_X[chosen]),
                numpy(hash_X[chosen]),
                np.concatenate([[0], np.cumsum(numpy(lengths))]),
                numpy(offset_K[order].to(torch.uint8)),
                numpy(value_K[order]),
            )
        )
        self._n_waiting += len(cell_X)
        if self._n_waiting > max(COMPACT_AT_LEAST, len(self._stored.feature) // 4):
            self._compact()

    def _compact(self) -> None:
        """Rank new and stored candidates, and keep the best of both kinds, sorted by feature and value."""
        if not self._waiting:
            return
        everything = Candidates.joined([self._stored, *self._waiting])
        self._waiting, self._n_waiting = [], 0
        by_hash = np.lexsort((everything.hash, everything.feature))
        by_value = np.lexsort((everything.position, -everything.value, everything.feature))
        rank_in_hash, rank_in_value = (self._ranks(everything.feature, order) for order in (by_hash, by_value))
        s = self.settings
        keep = (rank_in_value < s.n_top) | (rank_in_hash < s.n_reservoir)
        last_top, last_drawn = rank_in_value == s.n_top - 1, rank_in_hash == s.n_reservoir - 1
        device = self.max_F.device
        place = lambda mask: torch.from_numpy(everything.feature[mask].astype(np.int64)).to(device)  # noqa: E731
        self._value_floor_F[place(last_top)] = torch.from_numpy(everything.value[last_top]).to(device)
        self._hash_ceiling_F[place(last_drawn)] = torch.from_numpy(everything.hash[last_drawn]).to(device)
        self._stored = everything.take(by_value[keep[by_value]])

    def _ranks(self, feature: NDArray, order: NDArray) -> NDArray:
        """Return the rank of each candidate within its feature, for an order that sorts by feature first."""
        begins = np.searchsorted(feature[order], np.arange(self.n_features))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - begins[feature[order]]
        return rank

    def candidates(self) -> Candidates:
        """Return all stored candidates, sorted by feature, then from high to low value, then by position."""
        self._compact()
        return self._stored

    def merge(self, other: LayerSketch) -> None:
        """Merge another sketch of the same layer."""
        self.count_SF += other.count_SF
        self.sum_F += other.sum_F
        self.log_FX += other.log_FX
        self.max_F = torch.maximum(self.max_F, other.max_F)
        self.min_F = torch.minimum(self.min_F, other.min_F)
        exponent_F = torch.maximum(self.exponent_F, other.exponent_F)
        self._widen(exponent_F)
        other._widen(exponent_F)
        self.linear_FX += other.linear_FX
        self._waiting.append(other.candidates())
        self._n_waiting += len(other._stored.feature)
        self._compact()

    TENSORS = ("count_SF", "sum_F", "log_FX", "linear_FX", "exponent_F", "max_F", "min_F")

    def state(self) -> dict[str, NDArray]:
        """Return the state as named arrays, for a file."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in self.TENSORS}
        return arrays | {f"candidates.{k}": v for k, v in self.candidates()._asdict().items()}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        """Restore a `state`."""
        for name in self.TENSORS:
            setattr(self, name, torch.from_numpy(arrays[name]).to(self.max_F.device))
        self._waiting = [Candidates(*(arrays[f"candidates.{k}"] for k in Candidates._fields))]
        self._compact()
