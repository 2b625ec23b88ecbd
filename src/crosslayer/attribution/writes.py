"""What the active features of a prompt write: decoder rows, read once, laid out for the sweep.

The sweep takes layers written from the top and, in each, positions one after the other; so for each layer written the
rows lie together by position, and there by layer read. Rows carry the scale and gain of a norm that follows the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.clt.sparse import Active, sum_rows
from crosslayer.clt.transcoder import CLT


class Writes:
    """Decoder rows of one prompt's active features.

    Attributes:
        rows: for each layer written, (n, D): by position, then layer read, then index.
        below: (T + 1, L + 1) counts: `below[p][l]` features of layers under `l` at position `p`.
        made_LTD: what all features write together.
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
        """What the rows of a prompt take."""
        slots = sum(len(a.token_K) * local.clt.config.n_slots(i) for i, a in enumerate(local.firing))
        return slots * local.x_LTD.shape[2] * torch.finfo(dtype).bits // 8

    def first_layer(self, written: int) -> int:
        """The lowest layer whose features write to this one."""
        return next(i for i in range(written + 1) if i + self.n_slots[i] > written)

    def count(self, written: int, position: int) -> int:
        """How many features at a position write to a layer."""
        return self.below[position][written + 1] - self.below[position][self.first_layer(written)]

    def put(self, layer: int, rows_KSD: Float[Tensor, "K S D"], which_N: Tensor) -> None:
        """Lay out the rows of one layer's features.

        Args:
            rows_KSD: decoder rows of distinct features.
            which_N: for each active feature of the layer, in order, its row.
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
        """Where a layer's rows begin, for each position, among those of a layer written."""
        first, offsets, total = self.first_layer(written), [], 0
        for position, below in enumerate(self.below):
            offsets.append(total + below[layer] - below[first])
            total += self.count(written, position)
        return torch.tensor(offsets)


@torch.no_grad()
def read_writes(clt: CLT, locals_: Sequence[LocalModel], dtype: torch.dtype) -> list[Writes]:
    """Decoder rows of several prompts, each read once; completes the local models with errors and constants."""
    all_writes = [Writes(local, dtype) for local in locals_]
    for layer in range(clt.config.n_layers):
        firing: list[Active] = [local.firing[layer] for local in locals_]
        distinct, which = torch.cat([a.feature_K for a in firing]).unique(return_inverse=True)
        if not len(distinct):
            continue
        rows_KSD = clt.decoder_rows(layer, distinct)
        for writes, part in zip(all_writes, which.split([len(a.feature_K) for a in firing]), strict=True):
            writes.put(layer, rows_KSD, part)
    for local, writes in zip(locals_, all_writes, strict=True):
        local.set_writes(writes.made_LTD)
    return all_writes
