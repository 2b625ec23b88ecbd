"""Co-activation: which features fire together, counted on the token sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crosslayer.features.sample import Sampled

CELLS_AT_ONCE = 1 << 25


class Coactive(NamedTuple):
    """The most coactive features of each feature, in its own layer and in other layers; -1 where there are fewer.

    Ranked by cosine, count / sqrt(n_i n_j); ties are ordered by id.
    """

    own_id: NDArray
    own_count: NDArray
    other_id: NDArray
    other_count: NDArray
    n_N: NDArray
    """Number of sample tokens on which each feature fires."""

    def cosine(self, ids: NDArray, counts: NDArray) -> NDArray:
        """Return the cosine of each pair of a list."""
        product = self.n_N[:, None].astype(np.float64) * self.n_N[ids]
        return np.where(ids < 0, 0, counts / np.sqrt(np.maximum(product, 1))).astype(np.float32)


def coactivation(
    sampled: Sampled, n_layers: int, n_features: int, n: int, on_progress: Callable[[float], None] = lambda share: None
) -> Coactive:
    """Find the `n` most coactive features of each feature, in its own layer and in other layers."""
    n_all = n_layers * n_features
    fires = sampled.matrix(n_all)
    by_feature = fires.T.tocsr()
    n_N = np.bincount(sampled.feature, minlength=n_all)
    root = torch.from_numpy(np.sqrt(np.maximum(n_N, 1))).float()
    found = [
        np.full((n_all, n), -1, np.int32),
        np.zeros((n_all, n), np.uint32),
        np.full((n_all, n), -1, np.int32),
        np.zeros((n_all, n), np.uint32),
    ]
    step = max(1, min(n_features, CELLS_AT_ONCE // n_all))
    for layer in range(n_layers):
        for at in range(layer * n_features, (layer + 1) * n_features, step):
            rows = slice(at, min(at + step, (layer + 1) * n_features))
            if not n_N[rows].any():
                continue
            count = torch.from_numpy((by_feature[rows] @ fires).toarray())
            own = torch.arange(count.shape[0])
            count[own, own + at] = 0
            mine = slice(layer * n_features, (layer + 1) * n_features)
            for side in (0, 1):
                some = count[:, mine] if side == 0 else count
                offset = mine.start if side == 0 else 0
                if side == 1:
                    some[:, mine] = 0
                cosine = some / root[offset : offset + some.shape[1]]
                ids, counts = _most(cosine, some, n)
                found[2 * side][rows] = np.where(ids < 0, -1, ids + offset)
                found[2 * side + 1][rows] = counts
            on_progress(rows.stop / n_all)
    return Coactive(found[0], found[1], found[2], found[3], n_N)


def _most(cosine: torch.Tensor, count: torch.Tensor, n: int) -> tuple[NDArray, NDArray]:
    """Return the largest entries of each row, without zeros; ties keep their order.

    A common factor of a row does not change its order.
    """
    width = cosine.shape[1]
    ids = np.full((cosine.shape[0], n), -1, np.int64)
    counts = np.zeros((cosine.shape[0], n), np.int64)
    # Non-negative floats have the same order as their bits.
    key = cosine.view(torch.int32).long() << 32 | (width - torch.arange(width))
    index = key.topk(min(n, width), dim=1).indices
    found = count.gather(1, index).long().numpy()
    ids[:, : index.shape[1]] = np.where(found > 0, index.numpy(), -1)
    counts[:, : index.shape[1]] = found
    return ids, counts
