"""Decoder rows of a prompt's active features, read once and laid out for the sweep.

The sweep visits written layers from the top and, in each, one position after another. So the rows of a written layer
are grouped by position, and within a position by the layer read. Rows include the scale and gain of a norm after the
MLP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.clt.sparse import sum_rows
from crosslayer.clt.transcoder import CLT


class Writes:
    """Decoder rows of one prompt's active features.

    Attributes:
        rows: per written layer, (n, D), sorted by position, layer read and index.
        below: (T + 1, L + 1) counts: `below[p][l]` is the number of features of layers under `l` at position `p`.
        made_LTD: the sum of what all features write.
    """

    def __init__(self, local: LocalModel, dtype: torch.dtype) -> None:
        self.local, self.dtype = local, dtype
        n_layers, n_positions = local.n_layers, local.n_positions
        self.n_slots = [local.clt.config.n_slots(i) for i in range(n_layers)]
        counts_TL = torch.stack([torch.bincount(a.token_K, minlength=n_positions) for a in local.firing], dim=1)
        self.below: list[list[int]] = torch.nn.functional.pad(counts_TL.cumsum(1), (1, 0)).tolist()
        width, device = local.x_LTD.shape[2], local.x_LTD.device
        sizes = [sum(self.count(m, p) for p in range(n_positions)) for m in range(n_layers)]
        self.rows = [torch.empty(n, width, dtype=dtype, device=device) for n in sizes]
        self.made_LTD = torch.zeros_like(local.x_LTD)

    @staticmethod
    def n_bytes(local: LocalModel, dtype: torch.dtype) -> int:
        """Compute the memory of a prompt's rows."""
        slots = sum(len(a.token_K) * local.clt.config.n_slots(i) for i, a in enumerate(local.firing))
        return slots * local.x_LTD.shape[2] * torch.finfo(dtype).bits // 8

    def first_layer(self, written: int) -> int:
        """Return the lowest layer whose features write to this one."""
        return next(i for i in range(written + 1) if i + self.n_slots[i] > written)

    def count(self, written: int, position: int) -> int:
        """Count the features at a position that write to a layer."""
        return self.below[position][written + 1] - self.below[position][self.first_layer(written)]

    def put(self, layer: int, rows_KSD: Float[Tensor, "K S D"], which_N: Tensor) -> None:
        """Lay out the rows of one layer's features.

        Args:
            rows_KSD: decoder rows of distinct features.
            which_N: the row of each active feature of the layer, in order.
        """
        active = self.local.firing[layer]
        place_N = torch.arange(len(which_N), device=which_N.device)
        starts = torch.searchsorted(active.token_K, torch.arange(self.local.n_positions, device=which_N.device))
        place_N = place_N - starts[active.token_K]
        for slot in range(rows_KSD.shape[1]):
            written = layer + slot
            to_N = self._offsets(written, layer).to(which_N.device)[active.token_K] + place_N
            rows_KD = rows_KSD[:, slot].to(self.local.dtype).contiguous()
            self.made_LTD[written] += sum_rows(
                self.local.n_positions, active.token_K, which_N, rows_KD, active.value_K, ordered=True
            )
            scales, norm = self.local.scales[written], self.local.anatomy.blocks[written].after_mlp_norm
            if scales.after_mlp_T is None or norm is None:
                self.rows[written].index_copy_(0, to_N, rows_KD.to(self.dtype)[which_N])
            else:
                scaled_ND = (rows_KD * norm.gain_D)[which_N] * scales.after_mlp_T[active.token_K, None]
                self.rows[written].index_copy_(0, to_N, scaled_ND.to(self.dtype))

    def _offsets(self, written: int, layer: int) -> Tensor:
        """Return, per position, where a layer's rows begin among those of a written layer."""
        first, offsets, total = self.first_layer(written), [], 0
        for position, below in enumerate(self.below):
            offsets.append(total + below[layer] - below[first])
            total += self.count(written, position)
        return torch.tensor(offsets)


@torch.no_grad()
def read_writes(clt: CLT, local: LocalModel, dtype: torch.dtype) -> Writes:
    """Read the decoder rows of a prompt, each once, and set the errors and constants of its local model."""
    writes = Writes(local, dtype)
    for layer, active in enumerate(local.firing):
        distinct, which = active.feature_K.unique(return_inverse=True)
        if len(distinct):
            writes.put(layer, clt.decoder_rows(layer, distinct), which)
    local.set_writes(writes.made_LTD)
    return writes
