"""A sample of tokens with all features that fire on them, the same tokens for every feature.

Co-activation and rules are counted on it. A token is in the sample if the hash of its position begins with `level`
zeros. The level rises when the entries exceed their budget, so the sample is the largest that fits, independent of the
order of batches. A short text is in the sample as a whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from crosslayer.clt.sparse import Active
from crosslayer.features.sketch import mix


def token_hash(position: NDArray) -> NDArray:
    """63 pseudo-random bits per position in the token file, independent of those that sample examples."""
    return mix(mix(torch.from_numpy(position)) + 0x5A3D).numpy()


class Sampled(NamedTuple):
    """Tokens of the sample by position, and the features (flat ids) that fire on them, in order of id."""

    position: NDArray
    indptr: NDArray
    feature: NDArray
    activation: NDArray
    """float16."""

    def matrix(self, n_features: int) -> csr_array:
        """Return a (tokens, features) matrix of ones."""
        ones = np.ones(len(self.feature), np.float32)
        return csr_array((ones, self.feature, self.indptr), shape=(len(self.position), n_features))


class TokenSample:
    """Collects a `Sampled` from batches in any order.

    Args:
        budget: max number of entries over all merged parts.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.level, self._n_entries = budget, 0, 0
        self._parts: list[Sampled] = []

    def add(self, active: list[Active], first_row: int, context: int, n_skip: int) -> None:
        """Add the active features, by layer, of whole rows without their first `n_skip` positions."""
        n_tokens, n_features = active[0].shape
        body = context - n_skip
        token = np.arange(n_tokens)
        position = (first_row + token // body) * context + n_skip + token % body
        chosen = self._chosen(position)
        if not chosen.any():
            return
        number = torch.full((n_tokens,), -1, dtype=torch.int64)
        number[torch.from_numpy(chosen)] = torch.arange(int(chosen.sum()))
        number = number.to(active[0].token_K.device)
        rows, ids, values = [], [], []
        for layer, a in enumerate(active):
            row_K = number[a.token_K]
            keep = ((row_K >= 0) & (a.value_K > 0)).nonzero()[:, 0]
            rows.append(row_K[keep])
            ids.append(a.feature_K[keep] + layer * n_features)
            values.append(a.value_K[keep].float())
        row = torch.cat(rows)
        order = row.argsort(stable=True)
        lengths = torch.bincount(row, minlength=int(chosen.sum())).cpu().numpy()
        activation = torch.cat(values)[order].clamp(max=torch.finfo(torch.float16).max).half()
        self._append(
            Sampled(
                position[chosen],
                np.concatenate([[0], np.cumsum(lengths)]),
                torch.cat(ids)[order].int().cpu().numpy(),
                activation.cpu().numpy(),
            )
        )

    def _chosen(self, position: NDArray) -> NDArray:
        return (token_hash(position) >> (63 - self.level)) == 0 if self.level else np.ones(len(position), bool)

    def _append(self, part: Sampled) -> None:
        self._parts.append(part)
        self._n_entries += len(part.feature)
        while self._n_entries > self.budget and self.level < 62:
            self.level += 1
            self._parts = [self._thinned(p) for p in self._parts]
            self._n_entries = sum(len(p.feature) for p in self._parts)

    def _thinned(self, part: Sampled) -> Sampled:
        keep = self._chosen(part.position)
        lengths = np.diff(part.indptr)
        entries = np.repeat(keep, lengths)
        indptr = np.concatenate([[0], np.cumsum(lengths[keep])])
        return Sampled(part.position[keep], indptr, part.feature[entries], part.activation[entries])

    def merge(self, other: TokenSample) -> None:
        """Merge another sample's tokens, at the higher level of the two."""
        self.level = max(self.level, other.level)
        theirs = [self._thinned(p) for p in other._parts]
        self._parts = [self._thinned(p) for p in self._parts]
        self._n_entries = sum(len(p.feature) for p in self._parts)
        for part in theirs:
            self._append(part)

    def collected(self) -> Sampled:
        """Return the sample, sorted by position."""
        if not self._parts:
            return Sampled(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float16))
        position = np.concatenate([p.position for p in self._parts])
        lengths = np.concatenate([np.diff(p.indptr) for p in self._parts])
        feature = np.concatenate([p.feature for p in self._parts])
        activation = np.concatenate([p.activation for p in self._parts])
        order = np.argsort(position, kind="stable")
        begins = np.cumsum(lengths) - lengths
        lengths = lengths[order]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        entry = np.arange(indptr[-1]) + np.repeat(begins[order] - indptr[:-1], lengths)
        collected = Sampled(position[order], indptr, feature[entry], activation[entry])
        self._parts = [collected]
        return collected

    def state(self) -> dict[str, NDArray]:
        """Return the state as named arrays, for a file."""
        return {"sample.level": np.array([self.level])} | {
            f"sample.{k}": v for k, v in self.collected()._asdict().items()
        }

    def restore(self, arrays: dict[str, NDArray]) -> None:
        """Restore a `state`."""
        self.level = int(arrays["sample.level"][0])
        self._parts = []
        self._n_entries = 0
        self._append(Sampled(*(arrays[f"sample.{k}"] for k in Sampled._fields)))
