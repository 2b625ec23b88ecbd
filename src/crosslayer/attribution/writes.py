"""Decoder rows of a prompt's active features, read once and laid out for the descent.

The descent visits written layers from the top and multiplies the gradients of each position with the rows of its
features. So the rows of a written layer are grouped by position, and within a position by the layer read. Rows include
the scale and gain of a norm after the MLP.

Positions have different numbers of features. In the padded layout each has as many rows as the one with the most, the
rest zeros, and all positions are one batched product; otherwise rows are without gaps, one product per position.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.clt.sparse import add_rows
from crosslayer.clt.transcoder import CLT

MAX_PADDED = 64
"""Number of positions up to which rows are padded on CPU, where many small products cost more than zeros."""
BYTES_AT_ONCE = 1 << 27
"""Memory of rows that are put in place at once."""


class Writes:
    """Decoder rows of one prompt's active features; positions count from the first with features.

    Attributes:
        rows: per written layer, (n, D), or (positions, n, D) if padded.
        below: (positions, L + 1) counts: `below[p, l]` is the number of features of layers under `l` at position `p`.
        made_LTD: the sum of what all features write.
        scale_LTD: scales times gains of the norms after the MLPs; None for a family without them.
    """

    rows: list[Tensor]
    made_LTD: Tensor

    def __init__(self, local: LocalModel, dtype: torch.dtype) -> None:
        self.local, self.dtype = local, dtype
        n_layers, self.n_positions = local.n_layers, local.n_positions - local.n_skip
        self.padded = local.device.type == "cuda" or self.n_positions <= MAX_PADDED
        last = [min(i + local.clt.config.n_slots(i), n_layers) for i in range(n_layers)]
        self.first_layer = [next(i for i in range(m + 1) if last[i] > m) for m in range(n_layers)]
        counts_TL = np.zeros((self.n_positions, n_layers), np.int64)
        np.add.at(counts_TL, (local.positions - local.n_skip, local.layers), 1)
        self.below = np.pad(counts_TL.cumsum(1), ((0, 0), (1, 0)))
        self.counts = [self.below[:, m + 1] - self.below[:, first] for m, first in enumerate(self.first_layer)]
        """Per written layer, the number of features of each position that write to it."""
        self.tall = [int(c.max(initial=0)) if self.padded else 0 for c in self.counts]
        """Per written layer, the number of rows of each position if padded."""
        sizes = [
            self.n_positions * t if self.padded else int(c.sum()) for c, t in zip(self.counts, self.tall, strict=True)
        ]
        self.base = np.concatenate([[0], np.cumsum(sizes)])
        self.scale_LTD = _scales(local)

    @property
    def n_bytes(self) -> int:
        """Memory of the rows."""
        return int(self.base[-1]) * self.local.x_LTD.shape[2] * torch.finfo(self.dtype).bits // 8

    def starts(self, written: int) -> Int[np.ndarray, " T"]:
        """Return where the rows of each position begin among those of a written layer."""
        if self.padded:
            return np.arange(self.n_positions) * self.tall[written]
        return np.cumsum(self.counts[written]) - self.counts[written]

    @torch.no_grad()
    def fill(self, clt: CLT) -> None:
        """Read the decoder rows, and set the errors and constants of the local model."""
        local, width = self.local, self.local.x_LTD.shape[2]
        new = torch.zeros if self.padded else torch.empty
        self._flat_ND = new(int(self.base[-1]), width, dtype=self.dtype, device=local.device)
        self.rows = [
            part.unflatten(0, (self.n_positions, -1)) if self.padded and len(part) else part
            for part in self._flat_ND.split(np.diff(self.base).tolist())
        ]
        self.made_LTD = torch.zeros_like(local.x_LTD)
        for layer in range(local.n_layers):
            distinct, which = np.unique(local.indices[local.layers == layer], return_inverse=True)
            if len(distinct):
                rows_KSD = clt.decoder_rows(layer, torch.from_numpy(distinct).to(local.device))
                self._put(layer, rows_KSD, torch.from_numpy(which).to(local.device))
        local.set_writes(self.made_LTD)

    def _put(self, layer: int, rows_KSD: Float[Tensor, "K S D"], which_N: Tensor) -> None:
        """Lay out the rows of one layer's features.

        Args:
            rows_KSD: decoder rows of distinct features.
            which_N: the row of each active feature of the layer, in order.
        """
        local, active, slots = self.local, self.local.firing[layer], rows_KSD.shape[1]
        rows_KSD = rows_KSD.to(local.dtype)
        token_N, written = active.token_K, slice(layer, layer + slots)
        made_TSD = rows_KSD.new_zeros(local.n_positions, *rows_KSD.shape[1:])
        start_R1 = np.searchsorted(local.positions[local.layers == layer], np.arange(local.n_positions + 1))
        add_rows(
            made_TSD.flatten(1),
            torch.from_numpy(start_R1).to(local.device),
            which_N,
            active.value_K,
            rows_KSD.flatten(1),
        )
        self.made_LTD[written] += made_TSD.transpose(0, 1)
        to_NS = torch.from_numpy(self._places(layer, slots)).to(local.device)
        at_once = max(1, BYTES_AT_ONCE // (slots * rows_KSD.shape[2] * rows_KSD.element_size()))
        for which, token, to in zip(which_N.split(at_once), token_N.split(at_once), to_NS.split(at_once), strict=True):
            rows_NSD = rows_KSD[which]
            if self.scale_LTD is not None:
                rows_NSD = rows_NSD * self.scale_LTD[written, token].transpose(0, 1)
            self._flat_ND.index_copy_(0, to.flatten(), rows_NSD.flatten(0, 1).to(self.dtype))

    def _places(self, layer: int, slots: int) -> Int[np.ndarray, "N S"]:
        """Return the row of each of a layer's features in each layer that it writes to."""
        position_N = self.local.positions[self.local.layers == layer] - self.local.n_skip
        counts_T = self.below[:, layer + 1] - self.below[:, layer]
        rank_N = rank_at_position(position_N, counts_T)
        begin_ST = [
            self.base[m] + self.starts(m) + self.below[:, layer] - self.below[:, self.first_layer[m]]
            for m in range(layer, layer + slots)
        ]
        return np.stack(begin_ST)[:, position_N].T + rank_N[:, None]


def rank_at_position(position_N: Int[np.ndarray, " N"], counts_T: Int[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
    """Return the place of each feature among those of its position; features are in order of position."""
    return np.arange(len(position_N)) - (np.cumsum(counts_T) - counts_T)[position_N]


def _scales(local: LocalModel) -> Tensor | None:
    """Return the scales and gains of the norms after the MLPs; None for a family without them."""
    gains = [block.after_mlp_norm for block in local.anatomy.blocks]
    scales = [s.after_mlp_T for s in local.scales]
    if gains[0] is None or scales[0] is None:
        return None
    return torch.stack([s[:, None] * n.gain_D for s, n in zip(scales, gains, strict=True)])  # type: ignore[union-attr]
